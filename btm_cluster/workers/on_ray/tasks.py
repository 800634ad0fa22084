"""Work in the cluster beside trainings: a task for any step, and the actor that averages."""

import time
from collections.abc import Sequence
from typing import Any

import ray

from btm_cluster.ledger import Ledger
from btm_cluster.requests import StepRequest, TrainRequest
from btm_cluster.workers.on_ray.claims import is_taken
from btm_cluster.workers.on_ray.progress import RayControl
from btm_cluster.workers.on_ray.spans import Worked, work

PASSES_AT_ONCE = 4
OTHER_SECONDS = 2.0
"""Between two looks at what another driver trains."""


@ray.remote
def step_task(batch: Sequence[StepRequest], store: str, board: Any) -> Worked:
    """Does what the requests of a batch ask for."""
    with RayControl(board, lambda: False) as control:
        return work(batch, store, control)


@ray.remote(num_cpus=0)
def await_other_task(request: TrainRequest, store: str, name: str) -> Worked | None:
    """The model that another driver trains under that name; None where it ended without it."""
    while True:
        found = Ledger.open(store).find(request.ref)
        if found is not None:
            return Worked([found])
        if not is_taken(name):
            found = Ledger.open(store).find(request.ref)
            return None if found is None else Worked([found])
        time.sleep(OTHER_SECONDS)


class Merger:
    """The merge actor: makes averages of the same models in one pass, and a few passes over others at a time, since
    most of that is reading and hashing."""

    def average(self, batch: Sequence[StepRequest], store: str, board: Any) -> Worked:
        """The committed averages of one batch."""
        with RayControl(board, lambda: False) as control:
            return work(batch, store, control)


MergerActor: Any = ray.remote(max_concurrency=PASSES_AT_ONCE)(Merger)
