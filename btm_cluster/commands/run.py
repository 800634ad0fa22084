"""`btm run`: shows the verdict; with --details texts, what was fitted, and every text's figures."""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btm_cluster.commands.plan import show_preview
from btm_cluster.plan import read_plan
from btm_cluster.session import driving, opened_view
from btm_cluster.terminal.options import (
    Address,
    Dashboard,
    Details,
    DryRun,
    InProcess,
    JsonAndProgress,
    NewResources,
    PlanPath,
)
from btm_cluster.terminal.tables import ManyColumns, consoles, say, show_stacked
from btm_cluster.terminal.verdict import show_verdict, show_verdict_details
from btm_cluster.workers.shadowing import check_shadowing

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from btm_cluster.driver.driver import Driver
    from btm_cluster.evaluation.texts import TextReport
    from btm_cluster.operations.run import Run
    from btm_cluster.plan import Plan


def run(
    plan_path: PlanPath,
    json_output: JsonAndProgress = False,
    address: Address = None,
    in_process: InProcess = False,
    dashboard: Dashboard = False,
    new_resources: NewResources = False,
    details: Details = False,
    dry_run: DryRun = False,
) -> None:
    """Grow the forest: seed, experts, merge, and the verdict. Run again, it goes on where it was."""
    if dry_run:
        show_preview(plan_path, json_output, address, new_resources)
        return
    plan = read_plan(plan_path)
    check_shadowing()
    with opened_view() as view:
        from btm_cluster.driver.driver import step_error
        from btm_cluster.operations.plan import check_run
        from btm_cluster.operations.run import run_plan

        with driving(view, plan, address, in_process, dashboard, new_resources, command="run") as driver:
            for note in check_run(plan, driver):
                log.warning(note)
            result = run_plan(plan, driver)
            view.close()
            show_and_finish(plan, driver, result, json_output, details, plan_path)
    if result.failures:
        raise step_error(result.failures)


def show_and_finish(
    plan: "Plan", driver: "Driver", run: "Run", json_output: bool, details: bool, plan_path: Path
) -> None:
    """Prints the outcome of a run, then writes its page, which takes seconds, and says what to do next."""
    from btm_cluster.operations.report import finish_run

    try:
        show_run(run, json_output, details)
    finally:
        page = finish_run(plan, driver, run)
    console = consoles(json_output)[int(json_output)]
    if page:
        say(f"report: {page}", console)
    if not json_output:
        plan_name = shlex.quote(str(plan_path))
        say(
            f"next: `btm report {plan_name} --to FOLDER` writes that page anywhere, `btm serve {plan_name}` "
            f"serves the ensemble, `btm merge {plan_name} --for {plan.domains[0].name} --to FOLDER` writes a single "
            "model for a text",
            console,
        )


def show_run(run: "Run", json_output: bool, details: bool) -> None:
    """Prints the outcome of a run: the verdict first; or all of it as JSON."""
    console, notes = consoles(json_output)
    if json_output:
        print(json.dumps(run.to_json(), indent=2), flush=True)
        return
    show_verdict(run.verdict, console)
    for notice in _notices(run):
        say(f"note: {notice}", console)
    if details:
        show_stacked(*texts_table(run.texts), console)
        show_stacked(*fits_table(run.priors, run.evidence_weights), console)
        show_verdict_details(run.verdict, console)
    say(run.steps_line, notes)


def _notices(run: "Run") -> Iterator[str]:
    """Sentences on skipped documents, and on domains and baselines that the verdict goes without."""
    yield from skipped_notice(run.texts, run.wanted_development_blocks)
    yield from (f"{name} was taken out of the forest and is passed over" for name in run.passed_over)
    if run.trained_otherwise:
        yield (
            f"the plan's `branching` has changed, and these stay as they were trained: "
            f"{', '.join(run.trained_otherwise)}; with another `store` all experts are trained by it"
        )
    yield from (
        f"{name} is not trained, and not compared with; `btm run` trains it" for name in run.missing_baselines
    )


def texts_table(texts: Sequence["TextReport"]) -> ManyColumns:
    """The paper's Table 7, and how much test text also stands in training text."""
    headings = [
        "text",
        "training words",
        "tokens",
        "development tokens",
        "test tokens",
        "duplicates",
        "skipped",
    ]
    headings += ["test documents in training", "20-word windows in training"]
    return "Texts", headings, [_row_of_text(text) for text in texts]


def _row_of_text(text: "TextReport") -> list[str]:
    windows = text.test_windows_in_training / max(text.test_windows, 1)
    return [
        text.name + (" (target)" if text.is_target else ""),
        *(f"{count:,}" if count else "–" for count in (text.words.get("train"), text.tokens.get("train"))),
        f"{text.tokens.get('development', 0):,}",
        f"{text.tokens.get('test', 0):,}",
        f"{text.duplicates:,}",
        f"{sum(text.skipped.values()):,}",
        f"{text.test_documents_in_training} of {text.documents['test']}",
        f"{windows:.2%}",
    ]


def skipped_notice(texts: Sequence["TextReport"], wanted_blocks: int) -> list[str]:
    """Sentences on what a reader of the tables should know: skipped documents, and
    less development text than asked for."""
    notices = [f"{t.name}: skipped {n} × {reason}" for t in texts for reason, n in t.skipped.items()]
    short = [f"{t.name} {t.development_blocks}" for t in texts if t.development_blocks < wanted_blocks]
    if short:
        notices.append(f"fewer than {wanted_blocks} development blocks, all of them used: {', '.join(short)}")
    return notices


def fits_table(weights: Mapping[str, Mapping[str, float]], evidence: Mapping[str, float]) -> ManyColumns:
    """The fitted values: each text's prior over the experts, and β of the calibrated posterior."""
    experts = list(next(iter(weights.values())))
    rows = [[text, *(f"{p[e]:.3f}" for e in experts), f"{evidence[text]:.3f}"] for text, p in weights.items()]
    return "Fitted prior by text, and the weight of evidence", ["text", *experts, "evidence"], rows
