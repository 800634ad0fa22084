"""What a study repeats: sizes and random seeds, each with the recipe that its Transformer-LM does best with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from btm_cluster.algorithm import prepare, resumed
from btm_cluster.driver import Driver, step_error
from btm_cluster.errors import UserError
from btm_cluster.evaluation import score_models, stack_of
from btm_cluster.ground import Ground, model_config, vocabulary_of
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.plan import Plan, SizePlan, StudyPlan, TrainingPlan
from btm_cluster.recipes import check_demix_fits, seed_request, transformer_lm_request
from btm_cluster.requests import TrainRequest
from btm_cluster.study.controls import DEMIXES
from btm_cluster.workers import Failure


@dataclass(frozen=True)
class Repeat:
    """One size and random seed."""

    size: str
    ground: Ground
    """Of a plan with that size's model and recipe, and that random seed."""
    seed_shares: tuple[float, ...]
    """Of all forests; the first is the one that is compared with everything."""
    trials: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)
    """How the recipes tried for this size did, where this is its first random seed."""

    @property
    def grounds(self) -> dict[float, Ground]:
        """The ground with each seed share."""
        return {share: self._at(share) for share in self.seed_shares}

    @property
    def seeds(self) -> dict[float, TrainRequest]:
        """The seed of each share but 0."""
        return {share: seed_request(ground) for share, ground in self.grounds.items() if share}

    def transformer_lm(self) -> TrainRequest:
        """The Transformer-LM, which leaves all seeds on its way."""
        whole = transformer_lm_request(self.ground, self.seeds[self.seed_shares[0]].ref)
        return replace(whole, milestones=tuple(sorted(seed.last_update for seed in self.seeds.values())))

    def by(self, training: TrainingPlan) -> "Repeat":
        """The same with another recipe."""
        plan = self.ground.plan.model_copy(update={"training": training})
        return replace(self, ground=replace(self.ground, plan=plan))

    def _at(self, seed_share: float) -> Ground:
        plan = self.ground.plan
        training = plan.training.model_copy(update={"seed_share": seed_share})
        return replace(self.ground, plan=plan.model_copy(update={"training": training}))


def repeats_of(plan: Plan, driver: Driver) -> list[Repeat]:
    """Every size with every random seed; texts and tokenizer are prepared once for all, and recipes are tried."""
    study = plan.study
    assert study is not None
    sizes = study.sizes or (SizePlan.model_construct(name="model", model=plan.model, training=plan.training),)
    _check(plan, study, sizes)
    base = prepare(_variant(plan, sizes[0], study.random_seeds[0]), driver)
    for text in base.texts:
        if not text.tokens["development"]:
            raise UserError(
                f"the text {text.name!r} has no development text",
                expected="some, since a study fits and chooses on it",
                remedy="name `development` files for it",
            )
    grounds = {}
    for size in sizes:
        model, _ = model_config(_variant(plan, size, 0), vocabulary_of(plan))
        if any(system in DEMIXES for system in study.systems):
            check_demix_fits(plan, model, len(plan.domains))
        grounds[size.name] = replace(base, model=model)
    repeats = []
    for number, size in enumerate(sizes):
        ground = replace(grounds[size.name], plan=_variant(plan, size, study.random_seeds[0]))
        first = Repeat(size.name, ground, _seed_shares(study, size, is_first=number == 0))
        first = _by_the_best(first, _recipes(size, study), driver)
        repeats.append(first)
        for random_seed in study.random_seeds[1:]:
            training = first.ground.plan.training.model_copy(update={"random_seed": random_seed})
            again = replace(first, seed_shares=_seed_shares(study, size, is_first=False), trials=())
            repeats.append(again.by(training))
    return repeats


def _check(plan: Plan, study: StudyPlan, sizes: Sequence[SizePlan]) -> None:
    """That nothing in a study is at odds with itself: before a text is read."""
    if plan.model.pretrained is not None and not study.sizes:
        raise UserError(
            "a study grows its own seeds", found="model.pretrained", remedy="give `study.sizes` with shapes"
        )
    for size in sizes:
        if size.training.block_tokens != plan.training.block_tokens:
            raise UserError(
                f"study.sizes: {size.name} has blocks of another length",
                found=f"{size.training.block_tokens} tokens",
                expected=f"{plan.training.block_tokens}, the plan's: texts are cut into blocks once for all sizes",
                remedy="give the same training.block_tokens",
            )
        for recipe in (size.training, *_recipes(size, study)):
            for share in (recipe.seed_share, *study.seed_shares):
                _check_share(size.name, recipe, share)
            if _blocks(recipe) != _blocks(size.training):
                raise UserError(
                    f"study.trials: a recipe for {size.name} costs other compute than the size's own",
                    found=f"{recipe.updates} updates of {recipe.blocks_per_domain_update} blocks per domain",
                    expected=f"updates × blocks_per_domain_update = {_blocks(size.training)}",
                    remedy="give both, so that their product stays the same",
                )


