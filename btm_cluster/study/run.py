"""A study: the paper's comparison on the plan's texts, for every size and random seed it names.

The models of one size and random seed, a repeat, are made by `models.py` and compared by `comparison.py`.
Everything is an artifact: what is there already is not made again, and a study that was killed goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from btm_cluster.driver.driver import Driver
from btm_cluster.evaluation.comparison import Comparison
from btm_cluster.evaluation.costs import costs_of
from btm_cluster.evaluation.systems import Ensemble
from btm_cluster.evaluation.texts import TextReport, report_texts
from btm_cluster.language_model.demix import count_demix_parameters
from btm_cluster.language_model.model import count_parameters
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.ledger.curves import read_rise
from btm_cluster.plan import Plan
from btm_cluster.requests import TrainRequest
from btm_cluster.study.adaptation import adapt
from btm_cluster.study.comparison import compare, entries_from
from btm_cluster.study.controls import DEMIXES
from btm_cluster.study.early_stopping import STOPPED_FOREST
from btm_cluster.study.growth import measure_growth
from btm_cluster.study.models import train_repeat
from btm_cluster.study.pretrained import study_of
from btm_cluster.study.repeat import Repeat
from btm_cluster.study.repeats import repeats_of


@dataclass(frozen=True)
class Study:
    """The outcome of a study."""

    entries: tuple[Mapping[str, Any], ...]
    """A row for each system, size and random seed: perplexities on test text."""
    texts: tuple[TextReport, ...]
    speeds: tuple[Mapping[str, Any], ...]
    """Updates and tokens per second of each kind of training."""
    trials: tuple[Mapping[str, Any], ...]
    """Perplexities on the domains' development text: the Transformer-LM's for each recipe that was tried, and a
    forest's for each scale of its experts' learning rate. Forests that are left out since an expert diverged, too."""
    rises: tuple[Mapping[str, Any], ...]
    """Trainings whose loss ended higher than it had been."""
    growth: tuple[Mapping[str, Any], ...]
    """A row for each step and system of a forest that is grown step by step."""
    repeats_left: int
    """Parts that are still to come: sizes and random seeds, and the growth."""


def run_study(plan: Plan, driver: Driver) -> Iterator[Study]:
    """Trains and compares everything that `plan.study` names; without one, the plan's
    own model with all baselines and controls.

    Yields what is known after each size and random seed, so that the first results need not wait for the
    last, and once more with the growth.

    Raises:
        UserError: a study that is at odds with itself: a share that leaves a seed or an expert without an
        update, say.
        StepError: something could not be trained; the rest is kept, and the same command goes on.
    """
    study = study_of(plan)
    driver.listener.part("texts and trials first")
    repeats = repeats_of(plan.model_copy(update={"study": study}), driver)
    texts = tuple(report_texts(repeats[0].prepared, driver))
    trials = [trial for repeat in repeats for trial in repeat.trials]
    entries: list[Mapping[str, Any]] = []
    speeds: list[Mapping[str, Any]] = []
    rises: list[Mapping[str, Any]] = []
    forests: list[Ensemble] = []
    parts = len(repeats) + (study.growth is not None)
    for number, repeat in enumerate(repeats, 1):
        driver.listener.part(f"part {number} of {parts}: {_name(repeat)}")
        models, trained = train_repeat(repeat, driver)
        comparison = compare(repeat.prepared, models, driver)
        if "adapted" in study.systems:
            adapted = adapt(repeat, models.transformer_lm, models.ensembles[0], driver)
            comparison = comparison.with_rows(adapted)
        entries += entries_of(repeat, comparison, models.stopped_at, driver.ledger)
        speeds += [_speed(repeat, request, model) for request, model in trained]
        rises += _rises(repeat, trained, driver.ledger)
        trials += _diverged(repeat, models.diverged)
        forests.append(models.ensembles[0])
        lists = tuple(entries), texts, tuple(speeds), tuple(trials), tuple(rises)
        known = Study(*lists, (), repeats_left=parts - number)
        yield known
    if study.growth is not None:
        driver.listener.part(f"part {parts} of {parts}: {_name(repeats[0])}, growth")
        grown = measure_growth(repeats[0], study.growth, forests[0], driver)
        yield replace(known, growth=tuple(grown), repeats_left=0)


def _name(repeat: Repeat) -> str:
    return f"{repeat.size}, random seed {repeat.prepared.plan.training.random_seed}"


def _diverged(repeat: Repeat, ways: Sequence[str]) -> list[Mapping[str, Any]]:
    """A trial for each forest that is left out since one of its experts diverged."""
    scales = {other.experts: other.prepared.plan.branching.learning_rate_scale for other in repeat.others}
    return [
        {
            "size": repeat.size,
            "random_seed": repeat.prepared.plan.training.random_seed,
            "experts": experts,
            "learning_rate_scale": scales[experts],
            "development": None,
            "chosen": False,
        }
        for experts in ways
    ]


def entries_of(
    repeat: Repeat, comparison: Comparison, stopped_at: Mapping[str, int], ledger: Ledger
) -> list[Mapping[str, Any]]:
    """The comparison as plain values, one entry for each system. Costs are told from what is in the store, and of
    experts stopped early each one's update."""
    plan, model = repeat.prepared.plan, repeat.prepared.model
    costs = costs_of(comparison, model, plan.training.block_tokens, ledger)
    first_update = plan.training.seed_updates if repeat.is_from_pretrained else 0
    tokens = (plan.training.updates - first_update) * len(repeat.prepared.founders)
    tokens *= plan.training.blocks_per_domain_update * plan.training.block_tokens
    parameters = count_parameters(model)[1]
    demix_parameters = count_demix_parameters(model, len(repeat.prepared.founders))[1]
    common = {
        "size": repeat.size,
        "tokens": tokens,
        "experts": len(repeat.prepared.domains),
        "random_seed": plan.training.random_seed,
    }
    return [
        common
        | {"non_embedding_parameters": demix_parameters if entry["system"] in DEMIXES else parameters}
        | entry
        | ({"stopped_at": dict(stopped_at)} if entry["system"] == STOPPED_FOREST else {})
        for entry in entries_from(repeat.prepared, comparison, costs)
    ]


def _speed(repeat: Repeat, request: TrainRequest, model: Artifact) -> Mapping[str, Any]:
    note = model.note
    rate = note["tokens_per_second"] / (request.blocks_per_update * request.training.block_tokens)
    return {
        "size": repeat.size,
        "role": _role(request),
        "blocks_per_update": request.blocks_per_update,
        "updates_per_second": round(rate, 2),
        "tokens_per_second": note["tokens_per_second"],
        "gpus": note["gpus"],
        "device": note["device"],
    }


def _rises(
    repeat: Repeat, trained: Sequence[tuple[TrainRequest, Artifact]], ledger: Ledger
) -> Iterator[Mapping[str, Any]]:
    random_seed = repeat.prepared.plan.training.random_seed
    for request, model in trained:
        if rise := read_rise(ledger, model.ref):
            yield {
                "size": repeat.size,
                "random_seed": random_seed,
                "training": request.label,
                **asdict(rise),
            }


def _role(request: TrainRequest) -> str:
    if request.trains.lora is not None:
        return f"{request.role}, LoRA of rank {request.trains.lora.rank}"
    return f"{request.role}, {request.trains.part}" if request.trains.is_delta else request.role
