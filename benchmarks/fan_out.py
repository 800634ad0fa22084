"""Many experts on a cluster by the driver's own engine: seconds from an expert's end until the next one begins.

    python benchmarks/fan_out.py                     64 and 256 experts on 8 nodes of 8 GPUs
    python benchmarks/fan_out.py --nodes 2 --gpus 2 --experts 4,16 --sleep 5

The nodes are made up: raylets of this machine that claim to have GPUs. The engine, Ray's scheduling, the
processes, the progress board and the store are real; an expert imports no torch, sleeps, and commits a small
model. Needs about 100 MB of memory for each GPU.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from results import Result, finish, parse, this_machine, today

from btm_cluster.driver.run_events import RunEvents
from btm_cluster.identity import Ref
from btm_cluster.ledger import Ledger
from btm_cluster.plan import ClusterPlan, TrainingPlan
from btm_cluster.requests import Resources, TrainRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.storage.store_calls import StoreCalls
from btm_cluster.workers.on_ray import trainers
from btm_cluster.workers.on_ray.progress import Process, RayControl
from btm_cluster.workers.on_ray.spans import Span, Worked
from btm_cluster.workers.on_ray.supervision import LOADING, STARTING
from btm_cluster.workers.on_ray.training import Trainer
from btm_cluster.workers.on_ray.workers import RayWorkers

ONE_GPU = Resources(1, 1.0, 1, 1, "bfloat16", False)
GOAL_SECONDS = 0.5


class Sleeper(Trainer):
    """Stands in for a trainer: says what one says, and sleeps."""

    def train(self, request: TrainRequest, store: str, retries: int, board: Any) -> Worked:  # noqa: ARG002
        """The committed model, which is a file of a few bytes."""
        began = time.time()
        with RayControl(board, lambda: False) as control:
            control.report(Progress(request.label, STARTING))
            control.begin(request.ref)
            board.enter.remote(request.label, Process.this())
            control.report(Progress(request.label, LOADING))
            seconds = float(request.model["sleep_seconds"])
            for update in range(1, 5):
                time.sleep(seconds / 4)
                control.report(Progress(request.label, "training", update, 4, loss=1.0))
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "model.safetensors")
                file.write_bytes(request.ref.identity.encode())
                facts = {"began": began, "ended": time.time(), "process": os.getpid(), "origin": "0" * 64}
                made = Ledger.open(store).commit(request, {file.name: file}, facts)
        return self._told(Worked([made], [Span.since(began)]))

    def warm_up(self, request: TrainRequest, board: Any) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Ran:
    """Times, memory and store calls of a run of so many experts."""

    experts: int
    gaps: list[float]
    """Seconds from each end of an expert until the next one begins."""
    processes: int
    """Processes that trained."""
    seconds: float
    driver_bytes: int
    """Memory of the driver's process at its peak."""
    driver_cpu_seconds: float
    store_calls: int


def main() -> None:
    """Runs the smaller number of experts first, and prints a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=8, help="of each node")
    parser.add_argument("--experts", default="64,256")
    parser.add_argument("--sleep", type=float, default=20.0, help="seconds of an expert, give or take a half")
    asked = parse(parser)
    trainers.TrainerActor = ray.remote(concurrency_groups={"control": 2})(Sleeper)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 0})
    try:
        for _ in range(asked.nodes):
            cluster.add_node(num_cpus=asked.gpus, num_gpus=asked.gpus)
        ray.init(cluster.address, namespace="btm", log_to_driver=False)
        ran = [run(int(number), asked.sleep) for number in asked.experts.split(",")]
    finally:
        ray.shutdown()
        cluster.shutdown()
    finish([result_of(ran, asked)], asked)


def run(experts: int, sleep_seconds: float) -> Ran:
    """One call of the engine for so many experts, in a fresh store."""
    calls: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fan-out-") as store, Peak() as peak:
        cluster = ClusterPlan(gpus_per_expert=1, cpus_per_expert=1)
        workers = RayWorkers(store, lambda _: None, threading.Event(), cluster, ONE_GPU, RunEvents())
        workers._metrics.count_store_calls = lambda counted: _count(calls, counted)  # type: ignore[method-assign]
        requests = [request_of(number, sleep_seconds) for number in range(experts)]
        started, cpu = time.monotonic(), time.process_time()
        outcomes = list(workers.run(requests))
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        workers.close()
        failed = [outcome for _, outcome in outcomes if not hasattr(outcome, "facts")]
        if failed:
            raise SystemExit(f"{len(failed)} experts failed: {failed[0]}")
        facts = [outcome.facts for _, outcome in outcomes]  # type: ignore[union-attr]
    ended = sorted(one["ended"] for one in facts)
    begun = sorted(one["began"] for one in facts)[int(ray.cluster_resources()["GPU"]) :]
    gaps = [at - end for at, end in zip(begun, ended, strict=False)]
    processes = len({one["process"] for one in facts})
    return Ran(experts, gaps, processes, seconds, peak.bytes, cpu, sum(calls.values()))


def _count(calls: Counter[str], counted: StoreCalls) -> None:
    for (verb, _), number in counted.items():
        calls[verb] += number


def request_of(number: int, sleep_seconds: float) -> TrainRequest:
    """An expert; ends are spread, so that slots are freed one by one."""
    model: Mapping[str, Any] = {"number": number, "sleep_seconds": sleep_seconds * (0.5 + number % 64 / 64)}
    return TrainRequest(
        label=f"expert-{number}",
        role="expert",
        model=model,
        tokenizer=Ref("tokenizer", "0" * 64),
        texts=(),
        training=TrainingPlan(),
        first_update=0,
        last_update=4,
        start=None,
        pretrained=None,
        restart_data=False,
        how=ONE_GPU,
        checkpoint_seconds=600.0,
    )


class Peak:
    """The largest memory of this process, read five times a second until it is closed."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(0.2):
            self.bytes = max(self.bytes, process.memory_info().rss)


def result_of(ran: list[Ran], asked: argparse.Namespace) -> Result:
    """The row: the gap at the largest number of experts, the rest beside it."""
    largest = ran[-1]
    slots = asked.nodes * asked.gpus
    return Result(
        name="fan-out",
        what=f"median seconds from an expert's end until the next one begins, {largest.experts} experts that "
        f"sleep on {asked.nodes} made-up nodes of {asked.gpus} GPUs; processes, Ray and store are real",
        machine=this_machine(),
        measured=today(),
        unit="s",
        better="lower",
        ours=statistics.median(largest.gaps),
        theirs=None,
        peer=None,
        goal=GOAL_SECONDS,
        limit=None,
        limit_is=None,
        beside={
            "slots": str(slots),
            "95 of 100 gaps": f"at most {sorted(largest.gaps)[int(0.95 * (len(largest.gaps) - 1))]:.2f} s",
        }
        | {
            f"{one.experts} experts": f"{one.seconds:.0f} s in all, {one.processes} processes trained, "
            f"driver {one.driver_bytes / 2**20:.0f} MiB and "
            f"{one.driver_cpu_seconds:.1f} CPU seconds, {one.store_calls} store calls "
            f"({one.store_calls / one.experts:.1f} an expert)"
            for one in ran
        },
    )


if __name__ == "__main__":
    main()
