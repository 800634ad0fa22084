"""`btm forest log`: the versions of the forest."""

from typing import Any

from btm_cluster.ledger import Ledger
from btm_cluster.ledger.versions import no_forest


def log(ledger: Ledger) -> list[dict[str, Any]]:
    """Entries of the log, the newest version first: its number, its experts, when
    and by whom it was made, and why.

    Raises:
        UserError: there is none.
    """
    entries = [
        {
            "version": forest.version,
            "experts": len(forest.experts),
            "created": note.get("created"),
            "by": note.get("by"),
            "reason": forest.reason,
        }
        for forest, note in reversed(ledger.log.history())
    ]
    if not entries:
        raise no_forest(ledger)
    return entries
