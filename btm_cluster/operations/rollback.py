"""`btm forest rollback`: a new version that is equal to an old one."""

from btm_cluster.forest import Forest, roll_back
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.ledger.versions import append_next, version_of


def rollback(ledger: Ledger, version: int) -> Forest:
    """A new version equal to an old one.

    Raises:
        UserError: there is no such version, or one of its models was purged.
        StoreError: one of its models was collected.
    """
    old = version_of(ledger, version)
    for expert in old.experts:
        ledger.check_not_purged(
            Ref("model", expert.identity),
            remedy=f"choose a version without {expert.domain!r}; `btm forest log` has them",
        )
    ledger.check_all_standing(old.manifests)
    return append_next(ledger, lambda forest: roll_back(forest, old, f"rolled back to version {version}"))
