"""The ensemble of a plan: its forest, mixed as `merging` says, with what was fitted for its texts."""

from collections.abc import Sequence

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedText
from btm_cluster.errors import UserError
from btm_cluster.evaluation.evaluate import planned_ensemble
from btm_cluster.evaluation.fitting import fit_for
from btm_cluster.evaluation.systems import planned_method
from btm_cluster.mixing.fit_file import Fitted
from btm_cluster.operations.evaluate import TAKEN_OUT, check_text_is_known, find_grown
from btm_cluster.plan import Plan
from btm_cluster.steps.mixture import Mixture


def mixture_of_plan(
    plan: Plan,
    driver: Driver,
    target: str | None = None,
    texts: Sequence[str] = (),
    version: int | None = None,
) -> Mixture:
    """A version of the plan's forest, by default the newest, mixed as its `merging` says.

    Its gate is the one that was fitted for the text `target`; without one, for a text of which nothing is
    known. `texts` are others whose gates are wanted. Fits that are missing are made.

    Raises:
        UserError: no forest yet, no such version, or a text that is unknown or was taken out of it.
    """
    for name in (*texts, *([] if target is None else [target])):
        check_text_is_known(plan, name, driver.ledger, version)
    grown = find_grown(plan, driver, version)
    prepared = grown.prepared
    ensemble = planned_ensemble(prepared, grown.forest)
    method = planned_method(prepared.plan.merging, len(ensemble.models))
    known = {text.name: text for text in prepared.texts}

    def fit(name: str | None) -> Fitted:
        text = None if name is None else _standing(known, name)
        return fit_for(prepared, ensemble, text, driver)[method]

    return Mixture(
        grown.forest.version,
        grown.forest.domains,
        dict(ensemble.models),
        prepared.tokenizer,
        plan.training.block_tokens,
        fit(target),
        {name: fit(name) for name in texts},
    )


def _standing(texts: dict[str, PreparedText], name: str) -> PreparedText:
    if name not in texts:
        raise UserError(f"{name!r} was taken out of the forest", remedy=TAKEN_OUT)
    return texts[name]
