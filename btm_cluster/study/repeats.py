"""The repeats of a study: sizes and random seeds, each with the recipe that suits its
Transformer-LM best, and that of its forest."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from btm_cluster.driver.driver import Driver, step_error
from btm_cluster.driver.port import Failure
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.prepared_plan import PreparedPlan, model_config
from btm_cluster.driver.recipes import check_demix_fits
from btm_cluster.driver.text_requests import vocabulary_of
from btm_cluster.errors import UserError
from btm_cluster.evaluation.scoring import mean_perplexities, score_models, stack_of
from btm_cluster.language_model.deltas import trains_of
from btm_cluster.language_model.mixture_of_experts import check_target
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.mixing.fitting import cross_fitted_perplexity, each_in_one_thread
from btm_cluster.plan import Plan, SizePlan, StudyPlan, TrainingPlan
from btm_cluster.requests import TrainRequest
from btm_cluster.study.branchings import experts_names
from btm_cluster.study.checks import check_founders, check_study, recipes_of, sizes_of
from btm_cluster.study.controls import DEMIXES
from btm_cluster.study.repeat import Repeat, branches, fill_in, import_seed, marked, train
from btm_cluster.study.search import by_search


def repeats_of(plan: Plan, driver: Driver) -> list[Repeat]:
    """Every size with every random seed; texts and tokenizer are prepared once
    for all, and recipes are tried."""
    study = plan.study
    assert study is not None
    sizes = sizes_of(plan, study)
    check_study(plan, study, sizes)
    if study.search is not None:
        driver.check_search()
    check_founders(plan, driver.ledger.log.newest())
    models = {size.name: _model(plan, study, size) for size in sizes}
    base = prepare(_variant(plan, sizes[0], study.random_seeds[0]), driver)
    for text in base.texts:
        if not text.tokens["development"]:
            raise UserError(
                f"the text {text.name!r} has no development text",
                expected="some, since a study fits and chooses on it",
                remedy="name `development` files for it, or raise `reading.development_share`",
            )
    repeats = []
    for number, size in enumerate(sizes):
        variant = _variant(plan, size, study.random_seeds[0])
        prepared = replace(base, model=models[size.name], plan=variant)
        first = Repeat(size.name, prepared, _seed_shares(study, size, is_first=number == 0))
        first = _by_the_best(first, recipes_of(size, study), driver)
        if study.search is not None:
            first = by_search(first, study.search, driver)
        first = _with_best_scales(first, study, driver)
        repeats.append(first)
        for random_seed in study.random_seeds[1:]:
            training = first.prepared.plan.training.model_copy(update={"random_seed": random_seed})
            again = replace(first, seed_shares=_seed_shares(study, size, is_first=False), trials=())
            repeats.append(again.by(training))
    return repeats


def _model(plan: Plan, study: StudyPlan, size: SizePlan) -> Mapping[str, Any]:
    """The configuration of a size, of which all that the study asks for can be made: before a text is read.

    Raises:
        UserError: naming what cannot be made of it.
    """
    model, _ = model_config(_variant(plan, size, 0), vocabulary_of(plan))
    for branching in study.branching:
        trains_of(branching, model)
    if "mixture-of-experts" in study.systems:
        check_target(model)
    if any(system in DEMIXES for system in study.systems):
        check_demix_fits(_variant(plan, size, 0), model, len(plan.domains))
    return model


def _variant(plan: Plan, size: SizePlan, random_seed: int) -> Plan:
    training = size.training.model_copy(update={"random_seed": random_seed})
    return plan.model_copy(update={"model": size.model, "training": training})


def _seed_shares(study: StudyPlan, size: SizePlan, is_first: bool) -> tuple[float, ...]:
    own = size.training.seed_share
    return (own, *(share for share in sorted(study.seed_shares) if share != own)) if is_first else (own,)


def _by_the_best(repeat: Repeat, recipes: Sequence[TrainingPlan], driver: Driver) -> Repeat:
    """The repeat with the recipe whose Transformer-LM has the lowest
    perplexity on the domains' development text.

    A recipe that diverges is out of the running; whatever else fails, fails the study.

    Raises:
        StepError: a trial failed, or all of them diverged.
    """
    if not recipes:
        return repeat
    random_seed = repeat.prepared.plan.training.random_seed
    tried = [repeat.by(recipe.model_copy(update={"random_seed": random_seed})) for recipe in recipes]
    for one in tried:
        import_seed(one, driver)
    wholes = [one.transformer_lm() for one in tried]
    # Labels of their own, since all of them train at once.
    called = [
        replace(whole, label=f"{whole.label}-{repeat.size}-trial-{number}")
        for number, whole in enumerate(wholes, 1)
    ]
    trained, failures = _that_converged([[request] for request in called], driver)
    if not any(trained):
        raise step_error(failures)
    models = {model: name for one in trained for model, name in one.items()}
    found = dict(zip(models, _development_perplexities(repeat.prepared, models, driver), strict=True))
    perplexities = [found.get(whole.ref, math.inf) for whole in wholes]
    best = perplexities.index(min(perplexities))
    recipe_rows = _rows(repeat, [recipe.learning_rate for recipe in recipes], perplexities, "learning_rate")
    rows = [
        row | {"updates": recipe.updates, "blocks_per_domain_update": recipe.blocks_per_domain_update}
        for row, recipe in zip(recipe_rows, recipes, strict=True)
    ]
    return replace(tried[best], trials=tuple(rows))


def _with_best_scales(repeat: Repeat, study: StudyPlan, driver: Driver) -> Repeat:
    """The repeat, and others that branch as `study.branching` says, each with the scale of its experts' learning rate
    that suits it best. Others of which an expert diverges under each scale are left out, and are among the trials.

    Raises:
        StepError: an expert failed otherwise than by diverging, or one of the repeat's own diverged under each scale.
    """
    named = zip(study.branching, experts_names(study), strict=True)
    others = [
        replace(repeat.branching_by(branching), experts=name, others=(), trials=())
        for branching, name in named
    ]
    if not study.learning_rate_scales:
        return replace(repeat, others=tuple(others))
    scales = [1.0, *(branching.learning_rate_scale for branching in study.branching)]
    by_scale = [
        [one.scaled(scale * factor) for factor in study.learning_rate_scales]
        for one, scale in zip([repeat, *others], scales, strict=True)
    ]
    (own, *of_others), diverged = _try_all(by_scale, driver)
    best = _best_of(own)
    if best is None:
        raise step_error(diverged)
    found = (_best_of(tried) for tried in of_others)
    rows = [row for tried in (own, *of_others) for row in _scale_rows(tried)]
    return replace(best, others=tuple(one for one in found if one), trials=(*repeat.trials, *rows))


Tried: TypeAlias = Sequence[tuple[Repeat, float]]
"""A repeat with each scale, and its forest's perplexity; infinite where an expert diverged."""


