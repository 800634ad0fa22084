"""Names of artifacts: a kind, and the hash of a recipe and of the artifacts that it is made from.

Knows no store and none of the kinds.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Ref:
    """Names an artifact: its kind and identity."""

    kind: str
    identity: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.identity}"

    @staticmethod
    def parse(text: str) -> "Ref":
        """Reads what `str` wrote."""
        kind, identity = text.split("/")
        return Ref(kind, identity)


Inputs: TypeAlias = Mapping[str, tuple[Ref, ...]]
"""The artifacts that something is made from, by the part that they play in it."""


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, floats as Python writes them."""
    # Keys that are numbers, as in transformers' id2label, must sort as the strings that they are once read
    # back.
    plain = json.loads(json.dumps(value))
    return json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def identity_of(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe: what something is made from, never where, when or by how many machines."""
    return hashlib.sha256(canonical_json(recipe)).hexdigest()


def identity_by(kind: str, recipe: Mapping[str, Any], inputs: Inputs) -> str:
    """The identity of an artifact: SHA-256 of its kind, its recipe and the artifacts that it is made from."""
    return identity_of({"kind": kind, "recipe": recipe, "inputs": plain_inputs(inputs)})


def plain_inputs(inputs: Inputs) -> dict[str, list[str]]:
    """As a manifest has them: `<kind>/<identity>`."""
    return {role: [str(ref) for ref in refs] for role, refs in inputs.items()}
