"""`btm forest diff`: the domains in which two versions differ."""

from btm_cluster.forest import Difference, difference
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.versions import version_of


def diff(ledger: Ledger, before: int, after: int) -> Difference:
    """Domains that were added, removed or replaced between two versions.

    Raises:
        UserError: there is no such version.
    """
    return difference(version_of(ledger, before), version_of(ledger, after))
