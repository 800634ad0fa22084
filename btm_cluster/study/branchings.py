"""Other ways to train a study's experts: their names, and the forests that they make beside the first one."""

from collections.abc import Iterator

from btm_cluster.errors import UserError
from btm_cluster.evaluation.systems import FEW_METHODS, FOREST_OF, GATE, Ensemble
from btm_cluster.plan import BranchingPlan, LoraPlan, StudyPlan
from btm_cluster.requests import TrainRequest
from btm_cluster.study.repeat import Repeat, branches

METHODS = (*FEW_METHODS, GATE)
"""Of each forest beside the first one: of other experts, and of experts stopped early."""
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


def experts_names(study: StudyPlan) -> list[str]:
    """Names of the experts of each of `study.branching`: the part that they train, and every setting that is not the
    usual one. Where scales of their learning rate are tried, the rate is known later, and is among the trials."""
    has_rate = not study.learning_rate_scales
    return [", ".join(_settings(branching, has_rate)) for branching in study.branching]


def _settings(branching: BranchingPlan, has_rate: bool) -> Iterator[str]:
    usual, lora = BranchingPlan(train=branching.train), branching.lora or LoraPlan()
    kinds = {"all": "full experts", "feed-forward": "feed-forward experts"}
    yield kinds.get(branching.train, f"LoRA experts of rank {lora.rank}")
    if lora.alpha != LoraPlan().alpha:
        yield f"alpha {lora.alpha:g}"
    if lora.modules != LoraPlan().modules:
        yield f"on {' and '.join(lora.modules)}"
    if has_rate and branching.learning_rate_scale != usual.learning_rate_scale:
        yield f"at {branching.learning_rate_scale:g} times the rate"
    if branching.optimizer != usual.optimizer:
        yield "with new moments"


def check_branchings(study: StudyPlan) -> None:
    """Refuses ways to train experts that would be one forest under two rows.

    Raises:
        UserError: naming it.
    """
    names = experts_names(study)
    for name in names:
        if names.count(name) > 1:
            expected = "each once; `start` changes nothing, since all experts of a study start from the seed"
            remedy = "write it once"
            if study.learning_rate_scales:
                expected += ", and names leave the learning rate out, since the best scale is taken"
                remedy += ", and further scales in `study.learning_rate_scales`"
            raise UserError(
                f"study.branching: {name} {names.count(name)} times", expected=expected, remedy=remedy
            )
