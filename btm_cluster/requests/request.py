"""What every request has.

A request names what it is made from, so its recipe is its identity; how it is made (`how`, labels) is no part of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from btm_cluster.forest import identity_of
from btm_cluster.ledger import Ref


class StepRequest(ABC):
    """What every request has: a label to show, and the artifact that it asks for."""

    kind: ClassVar[str]
    label: str

    @property
    @abstractmethod
    def recipe(self) -> Mapping[str, Any]:
        """What the artifact is made from: its identity is this one's hash."""

    @property
    def ref(self) -> Ref:
        return Ref(self.kind, identity_of(self.recipe))
