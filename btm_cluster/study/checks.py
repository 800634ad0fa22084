"""Checks of a study before a text is read: settings that are at odds with each other are refused."""

from collections.abc import Sequence

from btm_cluster.errors import UserError
from btm_cluster.forest import Forest
from btm_cluster.plan import GrowthPlan, Plan, SizePlan, StudyPlan, TrainingPlan
from btm_cluster.study.branchings import check_branchings
from btm_cluster.study.pretrained import check_beside_pretrained
from btm_cluster.study.search import check_search, grid_of


def sizes_of(plan: Plan, study: StudyPlan) -> Sequence[SizePlan]:
    """The sizes of a study; without any, the plan's own model and recipe."""
    own = SizePlan.model_construct(name="model", model=plan.model, training=plan.training)
    return study.sizes or (own,)


def check_study(plan: Plan, study: StudyPlan, sizes: Sequence[SizePlan]) -> None:
    """That nothing in a study is at odds with itself: before a text is read."""
    check_branchings(study)
    _check_growth(plan, study.growth)
    if plan.model.pretrained is not None and not study.sizes:
        check_beside_pretrained(study)
    for size in sizes:
        if size.training.block_tokens != plan.training.block_tokens:
            raise UserError(
                f"study.sizes: {size.name} has blocks of another length",
                found=f"{size.training.block_tokens} tokens",
                expected=f"{plan.training.block_tokens}, the plan's: texts are cut into blocks once for all "
                "sizes",
                remedy=f"write `block_tokens: {plan.training.block_tokens}` in its `training`",
            )
        searched = []
        if study.search is not None:
            check_search(size, study.search)
            searched = grid_of(study.search, size.training)
        for recipe in (size.training, *recipes_of(size, study), *searched):
            for share in (recipe.seed_share, *study.seed_shares):
                _check_share(size, recipe, share)
            if _blocks(recipe) != _blocks(size.training):
                raise UserError(
                    f"study.trials: a recipe for {size.name} costs other compute than the size's own",
                    found=f"{recipe.updates} updates of {recipe.blocks_per_domain_update} blocks per domain",
                    expected=f"updates × blocks_per_domain_update = {_blocks(size.training)}",
                    remedy="give the trial `updates` and `blocks_per_domain_update` of the same product",
                )


def check_founders(plan: Plan, forest: Forest | None) -> None:
    """That all systems learn from the same domains: Transformer-LM and DEMix from
    those that the store's forest was founded on."""
    if forest is None:
        return
    founders, studied = (
        {name for name, _ in forest.foundation.domains},
        {domain.name for domain in plan.domains},
    )
    if studied - {*forest.withdrawn} != founders:
        raise UserError(
            "a study compares what learned from the same domains",
            found=f"{', '.join(sorted(studied - {*forest.withdrawn}))}; the store's forest was founded on "
            + ", ".join(sorted(founders)),
            remedy="give the study a `store` of its own, or just the founding domains",
        )


def _check_share(size: SizePlan, training: TrainingPlan, share: float) -> None:
    updates = training.updates
    is_without_seed = share == 0 and (share != training.seed_share or size.model.pretrained is not None)
    if not is_without_seed and not 0 < round(share * updates) < updates:
        raise UserError(
            f"a seed share of {share} leaves the seed or the experts of {size.name} no update",
            found=f"{round(share * updates)} of {updates} updates for the seed",
            remedy="change `training.seed_share` or `study.seed_shares`, which alone may hold 0, or give "
            "more `updates`",
        )


def recipes_of(size: SizePlan, study: StudyPlan) -> list[TrainingPlan]:
    """The size's own recipe as each trial changes it."""
    return [size.training.model_copy(update=trial.model_dump(exclude_none=True)) for trial in study.trials]


def _blocks(training: TrainingPlan) -> int:
    return training.updates * training.blocks_per_domain_update


def _check_growth(plan: Plan, growth: GrowthPlan | None) -> None:
    """Refuses a growth of no step, or one that takes out what is not there.

    Raises:
        UserError: naming it.
    """
    if growth is None:
        return
    names = [domain.name for domain in plan.domains]
    if growth.founders >= len(names):
        raise UserError(
            "study.growth.founders leaves no domain to add",
            found=f"{growth.founders} of {len(names)} domains",
            remedy="lower it, or name more `domains`",
        )
    strangers = sorted({*growth.remove} - {*names})
    if strangers or len(growth.remove) > len(names) - 2:
        raise UserError(
            "study.growth.remove takes out what a forest cannot spare",
            found=", ".join(strangers or growth.remove),
            expected=f"some of {', '.join(names)}, so that two are left",
            remedy="correct it",
        )
