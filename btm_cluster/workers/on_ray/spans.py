"""Times and places of steps on the cluster, measured by their own processes with their node's clock."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from btm_cluster.identity import Ref
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.requests import StepRequest
from btm_cluster.steps.registry import run_batch


@dataclass(frozen=True)
class Span:
    """A stretch of time on a node, in seconds since 1970."""

    node: str
    began: float
    ended: float

    @classmethod
    def since(cls, began: float) -> "Span":
        """From then until now, on this node."""
        return cls(this_node(), began, time.time())


@dataclass(frozen=True)
class Begun:
    """A process has begun with a batch: its first request, where, and when."""

    first: Ref
    node: str
    at: float

    @classmethod
    def now(cls, first: Ref) -> "Begun":
        """Here and now."""
        return cls(first, this_node(), time.time())


@dataclass(frozen=True)
class Worked:
    """The outcome of a batch: an artifact for each request, and its times where they were measured."""

    artifacts: list[Artifact]
    spans: list[Span] = field(default_factory=list)
    may_train_on: bool = False
    """Whether the process may train another model after this: a trainer says so."""


def this_node() -> str:
    """Ray's name of this node."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


def work(batch: Sequence[StepRequest], store: str, control: Any) -> Worked:
    """Does what the requests of a batch ask for; the board hears that it has begun."""
    control.begin(batch[0].ref)
    done, began = Worked([]), time.time()
    for artifact in run_batch(batch, Ledger.open(store), control):
        done.artifacts.append(artifact)
        done.spans.append(Span.since(began))
        began = time.time()
    return done
