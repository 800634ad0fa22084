"""What runs in the cluster beside trainings: tasks that prepare, score, mix and search, and the actor that averages.

Imports what a verb needs when it runs: a process that only reads texts has no use for torch.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray

from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.on_ray.progress import RayControl
from btm_cluster.requests import AverageRequest, MixRequest, PrepareRequest, ScoreRequest, SoupRequest, TrainRequest

AVERAGES_AT_ONCE = 4
OTHER_SECONDS = 2.0
"""Between two looks at what another driver trains."""


@ray.remote
def prepare_task(request: PrepareRequest, store: str, board: Any) -> Artifact:
    from btm_cluster.steps.prepare import prepare

    with RayControl(board, lambda: False) as control:
        return prepare(request, Ledger.open(store), control)


@ray.remote
def score_task(requests: Sequence[ScoreRequest], store: str, board: Any) -> list[Artifact]:
    from btm_cluster.steps.score import score

    with RayControl(board, lambda: False) as control:
        return score(requests, Ledger.open(store), control)


@ray.remote
def mix_task(request: MixRequest, store: str, board: Any) -> Artifact:
    from btm_cluster.steps.mix import mix

    with RayControl(board, lambda: False) as control:
        return mix(request, Ledger.open(store), control)


@ray.remote
def soup_task(request: SoupRequest, store: str, board: Any) -> Artifact:
    from btm_cluster.steps.soup import soup

    with RayControl(board, lambda: False) as control:
        return soup(request, Ledger.open(store), control)


@ray.remote(num_cpus=0)
def await_other_task(request: TrainRequest, store: str, name: str) -> Artifact | None:
    """The model that another driver's trainer is at; None where that one ended without it."""
    while True:
        found = Ledger.open(store).find(request.ref)
        if found is not None:
            return found
        try:
            ray.get_actor(name)
        except ValueError:  # there is none of that name any more
            return Ledger.open(store).find(request.ref)
        time.sleep(OTHER_SECONDS)


class Merger:
    """The merge actor: averages models, a few at a time, since most of that is reading and hashing."""

    def average(self, request: AverageRequest, store: str, board: Any) -> Artifact:
        """The committed average."""
        from btm_cluster.steps.average import average

        with RayControl(board, lambda: False) as control:
            return average(request, Ledger.open(store), control)


MergerActor: Any = ray.remote(max_concurrency=AVERAGES_AT_ONCE)(Merger)
