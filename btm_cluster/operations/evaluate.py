"""`btm evaluate`: the forest as it stands, on the text of all its domains and of the plan's targets."""

from btm_cluster.algorithm import Grown
from btm_cluster.driver.driver import Driver, find_made
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import demix_request, seed_request, transformer_lm_request
from btm_cluster.errors import UserError
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.versions import version_of
from btm_cluster.operations.run import Run, blocks_of_forest, check_forests_clusters, evaluated
from btm_cluster.plan import Plan

TAKEN_OUT = "name another text, or bring it back with `btm forest remove DOMAIN --undo`"


def evaluate_forest(plan: Plan, driver: Driver, version: int | None = None) -> Run:
    """Evaluates a version of the forest, by default the newest. Trains nothing.

    Raises:
        UserError: there is no forest yet, no such version, or it has no expert, or `merging.clusters` does
        not fit the domains.
    """
    return evaluated(plan, find_grown(plan, driver, version), driver)


def find_grown(plan: Plan, driver: Driver, version: int | None = None) -> Grown:
    """A version of the forest, by default the newest, with the plan's texts prepared, and
    those of its domains that the plan does not name.

    Raises:
        UserError: there is none yet, no such version, or it has no expert.
    """
    check_forests_clusters(plan, driver.ledger)
    forest = version_of(driver.ledger, version)
    if not forest.experts:
        raise UserError(
            f"forest version {forest.version} in {plan.store} has no expert",
            found=forest.reason,
            remedy="`btm run` trains the plan's domains; `btm forest remove DOMAIN --undo` brings back what "
            "was taken out",
        )
    prepared = prepare(plan, driver)
    seed = seed_request(prepared).ref
    prepared = blocks_of_forest(prepared, forest, driver)
    baseline = transformer_lm_request(prepared, seed)
    wanted = "transformer-lm" in plan.baselines and find_made([baseline], driver.ledger) != [None]
    demix = demix_request(prepared)
    has_demix = "demix" in plan.baselines and driver.ledger.find(demix.ref) is not None
    parts = tuple(part.ref for part in demix.parts) if has_demix else ()
    return Grown(prepared, forest, baseline.ref if wanted else None, (), parts)


def check_text_is_known(plan: Plan, name: str, ledger: Ledger, version: int | None = None) -> None:
    """Refuses a text that neither the plan nor the forest version has, before anything is read or started.

    Raises:
        UserError: naming the texts that there are.
    """
    forest = ledger.log.newest() if version is None else version_of(ledger, version)
    known = dict.fromkeys(
        [*(text.name for text in plan.texts), *(forest.domains if forest is not None else ())]
    )
    if name not in known:
        raise UserError(
            "there is no such text in the plan or the forest",
            found=name,
            expected=f"one of {', '.join(known)}",
        )
