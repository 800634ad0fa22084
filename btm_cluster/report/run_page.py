"""The page of a plan: from what the store has to sections, the verdict first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from btm_cluster.evaluation.texts import TextReport
from btm_cluster.evaluation.verdict import Verdict
from btm_cluster.forest import Forest
from btm_cluster.ledger.timelines import Timeline
from btm_cluster.plan import Plan
from btm_cluster.report.content import Page, Section, not_measured
from btm_cluster.report.expert_sections import colours_of, excerpts_section, heat_section, worth_section
from btm_cluster.report.forest_sections import (
    lineage_section,
    plan_section,
    texts_section,
    without_credentials,
)
from btm_cluster.report.measured import TextParts, Training
from btm_cluster.report.results import Results
from btm_cluster.report.run_sections import curves_section, timeline_section
from btm_cluster.report.study_page import figure_sections
from btm_cluster.report.verdict_sections import headline, lead, systems_section, tiles


@dataclass(frozen=True)
class Evaluated:
    """A version of a forest, evaluated."""

    forest: Forest
    verdict: Verdict
    texts: Sequence[TextReport]
    parts: Sequence[TextParts]
    overlaps: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RunReport:
    """Everything that the page of a plan shows."""

    plan: Plan
    versions: Sequence[Forest]
    evaluated: Evaluated | None
    """The newest version of which everything is measured."""
    lacks: str
    """A sentence on what the store lacks of a newer version."""
    trainings: Sequence[Training]
    runs: Sequence[tuple[str, Timeline]]
    """The newest first."""
    logs: str
    """The place of runs' curves."""
    study: Results | None = None


def run_page(report: RunReport) -> Page:
    """The page."""
    newest, done = report.versions[-1], report.evaluated
    outcome, is_good = headline(done.verdict if done else None)
    told = [lead(done.verdict)] if done else []
    if done is None:
        told.append(
            f"Forest version {newest.version} was not evaluated ({report.lacks}): `btm run PLAN` or `btm evaluate PLAN` "
            "does that."
        )
    elif done.forest.version != newest.version:
        rest = (
            f" ({report.lacks}), and `btm evaluate PLAN` evaluates it"
            if newest.experts
            else ", without experts"
        )
        told.append(
            f"This is version {done.forest.version}, the newest that was evaluated; the forest is at version "
            f"{newest.version}{rest}."
        )
    return Page(
        f"{report.plan.name}: forest version {(done.forest if done else newest).version}",
        outcome,
        is_good,
        " ".join(told),
        tiles(done.verdict) if done else (),
        list(_sections(report)),
        f"Made by btm report from the store {without_credentials(report.plan.store)}, and from nothing else.",
    )


def _sections(report: RunReport) -> list[Section]:
    done = report.evaluated
    why_not = (
        "No text of the plan has test documents."
        if done
        else "No version of this forest was evaluated; `btm evaluate PLAN` does that."
    )
    experts = (done.forest if done else report.versions[-1]).domains
    parts = done.parts if done else ()
    colours = colours_of(experts)
    return [
        systems_section(done.verdict if done else None, why_not),
        heat_section(parts, experts, why_not),
        excerpts_section(parts, experts, why_not),
        worth_section(parts, experts, why_not),
        curves_section(report.trainings, colours),
        timeline_section(
            report.runs, report.plan.cluster.price_per_gpu_hour, without_credentials(report.logs)
        ),
        *_study_sections(report.study),
        lineage_section(report.versions, colours),
        texts_section(done.texts if done else (), done.overlaps if done else {}, why_not),
        plan_section(report.plan),
    ]


def _study_sections(study: Results | None) -> list[Section]:
    if study is None:
        told = (
            "No study was given: `btm study PLAN --to DIR` measures perplexity over seed share, experts kept and "
            "development blocks, and `btm report PLAN DIR --to PAGE` shows its curves here."
        )
        return [not_measured("study", "Study", told)]
    return list(figure_sections(study))
