"""The rows of a study: every system of one size and random seed on test text, as plain values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.evaluation.comparison import Comparer, Comparison
from btm_cluster.evaluation.costs import Cost, is_better
from btm_cluster.evaluation.rows import BEST_MILESTONE, Cell, Milestones
from btm_cluster.evaluation.rows import TRANSFORMER_LM as BASELINE
from btm_cluster.evaluation.systems import BEST_TRANSFORMER_LM, TRANSFORMER_LM, Ensemble, System
from btm_cluster.evaluation.verdict import SplitResult, verdict
from btm_cluster.ledger import Ref
from btm_cluster.requests import StepRequest


@dataclass(frozen=True)
class Models:
    """All models of one size and random seed."""

    transformer_lm: Ref
    controls: Mapping[System, Ref]
    """Other single models: the Transformer-LM from the seed on at the experts' rate, where that is another and it
    did not diverge, finished and at its best milestone."""
    milestones: Mapping[int, Ref]
    """The Transformer-LM by update: the seed of the first forest, two between, and the finished one."""
    ensembles: tuple[Ensemble, ...]
    """The first is the forest that everything is compared with."""
    mixtures: Mapping[System, Sequence[StepRequest]]
    """The steps that make each mixture of experts, itself last."""
    stopped_at: Mapping[str, int]
    """The update of each expert's best milestone, by domain, where a forest of these is compared too."""
    whole: Mapping[str, tuple[Ref, ...]] = field(default_factory=dict)
    """The finished models of each system, by name, that is taken at its best milestones."""
    diverged: tuple[str, ...] = ()
    """Ways to train experts, as they are called, by which one diverged: their forests are left out."""


def compare(prepared: PreparedPlan, models: Models, driver: Driver) -> Comparison:
    """Every model and ensemble on test text."""
    single = {TRANSFORMER_LM: models.transformer_lm, **models.controls}
    single |= {System("seed", one.seed_share): one.seed for one in models.ensembles if one.seed}
    comparer = Comparer(prepared, single, models.ensembles, ("test",), models.milestones, models.mixtures)
    whole = {BEST_TRANSFORMER_LM.system: (models.transformer_lm,), **models.whole}
    return comparer.compare(driver).charging(whole)


def entries_from(
    prepared: PreparedPlan, comparison: Comparison, costs: Mapping[System, Cost]
) -> Iterator[dict[str, Any]]:
    """A row of plain values for each system: perplexities, bits per byte, the difference with its interval, and
    costs.

    The difference is to the Transformer-LM at its best milestone, which the Transformer-LM's own row names.
    """
    names = {_name(system): system for system in comparison.rows}
    results = [
        SplitResult(
            text.name,
            text.is_target,
            "test",
            {name: sums[part] for name, system in names.items() if part in (sums := comparison.rows[system])},
            comparison.sizes[part],
        )
        for text in prepared.texts
        for part in [(text.name, "test")]
    ]
    best = comparison.milestones
    for row in verdict(results).rows["test"]:
        means = {entry: row.means.get(group) for entry, group in _GROUPS.items()}
        whole = row.means.get("all")
        yield asdict(names[row.system]) | {
            **{entry: _rounded(cell) for entry, cell in means.items()},
            "per_domain": {text: _rounded(cell) for text, cell in row.cells.items()},
            "bits_per_byte": {
                **{entry: _bits(cell) for entry, cell in means.items()},
                "per_domain": {text: _bits(cell) for text, cell in row.cells.items()},
            },
            "inference_cost": comparison.costs[names[row.system]],
            **_cost_entries(costs.get(names[row.system]), costs.get(TRANSFORMER_LM), whole),
            "difference": _share(whole.difference) if whole else None,
            "difference_interval": _shares(whole.difference_interval) if whole else None,
            **({"milestones": _plain(best)} if best and names[row.system] == TRANSFORMER_LM else {}),
        }


def _cost_entries(cost: Cost | None, baseline: Cost | None, whole: Cell | None) -> dict[str, Any]:
    """Costs, beside those of the whole Transformer-LM, of which its best milestone was chosen."""
    if cost is None or baseline is None:
        return {"cost": None, "at_equal_cost": None}
    relative = {
        "training": cost.training_flops / max(1, baseline.training_flops),
        "inference": cost.inference_flops / max(1, baseline.inference_flops),
    }
    interval = whole.difference_interval if whole else None
    at_equal_cost = {
        name: {
            "relative_cost": round(ratio, 4),
            "is_better": None if interval is None else is_better(interval, ratio),
        }
        for name, ratio in relative.items()
    }
    return {"cost": asdict(cost), "at_equal_cost": at_equal_cost}


_GROUPS = {"train": "domains", "eval": "targets", "all": "all"}


def _name(system: System) -> str:
    """One name per system; differences are taken to the Transformer-LM at its best
    milestone, or else the finished one."""
    if system in (TRANSFORMER_LM, BEST_TRANSFORMER_LM):
        return BASELINE if system == TRANSFORMER_LM else BEST_MILESTONE
    return " ".join(f"{name}={value}" for name, value in asdict(system).items() if value is not None)


def _plain(milestones: Milestones) -> dict[str, Any]:
    development = {str(update): round(value, 4) for update, value in milestones.perplexities.items()}
    return {"best": milestones.best, "last": milestones.last, "development": development}


def _share(value: float | None) -> float | None:
    """Rounded to what a sum's last bits, which hang on how many rows are summed beside it, cannot reach."""
    return None if value is None else round(value, 6)


def _shares(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [round(value, 6) for value in interval]


def _bits(cell: Cell | None) -> float | None:
    return None if cell is None else round(cell.bits_per_byte, 5)


def _rounded(cell: Cell | None) -> float | None:
    return None if cell is None else round(cell.perplexity, 4)
