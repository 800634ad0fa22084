"""Versions of a forest that must be there, and the one that comes next."""

from collections.abc import Callable

from btm_cluster.errors import StoreError, UserError
from btm_cluster.forest import Expert, Forest
from btm_cluster.ledger import Ledger

APPEND_ATTEMPTS = 100


def newest_version(ledger: Ledger) -> Forest:
    """The newest version.

    Raises:
        UserError: there is none yet.
    """
    forest = ledger.log.newest()
    if forest is None:
        raise no_forest(ledger)
    return forest


def no_forest(ledger: Ledger) -> UserError:
    """The refusal of a store without a forest."""
    return UserError(
        f"there is no forest in {ledger.storage.location}",
        remedy="`btm run` grows one; or check the plan's `store`, or --store, which is relative to this folder",
    )


def version_of(ledger: Ledger, version: int | None) -> Forest:
    """The version of that number; of None the newest.

    Raises:
        UserError: there is no forest; or no such version, naming those that there are.
    """
    if version is None:
        return newest_version(ledger)
    forest = ledger.log.version(version)
    if forest is None:
        found = ", ".join(map(str, ledger.log.versions())) or "no version"
        raise UserError(f"there is no forest version {version}", found=f"versions {found}")
    return forest


def last_expert(ledger: Ledger, domain: str) -> Expert | None:
    """The domain's expert in the newest version that has one."""
    read = ledger.log.read([])
    for version in reversed(ledger.log.versions()):
        forest = read.forest(version)
        if forest is not None and domain in forest.domains:
            return forest.expert(domain)
    return None


def append_next(ledger: Ledger, next_version: Callable[[Forest], Forest]) -> Forest:
    """Appends what comes after the newest version.

    Who loses the race for a number reads again and tries the next one.

    Raises:
        UserError: there is no forest yet.
        StoreError: too many races were lost.
    """
    for _ in range(APPEND_ATTEMPTS):
        wanted = next_version(newest_version(ledger))
        if ledger.log.append(wanted):
            return ledger.log.version(wanted.version) or wanted
    raise StoreError(
        "could not append to the forest log", found=f"{APPEND_ATTEMPTS} lost races", remedy="try again"
    )