def _best_of(tried: Tried) -> Repeat | None:
    """That of the lowest perplexity; None where experts diverged under each scale."""
    best, perplexity = min(tried, key=lambda one: one[1])
    return best if perplexity < math.inf else None


def _scale_rows(tried: Tried) -> list[dict[str, Any]]:
    scales = [one.prepared.plan.branching.learning_rate_scale for one, _ in tried]
    return _rows(tried[0][0], scales, [perplexity for _, perplexity in tried], "learning_rate_scale")


def _try_all(by_scale: Sequence[Sequence[Repeat]], driver: Driver) -> tuple[list[Tried], list[Failure]]:
    """Repeats with each of their scales, and the perplexity of their experts, mixed as planned, on the domains'
    development text; and what diverged of the first. All of them train at once.

    Fitted on one half of a text's blocks and measured on the other, both ways.

    Raises:
        StepError: an expert failed otherwise than by diverging.
    """
    repeat = by_scale[0][0]
    prepared, share = repeat.prepared, repeat.seed_shares[0]
    train(repeat, [repeat.transformer_lm()], driver)
    fill_in(repeat, list(repeat.seeds.values()), driver)
    asked = [
        [_trial(one, request) for request in branches(one, prepared.domains, share)]
        for scaled in by_scale
        for one in scaled
    ]
    converged, failures = _that_converged(asked, driver)
    models = {ref: label for experts in converged for ref, label in experts.items()}
    scores = score_models(prepared, models, prepared.domains, driver, ["development"])
    perplexities = iter(
        [
            _ensemble_perplexity(prepared, [*experts], scores, driver) if experts else math.inf
            for experts in converged
        ]
    )
    of_first = {request.label for requests in asked[: len(by_scale[0])] for request in requests}
    tried: list[Tried] = [[(one, next(perplexities)) for one in scaled] for scaled in by_scale]
    diverged = {failure.label: failure for failure in failures if failure.label in of_first}
    return tried, [*diverged.values()]


def _trial(repeat: Repeat, request: TrainRequest) -> TrainRequest:
    """The training of an expert, labelled by its scale."""
    scale = repeat.prepared.plan.branching.learning_rate_scale
    (labelled,) = marked(repeat, [replace(request, label=f"{request.label}-scale-{scale:g}")])
    return labelled


def _rows(
    repeat: Repeat, values: Sequence[float], perplexities: Sequence[float], what: str
) -> list[dict[str, Any]]:
    best = perplexities.index(min(perplexities))
    return [
        {
            "size": repeat.size,
            **({"experts": repeat.experts} if repeat.experts else {}),
            what: value,
            "development": round(perplexity, 4) if perplexity < math.inf else None,
            "chosen": number == best and perplexity < math.inf,
        }
        for number, (value, perplexity) in enumerate(zip(values, perplexities, strict=True))
    ]


def _that_converged(
    tried: Sequence[Sequence[TrainRequest]], driver: Driver
) -> tuple[list[dict[Ref, str]], list[Failure]]:
    """The models of each that was tried, by name, all trained at once; none where one of them diverged. And what
    diverged.

    Raises:
        StepError: one failed otherwise.
    """
    outcomes = driver.obtain([request for one in tried for request in one])
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    made = {outcome.ref for outcome in outcomes if isinstance(outcome, Artifact)}
    models = [{request.ref: request.label for request in one} for one in tried]
    if not all(failure.has_diverged for failure in failures):
        raise step_error(failures)
    return [one if made.issuperset(one) else {} for one in models], failures


def _ensemble_perplexity(
    prepared: PreparedPlan, experts: Sequence[Ref], scores: Mapping[Ref, Artifact], driver: Driver
) -> float:
    """Mean over domains, on development text, of the ensemble as the plan mixes it."""
    texts, merging = {text.name: text for text in prepared.domains}, prepared.plan.merging

    def perplexity(name: str) -> float:
        stack = stack_of(driver.ledger, experts, texts[name], "development", scores)
        return cross_fitted_perplexity(*stack.take(0, merging.development_blocks), merging)

    return sum(each_in_one_thread(perplexity, list(texts))) / len(texts)


def _development_perplexities(
    prepared: PreparedPlan, models: Mapping[Ref, str], driver: Driver
) -> list[float]:
    """Each model's mean over domains."""
    scores = score_models(prepared, models, prepared.domains, driver, ["development"])
    return mean_perplexities(driver.ledger, list(models), prepared.domains, scores)
