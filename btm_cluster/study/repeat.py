"""One repeat of a study, a size and a random seed: its prepared plan, its
requests, and how they are trained."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from btm_cluster.driver.driver import Driver, step_error
from btm_cluster.driver.port import Failure
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import (
    evenly_between,
    expert_request,
    seed_request,
    seed_start,
    transformer_lm_request,
)
from btm_cluster.ledger import Artifact
from btm_cluster.plan import BranchingPlan, TrainingPlan
from btm_cluster.requests import TrainRequest


@dataclass(frozen=True)
class Repeat:
    """One size and random seed."""

    size: str
    prepared: PreparedPlan
    """The prepared plan with that size's model and recipe, and that random seed."""
    seed_shares: tuple[float, ...]
    """Seed shares of all forests; the first is the one that is compared with everything."""
    trials: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)
    """How what was tried for this size did, where this is its first random seed: recipes, and then scales of
    the experts' learning rate."""
    experts: str = ""
    """Name of its experts; empty for those of the first forest, by the plan's `branching`."""
    others: tuple["Repeat", ...] = field(default=(), compare=False)
    """The same with experts that are trained otherwise."""

    @property
    def prepared_by_share(self) -> dict[float, PreparedPlan]:
        """The prepared plan with each seed share."""
        return {share: self._at(share) for share in self.seed_shares}

    @property
    def stops_early(self) -> bool:
        """Whether experts are stopped early too, for a forest more; of the first forest alone."""
        study = self.prepared.plan.study
        return study is not None and "early-stopping" in study.systems and not self.experts

    @property
    def is_from_pretrained(self) -> bool:
        """Whether the seed is a pretrained model, which all systems start from."""
        return self.prepared.pretrained is not None

    @property
    def seeds(self) -> dict[float, TrainRequest]:
        """The seed of each share but 0, at which only a pretrained model is one."""
        return {
            share: seed_request(prepared)
            for share, prepared in self.prepared_by_share.items()
            if share or self.is_from_pretrained
        }

    def transformer_lm(self) -> TrainRequest:
        """The Transformer-LM, which leaves all seeds on its way beside its own milestones; of a pretrained model,
        its continued pretraining."""
        whole = transformer_lm_request(self.prepared, self.seeds[self.seed_shares[0]].ref)
        if self.is_from_pretrained:
            return whole
        return replace(whole, milestones=tuple(sorted(seed.last_update for seed in self.seeds.values())))

    def by(self, training: TrainingPlan) -> "Repeat":
        """The same with another recipe."""
        others = tuple(other.by(training) for other in self.others)
        return replace(self._with({"training": training}), others=others)

    def scaled(self, scale: float) -> "Repeat":
        """The same with another learning rate of the experts."""
        branching = self.prepared.plan.branching
        return self.branching_by(branching.model_copy(update={"learning_rate_scale": scale}))

    def branching_by(self, branching: BranchingPlan) -> "Repeat":
        """The same with another `branching`."""
        return self._with({"branching": branching})

    def _with(self, update: Mapping[str, Any]) -> "Repeat":
        return replace(
            self, prepared=replace(self.prepared, plan=self.prepared.plan.model_copy(update=update))
        )

    def _at(self, seed_share: float) -> PreparedPlan:
        plan = self.prepared.plan
        training = plan.training.model_copy(update={"seed_share": seed_share})
        return replace(self.prepared, plan=plan.model_copy(update={"training": training}))


def branches(repeat: Repeat, texts: Sequence[PreparedText], share: float) -> list[TrainRequest]:
    """An expert on each text, from the seed of that share. Where the study stops experts early, those of the first
    forest leave two snapshots on their way, among which early stopping chooses."""
    prepared, start = repeat.prepared_by_share[share], seed_start(repeat.prepared, repeat.seeds[share].ref)
    # A label of its own, since all of them train at once.
    mark = re.sub(r"[^\w.]+", "-", f"{share} {repeat.experts}".strip())
    requests = [replace(expert_request(prepared, text, start), label=f"{text.name}-{mark}") for text in texts]
    stops_early = repeat.stops_early and share == repeat.seed_shares[0]
    return with_milestones(requests) if stops_early else requests


def with_milestones(requests: Sequence[TrainRequest]) -> list[TrainRequest]:
    """The trainings, which leave two models on their way, evenly between start and end."""
    return [
        replace(request, snapshots=evenly_between(request.first_update, request.last_update))
        for request in requests
    ]


def train(
    repeat: Repeat, requests: Sequence[TrainRequest], driver: Driver, may_diverge: Sequence[TrainRequest] = ()
) -> list[tuple[TrainRequest, Artifact]]:
    """All of them, or a StepError; of those that may diverge, all that did not."""
    import_seed(repeat, driver)
    everything = marked(repeat, [*requests, *may_diverge])
    outcomes = driver.obtain(everything)
    failures = [
        outcome
        for number, outcome in enumerate(outcomes)
        if isinstance(outcome, Failure) and not (outcome.has_diverged and number >= len(requests))
    ]
    if failures:
        raise step_error(failures)
    pairs = zip(everything, outcomes, strict=True)
    return [(request, outcome) for request, outcome in pairs if isinstance(outcome, Artifact)]


def import_seed(repeat: Repeat, driver: Driver) -> None:
    """Imports a pretrained model as the repeat's seed: one for each recipe and random seed, of the same files."""
    if repeat.is_from_pretrained:
        driver.require(list(repeat.seeds.values()))


def marked(repeat: Repeat, requests: Sequence[TrainRequest]) -> list[TrainRequest]:
    """By labels that no other repeat has: attempts, metrics and curves go by them."""
    mark = f"{repeat.size}-{repeat.prepared.plan.training.random_seed}"
    return [replace(request, label=f"{request.label}-{mark}") for request in requests]


def fill_in(repeat: Repeat, seeds: Sequence[TrainRequest], driver: Driver) -> None:
    """Trains the seeds that a Transformer-LM of an earlier run did not leave on its way."""
    missing = sorted(
        (s for s in seeds if driver.ledger.find(s.ref) is None), key=lambda seed: seed.last_update
    )
    if missing:
        train(
            repeat,
            [replace(missing[-1], milestones=tuple(seed.last_update for seed in missing[:-1]))],
            driver,
        )
