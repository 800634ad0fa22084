"""The part that all requests share: a recipe, inputs, and the identity that follows from both.

A request is a frozen record of a few kB. Recipe and inputs say what is made; labels and resources say how it
is shown and made, and are no part of the identity.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from btm_cluster.identity import Inputs, Ref, identity_by

BLOCKS_WITHOUT_ESTIMATE = 16
"""Of a forward pass, where a plan leaves them to an estimate of memory and there is none."""


@dataclass(frozen=True)
class Resources:
    """How a step is run.

    Fixed at a model's first start and kept by its retries, since results depend on it.
    """

    workers: int
    gpus_per_worker: float
    cpus_per_worker: int
    micro_batch_blocks: int | Literal["auto"]
    """Blocks of a forward pass; `auto`, on a GPU, is settled where a training starts, by the memory that is there."""
    precision: str
    compile: bool
    sharding: Literal["auto", "none", "full"] = "none"
    """Whether each worker of a group holds a whole model or a part of it. `auto` is settled where a training
    starts, by the memory that is there."""
    activation_checkpointing: Literal["auto", "on", "off"] = "off"
    """Whether activations are computed once more for the backward pass; `auto` is settled likewise."""

    @property
    def blocks_at_once(self) -> int:
        """Blocks of a forward pass whose memory is not estimated, as that of a training on a GPU is."""
        return BLOCKS_WITHOUT_ESTIMATE if self.micro_batch_blocks == "auto" else self.micro_batch_blocks

    @property
    def facts(self) -> dict[str, Any]:
        """As plain values, from which these resources can be made again. What was added later is left out at its
        default: what was stored before says the same."""
        added = {"sharding": "none", "activation_checkpointing": "off"}
        return {name: value for name, value in asdict(self).items() if added.get(name, ...) != value}


class StepRequest(ABC):
    """Asks for one artifact, made by one step."""

    kind: ClassVar[str]
    label: str

    @property
    @abstractmethod
    def recipe(self) -> Mapping[str, Any]:
        """Settings that the artifact is made by, each named here: a new plan field renames nothing."""

    @property
    @abstractmethod
    def inputs(self) -> Inputs:
        """Artifacts that the artifact is made from, by the part that they play in it."""

    @cached_property
    def ref(self) -> Ref:
        """The artifact: its identity is the hash of kind, recipe and inputs."""
        return Ref(self.kind, identity_by(self.kind, self.recipe, self.inputs))

    @property
    def needs(self) -> tuple[Ref, ...]:
        """Artifacts that the step reads. It starts once they are there, as far as others make them."""
        return tuple(ref for refs in self.inputs.values() for ref in refs)

    @property
    def shown(self) -> str:
        """The name that progress goes by: that of the whole batch."""
        return self.label

    @property
    def batch(self) -> object:
        """Requests of one batch are done by one process, one after the other, where they can start together.

        None: alone.
        """
        return None

    @property
    def priority(self) -> int | None:
        """For trainings: one of a higher number starts once none of a lower one waits to start."""
        return None

    @property
    def group(self) -> Resources | None:
        """The resources that the step runs with. None: one CPU."""
        return None

    @property
    def makes(self) -> tuple[Ref, ...]:
        """Every artifact that the step commits, the one asked for among them."""
        return (self.ref,)


def texts_of(identities: tuple[str, ...]) -> tuple[Ref, ...]:
    """Texts as inputs, in an order that no plan changes."""
    return tuple(Ref("text", identity) for identity in sorted(identities))
