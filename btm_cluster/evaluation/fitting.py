"""How an ensemble is mixed and averaged for a text: the requests for fits,
mixtures, searches and averages."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import expert_resources
from btm_cluster.equations.averaging import uniform_weights
from btm_cluster.evaluation.scoring import score_requests, scored_split
from btm_cluster.evaluation.systems import FITTED_FOR_ALL, Ensemble
from btm_cluster.ledger import Ref
from btm_cluster.mixing.fit_file import Fitted, open_fits
from btm_cluster.plan import MergingPlan
from btm_cluster.requests import (
    AverageRequest,
    FitForAll,
    FittedWeights,
    FitText,
    MixingMethod,
    MixText,
    ScoredSplit,
    ScoreRequest,
    SoupRequest,
    Start,
)

SEARCHES = ("greedy", "learned")
"""Averages whose weights are searched on the averaged model's own loss, greedily or by gradient."""
SOUP_BLOCKS_AT_ONCE = 8
"""Blocks per forward pass: searches share a GPU, and logits with their
gradients take far more memory than small models."""


def for_all_requests(
    prepared: PreparedPlan, ensemble: Ensemble, text: PreparedText | None
) -> list[FitForAll]:
    """The settings for all texts that a text's fits rest on: all that there are,
    where it has no development text."""
    has_its_own = text is not None and bool(text.tokens["development"])
    needed = {
        method.posterior
        for method in ensemble.methods
        if method.is_for_all or method.posterior == "gate" or not has_its_own
    }
    domains = [domain for domain in prepared.domains if domain.tokens["development"]]
    scored = tuple(scored_split(ensemble.refs, domain, "development") for domain in domains)
    return [
        FitForAll(
            f"{posterior} for all texts under {ensemble.name}", posterior, scored, prepared.plan.merging
        )
        for posterior in FITTED_FOR_ALL
        if posterior in needed
    ]


def fit_request(prepared: PreparedPlan, ensemble: Ensemble, text: PreparedText | None) -> FitText:
    """The fit of all methods of an ensemble for a text; for one of which nothing is known, without a text."""
    scored = ScoredSplit((), ()) if text is None else scored_split(ensemble.refs, text, "development")
    for_all = tuple(request.ref for request in for_all_requests(prepared, ensemble, text))
    label = f"mixture for {text.name if text else 'any text'} under {ensemble.name}"
    return FitText(label, ensemble.refs, scored, ensemble.methods, for_all, prepared.plan.merging)


def mix_request(prepared: PreparedPlan, ensemble: Ensemble, text: PreparedText, split: str) -> MixText:
    """The mixture of an ensemble's scores on a split, by all of its methods."""
    fit = fit_request(prepared, ensemble, text).ref
    return MixText(f"{text.name} under {ensemble.name}", fit, scored_split(ensemble.refs, text, split))


def weights_request(prepared: PreparedPlan, ensemble: Ensemble, text: PreparedText) -> FitText:
    """The fit of the priors alone, by which averages for a text are weighted.

    It does not hang on how a plan mixes.
    """
    fit = fit_request(prepared, replace(ensemble, methods=weight_methods(prepared.plan.merging)), text)
    return replace(fit, label=f"weights for {text.name} under {ensemble.name}")


def weight_methods(merging: MergingPlan) -> tuple[MixingMethod, ...]:
    """Every prior that weighs an average: the paper's, the fitted one, and the plan's."""
    return tuple(
        MixingMethod("none", prior) for prior in dict.fromkeys(("fitted", "ema", merging.average_prior))
    )


def average_request(
    prepared: PreparedPlan, ensemble: Ensemble, weights: str, text: PreparedText | None
) -> AverageRequest:
    """An average of an ensemble's models: `uniform`, or for a text by one of
    its priors, `argmax`, or a search."""
    is_unrelated = ensemble.seed is None
    if text is None:
        assert weights == "uniform", weights
        return uniform_request(ensemble.refs, is_unrelated, f"uniform{ensemble.of_which}")
    fit = (
        soup_request(prepared, ensemble, weights, text)
        if weights in SEARCHES
        else weights_request(prepared, ensemble, text)
    )
    fitted = FittedWeights(fit.ref, weights)
    label = f"{weights} for {text.name}{ensemble.of_which}"
    return AverageRequest(label, ensemble.refs, fitted, is_unrelated)


