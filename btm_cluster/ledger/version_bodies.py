"""A forest version as a document's body: whole, or what it changes of an earlier version.

A forest of thousands of experts that grows by a few at a time would list all of them again in each version, so
that its log grew by the square of their number. A large version therefore names an earlier one, its base, and
what differs. `base_of` chooses the base such that few documents are read for any version. Reads no store.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from btm_cluster.forest import Expert, Forest, Foundation, Parent
from btm_cluster.ledger.documents import check_fields

WHOLE_BELOW = 64
"""Experts and withdrawn domains of a version that is always written whole: about 30 kB, which anybody can read
alone."""
STRIDE = 8
"""Versions that build on one another before one replaces them: more make the log smaller, and more documents
are read for a version."""
_CHANGES = {
    "version",
    "reason",
    "parent",
    "bases",
    "base_hash",
    "experts",
    "manifests",
    "withdrawn",
    "without",
}


@dataclass(frozen=True)
class Base:
    """The version that a difference is against."""

    forest: Forest
    hash: str
    bases: tuple[int, ...]
    """The versions that it builds on itself, the nearest first."""


def base_of(version: int) -> int:
    """The version that a large one changes: of multiples of STRIDE the multiple before, and so for its powers.

    So at most STRIDE - 1 documents for each digit of the number, in base STRIDE, are read for a version, and an
    expert is written as often as the number has digits.
    """
    step = 1
    while version % (step * STRIDE) == 0:
        step *= STRIDE
    return version - step


def body_of(forest: Forest, base: Base | None) -> dict[str, Any]:
    """The body of a version's document: the difference to its base where that is less than half as long as the
    whole and says all, else the whole."""
    if base is not None:
        changes = _changes(forest, base)
        named = [changes["experts"], changes["withdrawn"], *changes["without"].values()]
        if 2 * sum(map(len, named)) <= _entries(forest) and changed(base.forest, changes) == forest:
            return changes
    return dataclasses.asdict(forest)


def is_large(forest: Forest) -> bool:
    """Whether a version may be written as a difference."""
    return _entries(forest) >= WHOLE_BELOW


def bases_of(body: Mapping[str, Any]) -> tuple[int, ...]:
    """The versions that a body builds on, the nearest first: none, if it is whole.

    Raises:
        ValueError: they are not all before the one that builds on them.
    """
    if "bases" not in body:
        return ()
    bases = tuple(map(int, body["bases"]))
    if (
        not bases
        or list(bases) != sorted({*bases}, reverse=True)
        or not 0 <= bases[-1] <= bases[0] < body["version"]
    ):
        raise ValueError(f"version {body['version']} builds on {body['bases']}")
    return bases


def whole(body: Mapping[str, Any]) -> Forest:
    """The forest of a whole body. Another form raises KeyError, TypeError or ValueError."""
    fields = dict(body)
    foundation = dict(fields.pop("foundation"))
    founders = tuple((name, text) for name, text in foundation.pop("domains"))
    experts = tuple(map(_expert, fields.pop("experts")))
    withdrawn = tuple(fields.pop("withdrawn", ()))  # which version 0 of an older store has not
    return Forest(
        foundation=Foundation(**foundation, domains=founders), experts=experts, withdrawn=withdrawn, **fields
    )


def changed(base: Forest, body: Mapping[str, Any]) -> Forest:
    """The forest of a body that names changes of `base`. Another form raises KeyError, TypeError or ValueError."""
    check_fields(body, _CHANGES)
    gone = body["without"]
    check_fields(gone, {"experts", "manifests", "withdrawn"})
    experts = {expert.domain: expert for expert in base.experts}
    manifests = dict(base.manifests)
    for named, keys in ((experts, gone["experts"]), (manifests, gone["manifests"])):
        for key in keys:
            del named[key]
    experts |= {expert.domain: expert for expert in map(_expert, body["experts"])}
    return Forest(
        version=body["version"],
        foundation=base.foundation,
        experts=tuple(experts[domain] for domain in sorted(experts)),
        manifests=manifests | body["manifests"],
        reason=body["reason"],
        parent=body["parent"],
        withdrawn=tuple(sorted({*base.withdrawn, *body["withdrawn"]} - {*gone["withdrawn"]})),
    )


def _changes(forest: Forest, base: Base) -> dict[str, Any]:
    old = base.forest
    known = {expert.domain: expert for expert in old.experts}
    return {
        "version": forest.version,
        "reason": forest.reason,
        "parent": forest.parent,
        "bases": [old.version, *base.bases],
        "base_hash": base.hash,
        "experts": [dataclasses.asdict(one) for one in forest.experts if known.get(one.domain) != one],
        "manifests": dict(forest.manifests.items() - old.manifests.items()),
        "withdrawn": _less(forest.withdrawn, old.withdrawn),
        "without": {
            "experts": _less(known, forest.domains),
            "manifests": _less(old.manifests, forest.manifests),
            "withdrawn": _less(old.withdrawn, forest.withdrawn),
        },
    }


def _less(names: Iterable[str], others: Iterable[str]) -> list[str]:
    return sorted({*names} - {*others})


def _entries(forest: Forest) -> int:
    return len(forest.experts) + len(forest.withdrawn)


def _expert(entry: Mapping[str, Any]) -> Expert:
    return Expert(**{**entry, "parents": tuple(Parent(**parent) for parent in entry["parents"])})
