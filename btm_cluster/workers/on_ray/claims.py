"""Claims on models: of several drivers on a cluster, one trains a model.

A claim is a placement group of the model's name. Ray knows a name once, gives it back when the driver ends, and
starts no process for it; it holds a ten-thousandth of a mark that every head node has.
"""

from collections.abc import Collection
from typing import Any

import ray
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group

from btm_cluster.ledger import Ref


class ClaimedError(Exception):
    """Another driver trains a model, or its actor is still about to end."""


_NEXT_TO_NOTHING = {"node:__internal_head__": 0.0001}


class Claims:
    """The claims of one driver."""

    def __init__(self) -> None:
        self._held: dict[Ref, Any] = {}

    def claim(self, model: Ref, name: str) -> None:
        """Claims a model, by its name on the cluster; nothing happens where this driver has claimed it.

        Raises:
            ClaimedError: another driver has.
        """
        if model in self._held:
            return
        if _is_claimed(name):  # asked first, since Ray prints an error where it refuses a name
            raise ClaimedError(name)
        try:
            self._held[model] = placement_group([_NEXT_TO_NOTHING], name=name)
        except ray.exceptions.RaySystemError as exc:  # claimed in between
            raise ClaimedError(name) from exc

    def give_back(self, model: Ref) -> None:
        """Gives a claim back, where this driver has it."""
        if (claim := self._held.pop(model, None)) is not None:
            remove_placement_group(claim)

    def give_back_all(self, but: Collection[Ref]) -> None:
        """Gives all claims back but these."""
        for model in [model for model in self._held if model not in but]:
            self.give_back(model)


def is_taken(name: str) -> bool:
    """Whether a driver trains the model of that name, or an actor still has the name."""
    if _is_claimed(name):
        return True
    try:
        ray.get_actor(name)
    except ValueError:
        return False
    return True


def _is_claimed(name: str) -> bool:
    try:
        get_placement_group(name)
    except ValueError:
        return False
    return True
