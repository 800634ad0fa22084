"""A study's search for a recipe: trials on the Transformer-LM alone, of which those that lose early are stopped.

Each trial is measured at rungs, milestones of its training. They are artifacts: no trial trains an update twice,
and a search that was killed is gone through again without training what it had. Trials that diverged are the
exception: they leave nothing, and are trained up to that rung again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from btm_cluster.driver.driver import Driver, step_error
from btm_cluster.driver.port import Failure
from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.errors import UserError
from btm_cluster.evaluation.scoring import by_ref, mean_perplexities, score_requests
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.plan import SearchPlan, SizePlan, TrainingPlan
from btm_cluster.requests import TrainRequest
from btm_cluster.study.repeat import Repeat, import_seed


@dataclass
class _Trial:
    """A recipe that is tried."""

    repeat: Repeat
    label: str
    perplexities: list[float] = field(default_factory=list)
    """On the domains' development text, at each rung so far; infinite where it diverged."""

    @property
    def identity(self) -> str:
        """That of its finished Transformer-LM."""
        return self.repeat.transformer_lm().ref.identity

    def to_next_rung(self, rungs: Sequence[float]) -> TrainRequest:
        """The training from the last rung to the next, which leaves on its way what a whole one leaves."""
        whole = replace(self.repeat.transformer_lm(), label=self.label)
        updates = updates_at(rungs, whole.first_update, whole.last_update)[: len(self.perplexities) + 1]
        end = updates[-1]
        milestones = sorted({*whole.milestones, *updates[:-1]})
        is_seed = end in whole.milestones
        return replace(
            whole.until(end),
            label=self.label,
            role="seed" if is_seed else whole.role,
            milestones=tuple(update for update in milestones if update < end),
            snapshots=tuple(update for update in whole.snapshots if update <= end),
        )

    def row(self, rungs: Sequence[float]) -> dict[str, Any]:
        """The trial as plain values; of one that was stopped, at which share of the training."""
        recipe, last = self.repeat.prepared.plan.training, self.perplexities[-1]
        stopped = {} if len(self.perplexities) == len(rungs) else {"share": rungs[len(self.perplexities) - 1]}
        return {
            "size": self.repeat.size,
            "learning_rate": recipe.learning_rate,
            "development": round(last, 4) if last < math.inf else None,
            "updates": recipe.updates,
            "blocks_per_domain_update": recipe.blocks_per_domain_update,
            **stopped,
        }


def updates_at(rungs: Sequence[float], first: int, last: int) -> list[int]:
    """The updates of rungs, which are shares of a training from update `first` to update `last`."""
    return [first + round(share * (last - first)) for share in rungs]


def by_search(repeat: Repeat, space: SearchPlan, driver: Driver) -> Repeat:
    """The repeat with the recipe whose Transformer-LM has the lowest perplexity on the domains' development text,
    of all that reach the end.

    Raises:
        StepError: a training failed otherwise than by diverging, or no trial reached the end.
    """
    rungs, trials, failures = space.rungs, dict[int, _Trial](), list[Failure]()
    with driver.search(space) as search:
        while under_way := search.under_way():
            for number, settings in sorted(under_way.items()):
                if number not in trials:
                    trials[number] = _drawn(repeat, number, settings)
                    import_seed(trials[number].repeat, driver)
            legs = {number: trials[number].to_next_rung(rungs) for number in under_way}
            measured = _measure(repeat.prepared, list(legs.values()), driver, failures)
            # In an order of no meaning that is always the same: so are all decisions.
            for number in sorted(legs, key=lambda number: trials[number].identity):
                trial, perplexity = trials[number], measured.get(legs[number].ref)
                trial.perplexities.append(math.inf if perplexity is None else perplexity)
                search.tell(number, rungs[len(trial.perplexities) - 1], perplexity)
    return _best([trial for _, trial in sorted(trials.items())], rungs, failures)


def _drawn(repeat: Repeat, number: int, settings: Mapping[str, float]) -> _Trial:
    tried = repeat.by(recipe_of(repeat.prepared.plan.training, settings))
    return _Trial(tried, f"{tried.transformer_lm().label}-{repeat.size}-trial-{number}")


def recipe_of(training: TrainingPlan, settings: Mapping[str, float]) -> TrainingPlan:
    """The recipe with what was drawn, of equal compute."""
    blocks = int(settings.get("blocks_per_domain_update", training.blocks_per_domain_update))
    updates = training.updates * training.blocks_per_domain_update // blocks
    return training.model_copy(update={**settings, "blocks_per_domain_update": blocks, "updates": updates})


def _measure(
    prepared: PreparedPlan, legs: Sequence[TrainRequest], driver: Driver, failures: list[Failure]
) -> dict[Ref, float]:
    """Trains all legs; the perplexity of each that did not diverge. What failed is added to `failures`.

    Raises:
        StepError: one failed otherwise.
    """
    models = {leg.ref: leg.label for leg in legs}
    scores = score_requests(prepared, models, prepared.domains, ["development"])
    outcomes = driver.obtain([*legs, *scores])
    failures += [one for one in outcomes[: len(legs)] if isinstance(one, Failure)]
    if any(isinstance(one, Failure) and not one.has_diverged for one in outcomes):
        raise step_error([one for one in outcomes if isinstance(one, Failure)])
    made = by_ref(outcome for outcome in outcomes if isinstance(outcome, Artifact))
    there = [model for model in models if model in made]
    if not there:
        return {}
    perplexities = mean_perplexities(driver.ledger, there, prepared.domains, made)
    return dict(zip(there, perplexities, strict=True))


def _best(trials: Sequence[_Trial], rungs: Sequence[float], failures: Sequence[Failure]) -> Repeat:
    ends = [trial.perplexities[-1] if len(trial.perplexities) == len(rungs) else math.inf for trial in trials]
    best = ends.index(min(ends))
    if ends[best] == math.inf:
        raise step_error(failures)
    rows = [trial.row(rungs) | {"chosen": number == best} for number, trial in enumerate(trials)]
    return replace(trials[best].repeat, trials=tuple(rows))


def grid_of(space: SearchPlan, training: TrainingPlan) -> list[TrainingPlan]:
    """The recipe with each number of blocks that the search has."""
    blocks = space.blocks_per_domain_update
    return [recipe_of(training, {"blocks_per_domain_update": n}) for n in (blocks.grid if blocks else ())]


def check_search(size: SizePlan, space: SearchPlan) -> None:
    """Refuses a search that would change the compute, or whose rungs are not updates on the way.

    Raises:
        UserError: naming the setting.
    """
    training = size.training
    compute = training.updates * training.blocks_per_domain_update
    for recipe in (training, *grid_of(space, training)):
        count = recipe.blocks_per_domain_update
        if compute % count:
            raise UserError(
                f"study.search: {count} blocks per update cost other compute than {size.name}'s own recipe",
                found=f"{compute:,} blocks of each domain in all, which is no multiple",
                expected="a divisor of that",
                remedy="change `blocks_per_domain_update.grid`",
            )
        first = recipe.seed_updates if size.model.pretrained is not None else 0
        updates = updates_at(space.rungs, first, recipe.updates)
        if len(updates) < 2 or any(after <= before for before, after in pairwise([first, *updates])):
            raise UserError(
                f"study.search: the rungs of {size.name} are not updates between its first and its last",
                found=f"updates {', '.join(map(str, updates))}",
                remedy="change `first_rung` or `reduction_factor`, or give more `updates`",
            )
