"""Other ways to train a study's experts: what these are called, and the forests that they make beside the first one."""

from collections.abc import Iterator, Sequence

from btm_cluster.errors import UserError
from btm_cluster.evaluation.systems import FEW_METHODS, FOREST_OF, GATE, Ensemble
from btm_cluster.plan import BranchingPlan, LoraPlan
from btm_cluster.requests import TrainRequest
from btm_cluster.study.repeat import Repeat, branches

METHODS = (*FEW_METHODS, GATE)
AVERAGES = ("uniform", "fitted")


def experts_of(repeat: Repeat) -> list[TrainRequest]:
    """An expert on each domain, from the seed of the first forest."""
    return branches(repeat, repeat.prepared.domains, repeat.seed_shares[0])


def forest_of(repeat: Repeat) -> Ensemble:
    """The forest of these experts."""
    domains, share = repeat.prepared.domains, repeat.seed_shares[0]
    models = tuple((d.name, expert.ref) for d, expert in zip(domains, experts_of(repeat), strict=True))
    name, seed = FOREST_OF + repeat.experts, repeat.seeds[share].ref
    return Ensemble(name, models, METHODS, AVERAGES, seed, share, shows_experts=True)


def experts_name(branching: BranchingPlan) -> str:
    """What experts are called that are trained so: what they train, and every setting that is not the usual one."""
    return ", ".join(_settings(branching))


def _settings(branching: BranchingPlan) -> Iterator[str]:
    usual, lora = BranchingPlan(train=branching.train), branching.lora or LoraPlan()
    kinds = {"all": "full experts", "feed-forward": "feed-forward experts"}
    yield kinds.get(branching.train, f"LoRA experts of rank {lora.rank}")
    if lora.alpha != LoraPlan().alpha:
        yield f"alpha {lora.alpha:g}"
    if lora.modules != LoraPlan().modules:
        yield f"on {' and '.join(lora.modules)}"
    if branching.learning_rate_scale != usual.learning_rate_scale:
        yield f"at {branching.learning_rate_scale:g} times the rate"
    if branching.optimizer != usual.optimizer:
        yield "with new moments"


def check_branchings(wanted: Sequence[BranchingPlan]) -> None:
    """Refuses ways to train experts that would be one forest under two rows.

    Raises:
        UserError: naming it.
    """
    names = [experts_name(one) for one in wanted]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"study.branching: {name} {names.count(name)} times",
                expected="each once; `start` changes nothing, since all experts of a study start from the seed",
                remedy="write it once",
            )
