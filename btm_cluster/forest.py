"""Values: experts, and the forest they form.

Knows nothing of where they are stored or how experts are trained. A forest never changes: adding and removing
domains make a new version of it, and what a version inherits from the first one, its foundation, stays.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from btm_cluster.errors import UserError


@dataclass(frozen=True)
class Parent:
    """A model that another one starts from, and its weight in that start."""

    identity: str
    weight: float


@dataclass(frozen=True)
class Expert:
    """A domain's expert as a forest version lists it: the same for equal
    runs, whatever the machine or the hour."""

    domain: str
    identity: str
    weights_sha256: str
    text: str
    parents: tuple[Parent, ...]


@dataclass(frozen=True)
class Foundation:
    """The part that every version of a forest shares: frozen by version 0."""

    seed: str
    tokenizer: str
    model: str
    block_tokens: int
    domains: tuple[tuple[str, str], ...]
    """Name and text identity of the founding domains, by name: the text the
    seed and the tokenizer have seen."""


@dataclass(frozen=True)
class Forest:
    """One version of a forest."""

    version: int
    foundation: Foundation
    experts: tuple[Expert, ...]
    """By domain name."""
    manifests: Mapping[str, str]
    """Manifest hash of every model that this version names, by identity: the seed's too."""
    reason: str
    parent: str | None = None
    """Hash of the version before."""
    withdrawn: tuple[str, ...] = ()
    """Names of domains that were taken out on purpose: they are not added again
    because a plan or an inbox still has them."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that have an expert."""
        return tuple(expert.domain for expert in self.experts)

    def expert(self, domain: str) -> Expert:
        """The expert of `domain`."""
        for expert in self.experts:
            if expert.domain == domain:
                return expert
        raise UserError(f"the forest has no domain {domain!r}", expected=", ".join(self.domains))


def merge_into(
    forest: Forest, experts: Sequence[Expert], manifests: Mapping[str, str], reason: str
) -> Forest:
    """The next version: the forest's experts and the new ones, a set insertion.

    Raises:
        UserError: if a new expert's domain already stands in the forest with another expert.
    """
    merged = {expert.domain: expert for expert in forest.experts}
    for expert in experts:
        known = merged.setdefault(expert.domain, expert)
        if known.identity != expert.identity:
            raise UserError(
                f"the domain {expert.domain!r} already stands in forest version {forest.version}",
                found=f"expert {expert.identity[:12]} on text {expert.text[:12]}",
                expected=f"expert {known.identity[:12]} on text {known.text[:12]}",
                remedy="give another text a name of its own; another expert on the same text is not needed",
            )
    return dataclasses.replace(
        forest,
        version=forest.version + 1,
        experts=tuple(merged[domain] for domain in sorted(merged)),
        manifests={**forest.manifests, **manifests},
        reason=reason,
    )


def take_out(forest: Forest, domain: str, reason: str) -> Forest:
    """The next version, without a domain's expert.

    Raises:
        UserError: the domain has none.
    """
    gone = forest.expert(domain)
    return dataclasses.replace(
        forest,
        version=forest.version + 1,
        experts=tuple(expert for expert in forest.experts if expert != gone),
        manifests={
            identity: hashed for identity, hashed in forest.manifests.items() if identity != gone.identity
        },
        reason=reason,
        withdrawn=tuple(sorted({*forest.withdrawn, domain})),
    )


def put_back(forest: Forest, expert: Expert, manifest_hash: str, reason: str) -> Forest:
    """The next version, with an expert that had been taken out."""
    merged = merge_into(forest, [expert], {expert.identity: manifest_hash}, reason)
    return dataclasses.replace(
        merged, withdrawn=tuple(name for name in forest.withdrawn if name != expert.domain)
    )


def roll_back(forest: Forest, old: Forest, reason: str) -> Forest:
    """The next version after `forest`, equal to `old`: what came since counts as taken out."""
    withdrawn = {*old.withdrawn, *forest.withdrawn, *forest.domains} - {*old.domains}
    return dataclasses.replace(
        old, version=forest.version + 1, reason=reason, parent=None, withdrawn=tuple(sorted(withdrawn))
    )


@dataclass(frozen=True)
class Difference:
    """The difference of two versions: names of domains."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...]
    """In both, with another expert."""


def difference(before: Forest, after: Forest) -> Difference:
    """From one version to another."""
    old, new = ({expert.domain: expert.identity for expert in forest.experts} for forest in (before, after))
    return Difference(
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        replaced=tuple(sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
    )


def descendants(of: str, parents: Mapping[str, Collection[str]]) -> set[str]:
    """Every model that descends from one, through whatever lies between.

    `parents` are identities by identity.
    """
    found: set[str] = set()
    waiting = [of]
    while waiting:
        ancestor = waiting.pop()
        children = {model for model, above in parents.items() if ancestor in above} - found
        found |= children
        waiting += children
    return found


def check_merge(forest: Forest, texts: Mapping[str, str]) -> None:
    """Refuses a domain that stands in the forest with another text. `texts` are identities by domain name.

    Raises:
        UserError: naming the domain.
    """
    for expert in forest.experts:
        if texts.get(expert.domain, expert.text) != expert.text:
            raise UserError(
                f"the domain {expert.domain!r} already stands in forest version {forest.version}",
                found=f"text {texts[expert.domain][:12]}",
                expected=f"text {expert.text[:12]}, on which its expert was trained",
                remedy="give the new text a name of its own, or restore the old one",
            )


def describe_forest(forest: Forest) -> dict[str, Any]:
    """A version as plain values.

    An expert's entry is the same for equal runs: no times, machines or transactions.
    """
    return {
        "version": forest.version,
        "reason": forest.reason,
        "foundation": dataclasses.asdict(forest.foundation),
        "experts": [dataclasses.asdict(expert) for expert in forest.experts],
        "withdrawn": list(forest.withdrawn),
    }
