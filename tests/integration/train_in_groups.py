"""Trains a DEMix, or an expert, over groups of processes that are forked from this one: `python -m
tests.integration.train_in_groups < JOBS`.

JOBS are JSON: a plan, a number of ranks, the update after which one rank asks to stop, or null, and whether
the DEMix branches from the seed, which the store then has. Of a plan without a DEMix it is the first expert,
which does.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch.distributed as dist

from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import demix_request, expert_request, seed_request, seed_start
from btm_cluster.errors import Stopped
from btm_cluster.plan import Plan
from btm_cluster.requests import TrainRequest
from btm_cluster.steps.train import train
from btm_cluster.study.controls import seeded_demix_request
from tests.conftest import in_process
from tests.integration.test_training import AT_EVERY_UPDATE, Interrupting, Undisturbed


def request_for(plan: Plan, ranks: int, is_seeded: bool) -> TrainRequest:
    """The plan's DEMix or first expert, of a group; it saves as often as the group agrees on it."""
    prepared = prepare(plan, in_process(plan))
    seed = seed_request(prepared).ref
    if not plan.baselines:
        request = expert_request(prepared, prepared.domains[0], seed_start(prepared, seed))
    else:
        request = seeded_demix_request(prepared, seed) if is_seeded else demix_request(prepared)
    return replace(request, how=replace(request.how, workers=ranks), checkpoint_seconds=AT_EVERY_UPDATE)


def train_on(rank: int, rendezvous: str, plan: Plan, request: TrainRequest, stop_after: int | None) -> None:
    """What one rank does."""
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
    jobs = json.load(sys.stdin)
    if any("branching" in fields for fields, *_ in jobs):
        import_module("peft")  # before the processes are forked, which all need it
    for fields, ranks, stop_after, is_seeded in jobs:
        plan = Plan.model_validate(fields)
        request = request_for(plan, ranks, is_seeded)
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(ranks):
                child = os.fork()
                if not child:
                    train_on(rank, str(Path(folder, "rendezvous")), plan, request, stop_after)
                    os._exit(0)
                children.append(child)
            ended = [os.waitpid(child, 0)[1] for child in children]
        assert ended == [0] * ranks, ended


if __name__ == "__main__":
    main()