def uniform_request(
    models: tuple[Ref, ...], unrelated: bool = False, label: str = "uniform"
) -> AverageRequest:
    """The average in which every model has the same weight."""
    return AverageRequest(label, models, tuple(uniform_weights(len(models))), unrelated)


def weight_requests(
    prepared: PreparedPlan, ensemble: Ensemble, weights: str, text: PreparedText | None
) -> list[FitText | FitForAll | SoupRequest]:
    """The fit or the search that an average's weights come from, with what these rest on beside scores."""
    if text is None:
        return []
    requests: list[FitText | FitForAll | SoupRequest] = []
    if weights != "greedy":
        of_weights = replace(ensemble, methods=weight_methods(prepared.plan.merging))
        requests += [*for_all_requests(prepared, of_weights, text), weights_request(prepared, ensemble, text)]
    return [*requests, soup_request(prepared, ensemble, weights, text)] if weights in SEARCHES else requests


def fit_requests(
    prepared: PreparedPlan, ensemble: Ensemble, text: PreparedText | None
) -> list[FitText | FitForAll]:
    """The fit of an ensemble's methods for a text, last, and the settings for all texts that it rests on."""
    return [*for_all_requests(prepared, ensemble, text), fit_request(prepared, ensemble, text)]


def scores_for(prepared: PreparedPlan, ensemble: Ensemble, text: PreparedText | None) -> list[ScoreRequest]:
    """The scores that the fit of an ensemble's methods for a text rests on."""
    texts = [text] if text is not None else []
    if for_all_requests(prepared, ensemble, text):
        texts += [domain for domain in prepared.domains if domain != text]
    return score_requests(prepared, ensemble.names, texts, ["development"])


def fit_for(
    prepared: PreparedPlan, ensemble: Ensemble, text: PreparedText | None, driver: Driver
) -> dict[MixingMethod, Fitted]:
    """The fits of an ensemble's methods for a text, made where they are not there yet."""
    driver.require([*scores_for(prepared, ensemble, text), *fit_requests(prepared, ensemble, text)])
    return open_fits(driver.ledger, driver.ledger.get(fit_request(prepared, ensemble, text).ref))


def soup_request(
    prepared: PreparedPlan, ensemble: Ensemble, strategy: str, text: PreparedText
) -> SoupRequest:
    """The search for a text's own average, on as many development blocks as its prior sees."""
    how = expert_resources(prepared.plan)
    is_learned = strategy == "learned"
    starts = (FittedWeights(weights_request(prepared, ensemble, text).ref, "fitted"),) if is_learned else ()
    return SoupRequest(
        f"{strategy} soup for {text.name}",
        cast(Literal["greedy", "learned"], strategy),
        ensemble.refs,
        text.tokens["development"],
        prepared.plan.merging.development_blocks,
        starts,
        replace(how, micro_batch_blocks=min(SOUP_BLOCKS_AT_ONCE, how.blocks_at_once)),
    )


def averaged_starts(
    prepared: PreparedPlan, experts: Ensemble, new: Sequence[PreparedText], driver: Driver
) -> list[Start]:
    """The average of the forest's experts for each new domain, by its posterior on
    the domain's text or uniformly."""
    if prepared.plan.branching.start == "uniform":
        averages = [average_request(prepared, experts, "uniform", None)] * len(new)
        driver.require(averages[:1])
    else:
        prior = prepared.plan.merging.average_prior
        averages = [average_request(prepared, experts, prior, domain) for domain in new]
        fits = [fit for domain in new for fit in weight_requests(prepared, experts, prior, domain)]
        driver.require([*score_requests(prepared, experts.names, new, ["development"]), *fits, *averages])
    return [Start(average.ref, keep_optimizer=False) for average in averages]
