"""Artifacts of any recipe, for tests that need no step to make them."""

from collections.abc import Mapping
from typing import Any

from btm_cluster.ledger import Inputs, Origin, Ref, identity_by


def origin(kind: str, recipe: Mapping[str, Any], inputs: Inputs | None = None) -> Origin:
    """An artifact to be committed, named as a request of this kind, recipe and inputs would name it."""
    inputs = inputs or {}
    return Origin(Ref(kind, identity_by(kind, recipe, inputs)), recipe, inputs)


def text(identity: str) -> Origin:
    """A text, whose identity is that of its documents."""
    return Origin(Ref("text", identity), {"documents": identity}, {})
