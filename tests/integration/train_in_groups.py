"""Trains models over groups of processes that are forked from this one: `python -m
tests.integration.train_in_groups < JOBS`.

JOBS is a JSON list of the fields of `Job`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist

from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import (
    demix_request,
    expert_request,
    seed_request,
    seed_start,
    transformer_lm_request,
)
from btm_cluster.errors import Stopped
from btm_cluster.plan import Plan
from btm_cluster.requests import TrainRequest
from btm_cluster.steps.train import train
from btm_cluster.study.controls import seeded_demix_request
from tests.conftest import in_process
from tests.integration.test_training import AT_EVERY_UPDATE, Interrupting, Undisturbed


@dataclass(frozen=True)
class Job:
    """One training over one group."""

    fields: dict[str, Any]
    """The plan; its store has texts, and the seed where the model starts from it."""
    model: str
    """demix, demix-from-seed, transformer-lm, or expert: the first domain's."""
    ranks: int
    stop_after: int | None = None
    """The update after which the last rank asks to stop."""
    how: dict[str, Any] = field(default_factory=dict)
    """Resources that are not the plan's."""

    def request(self, plan: Plan) -> TrainRequest:
        """The plan's model, of a group; it saves as often as the group agrees on it."""
        prepared = prepare(plan, in_process(plan))
        seed = seed_request(prepared).ref
        request = {
            "demix": lambda: demix_request(prepared),
            "demix-from-seed": lambda: seeded_demix_request(prepared, seed),
            "transformer-lm": lambda: transformer_lm_request(prepared, seed),
            "expert": lambda: expert_request(prepared, prepared.domains[0], seed_start(prepared, seed)),
        }[self.model]()
        how = replace(request.how, workers=self.ranks, **self.how)
        return replace(request, how=how, checkpoint_seconds=AT_EVERY_UPDATE)


def train_in_groups(jobs: Sequence[Job]) -> None:
    """One job after the other, in a process of its own: one that has threads cannot fork."""
    made = subprocess.run(
        [sys.executable, "-m", "tests.integration.train_in_groups"],
        input=json.dumps([asdict(job) for job in jobs]),
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr


def _train_on(rank: int, rendezvous: str, plan: Plan, request: TrainRequest, stop_after: int | None) -> None:
    """Trains on one rank."""
    ranks = request.how.workers
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    demands = stop_after is not None and rank == ranks - 1
    control = Interrupting(stop_after) if demands and stop_after is not None else Undisturbed()
    try:
        train(request, in_process(plan).ledger, control)
        assert stop_after is None
    except Stopped:
        assert stop_after is not None
    dist.destroy_process_group()


def main() -> None:
    """One job after the other."""
    jobs = [Job(**fields) for fields in json.load(sys.stdin)]
    if any("branching" in job.fields for job in jobs):
        import_module("peft")  # before the processes are forked, which all need it
    for job in jobs:
        plan = Plan.model_validate(job.fields)
        request = job.request(plan)
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(job.ranks):
                child = os.fork()
                if not child:
                    _train_on(rank, str(Path(folder, "rendezvous")), plan, request, job.stop_after)
                    os._exit(0)
                children.append(child)
            ended = [os.waitpid(child, 0)[1] for child in children]
        assert ended == [0] * job.ranks, ended


if __name__ == "__main__":
    main()