def _blocks(training: TrainingPlan) -> int:
    return training.updates * training.blocks_per_domain_update


def _variant(plan: Plan, size: SizePlan, random_seed: int) -> Plan:
    training = size.training.model_copy(update={"random_seed": random_seed})
    return plan.model_copy(update={"model": size.model, "training": training})


def _seed_shares(study: StudyPlan, size: SizePlan, is_first: bool) -> tuple[float, ...]:
    own = size.training.seed_share
    return (own, *(share for share in sorted(study.seed_shares) if share != own)) if is_first else (own,)


def _check_share(size: str, training: TrainingPlan, share: float) -> None:
    updates = training.updates
    is_without_seed = share == 0 and share != training.seed_share
    if not is_without_seed and not 0 < round(share * updates) < updates:
        raise UserError(
            f"a seed share of {share} leaves the seed or the experts of {size} no update",
            found=f"{round(share * updates)} of {updates} updates for the seed",
            remedy="choose a share between, or more updates; `study.seed_shares` alone may hold 0",
        )


def _recipes(size: SizePlan, study: StudyPlan) -> list[TrainingPlan]:
    """The size's own recipe as each trial changes it."""
    return [size.training.model_copy(update=trial.model_dump(exclude_none=True)) for trial in study.trials]


def _by_the_best(repeat: Repeat, recipes: Sequence[TrainingPlan], driver: Driver) -> Repeat:
    """The repeat with the recipe whose Transformer-LM has the lowest perplexity on the domains' development text.

    A recipe that diverges is out of the running; whatever else fails, fails the study.

    Raises:
        StepError: a trial failed, or all of them diverged.
    """
    if not recipes:
        return repeat
    random_seed = repeat.ground.plan.training.random_seed
    tried = [repeat.by(recipe.model_copy(update={"random_seed": random_seed})) for recipe in recipes]
    wholes = [one.transformer_lm() for one in tried]
    # Labels of their own, since all of them train at once.
    called = [
        replace(whole, label=f"{whole.label}-{repeat.size}-trial-{number}") for number, whole in enumerate(wholes, 1)
    ]
    outcomes = driver.obtain(driver.workers.train, [resumed(request, driver.ledger) for request in called])
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if len(failures) == len(outcomes) or not all(failure.has_diverged for failure in failures):
        raise step_error(failures)
    trained = [outcome.ref for outcome in outcomes if isinstance(outcome, Artifact)]
    found = dict(zip(trained, _development_perplexities(repeat.ground, trained, driver), strict=True))
    perplexities = [found.get(whole.ref, math.inf) for whole in wholes]
    best = perplexities.index(min(perplexities))
    rows = [
        {
            "size": repeat.size,
            "learning_rate": recipe.learning_rate,
            "updates": recipe.updates,
            "blocks_per_domain_update": recipe.blocks_per_domain_update,
            "development": round(perplexity, 4) if perplexity < math.inf else None,
            "chosen": number == best,
        }
        for number, (recipe, perplexity) in enumerate(zip(recipes, perplexities, strict=True))
    ]
    return replace(tried[best], trials=tuple(rows))


def _development_perplexities(ground: Ground, models: Sequence[Ref], driver: Driver) -> list[float]:
    """Each model's mean over domains."""
    pairs = [(model, text) for model in models for text in ground.domains]
    scores = score_models(ground, pairs, driver, ["development"])
    totals = [0.0] * len(models)
    for text in ground.domains:
        stack = stack_of(driver.ledger, scores, models, text, "development")
        perplexities = (-stack.sums().sum(1) / stack.tokens().sum()).exp()
        totals = [total + one for total, one in zip(totals, perplexities.tolist(), strict=True)]
    return [total / len(ground.domains) for total in totals]
