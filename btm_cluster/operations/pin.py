"""`btm forest pin`: keeps a version from being collected."""

from btm_cluster.ledger import Ledger


def pin(ledger: Ledger, version: int, remove: bool = False) -> list[int]:
    """Pins a version, or unpins it, and returns those that are pinned then.

    Raises:
        UserError: there is no such version.
    """
    if remove:
        ledger.unpin(version)
    else:
        ledger.pin(version)
    return ledger.log.pinned()
