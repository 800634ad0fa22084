"""Grows one forest again and again while processes, machines, drivers and the
store fail at moments drawn from a seed.

    python -m tests.faults.campaign --seeds 100 [--first 0]      or: make chaos SEEDS=100

The store is a real S3 server behind a fault-injecting proxy; the cluster is Ray on several nodes of this
machine. Each seed must end in the very forest that grows undisturbed. Prints a line per seed, and fails if
one ended otherwise.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import yaml

from btm_cluster.algorithm import grow
from btm_cluster.plan import Plan
from tests.conftest import in_process, made_up_documents, plan_fields, start_object_store, write_jsonl
from tests.end_to_end.conftest import BIN, GROW, SESSION, Btm, plain, ray_head, ray_node, trainers
from tests.fault_proxy import FaultProxy, no_faults, random_faults

FAULT_RATE = 0.02
"""Of the requests to the store."""
LONGEST_SECONDS = 300.0
"""A run that takes longer hangs."""
KILLS = ("trainer", "node", "driver", "stop", "outage")


@dataclass
class Outcome:
    """What one seed did, and how it ended."""

    seed: int
    events: list[str]
    requests: int
    faults: int
    seconds: float
    ended: str

    @property
    def is_right(self) -> bool:
        return self.ended == "the same forest"


class Campaign:
    """A cluster, a store, and the forest that every seed must end in."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        store = stack.enter_context(start_object_store(folder / "radosgw"))
        self._proxy = stack.enter_context(FaultProxy(store["AWS_ENDPOINT_URL"]))
        self._variables = store | {
            "AWS_ENDPOINT_URL": self._proxy.url,
            "BTM_CACHE_FOLDER": str(folder / "cache"),
        }
        direct = boto3.client(
            "s3",
            endpoint_url=store["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id=store["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=store["AWS_SECRET_ACCESS_KEY"],
        )
        direct.create_bucket(Bucket="chaos")
        stack.callback(direct.close)
        texts = {
            name: write_jsonl(folder / f"{name}.jsonl", made_up_documents(name, 200))
            for name in ("kitchen", "harbour")
        }
        self._fields = _plan_fields(texts)
        self.expected = self._undisturbed()
        (folder / "head").mkdir()
        arguments = ("--port=0", "--include-dashboard=false", "--no-monitor")
        self._environment = stack.enter_context(
            ray_head(folder / "head", *arguments, cpus=1, **self._variables)
        )
        self._nodes = [self._node() for _ in range(2)]

    def run(self, seed: int) -> Outcome:
        """One run, disturbed as the seed says, until it is done."""
        rng = random.Random(seed)
        plan = self._folder / f"plan-{seed}.yaml"
        plan.write_text(yaml.safe_dump(self._fields | {"store": f"s3://chaos/{seed}"}), encoding="utf-8")
        shutil.rmtree(self._folder / "cache", ignore_errors=True)
        planned = sorted((rng.uniform(3, 35), rng.choice(KILLS)) for _ in range(rng.randint(1, 3)))
        self._proxy.follow(random_faults(seed, FAULT_RATE))
        started = time.monotonic()
        events: list[str] = []
        drivers = [self._driver(plan)]
        ended = "hung"
        while time.monotonic() - started < LONGEST_SECONDS:
            elapsed = time.monotonic() - started
            if planned and elapsed >= planned[0][0]:
                done = self._disturb(planned[0][1], drivers[-1], rng)
                if done:  # who finds no trainer to kill waits for one
                    planned.pop(0)
                    events.append(f"{elapsed:.0f} s: {done}")
            code = drivers[-1].process.poll()
            if code == 0:
                ended = "the same forest" if self._experts(seed) == self.expected else "another forest"
                break
            if code is not None:
                drivers[-1].exit_code()
                if code not in (-signal.SIGKILL, 130):
                    events.append(f"{elapsed:.0f} s: the driver ended with {code}: {drivers[-1].said[-600:]}")
                if len(drivers) > 6:
                    ended = "never done"
                    break
                drivers.append(self._driver(plan))
            time.sleep(0.2)
        if drivers[-1].process.poll() is None:
            drivers[-1].process.kill()
            events.append(drivers[-1].said[-1500:])
        drivers[-1].exit_code()
        seen = self._proxy.seen
        faults = sum(fault.name != "NONE" for _, _, fault in seen)
        self._proxy.follow(no_faults)
        return Outcome(seed, events, len(seen), faults, time.monotonic() - started, ended)

    def _driver(self, plan: Path) -> Btm:
        log = self._folder / f"said-{time.time_ns()}"
        return Btm([str(plan)], self._environment | self._variables, log, GROW)

    def _node(self) -> "subprocess.Popen[bytes]":
        return self._stack.enter_context(ray_node(self._environment | self._variables, cpus=2))

    def _disturb(self, kind: str, driver: Btm, rng: random.Random) -> str:
        if kind == "trainer":
            pids = trainers(self._environment[SESSION], *(node.pid for node in self._nodes))
            for pid in pids[:1]:
                os.kill(pid, signal.SIGKILL)
            return "a trainer was killed" if pids else ""
        if kind == "node":
            lost = self._nodes.pop(rng.randrange(len(self._nodes)))
            os.killpg(lost.pid, signal.SIGKILL)
            self._nodes.append(self._node())
            return "a machine was lost, another came"
        if kind == "outage":
            self._proxy.refuse()
            time.sleep(rng.uniform(1, 8))
            self._proxy.accept()
            return "the store was out for seconds"
        driver.process.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGTERM)
        return "the driver was killed" if kind == "driver" else "the driver was asked to stop"

    def _undisturbed(self) -> dict[str, dict[str, Any]]:
        plan = Plan.model_validate(self._fields | {"store": str(self._folder / "undisturbed")})
        return plain(grow(plan, in_process(plan)).forest)

    def _experts(self, seed: int) -> dict[str, dict[str, Any]]:
        command = [str(BIN / "btm"), "forest", "show", "--store", f"s3://chaos/{seed}", "--json"]
        shown = subprocess.run(
            command, capture_output=True, text=True, env=self._environment | self._variables
        )
        if shown.returncode:
            return {"error": {"said": shown.stderr}}
        return {expert["domain"]: expert for expert in json.loads(shown.stdout)["experts"]}


@contextmanager
def campaign() -> Iterator[Campaign]:
    """Everything started, and stopped at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder,
        ExitStack() as stack,
    ):
        yield Campaign(Path(folder), stack)


def _plan_fields(texts: dict[str, Path]) -> dict[str, Any]:
    fields = plan_fields(texts | {"orchard": texts["kitchen"], "market": texts["kitchen"]}, Path("unused"))
    fields |= {"domains": fields["domains"][:2], "targets": []}
    fields["training"] |= {"updates": 2400}
    fields["cluster"] |= {
        "checkpoint_minutes": 0.01,
        "retries": 8,
        "hang_minutes": 1,
        "stop_grace_seconds": 20,
    }
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    wrong = 0
    with campaign() as running:
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            outcome = running.run(seed)
            wrong += not outcome.is_right
            said = "; ".join(outcome.events) or "nothing but the store's faults"
            print(
                f"seed {seed}: {outcome.ended} after {outcome.seconds:.0f} s, {outcome.faults} faults in "
                f"{outcome.requests} requests; {said}",
                flush=True,
            )
    sys.exit(f"{wrong} of {arguments.seeds} ended otherwise" if wrong else 0)


if __name__ == "__main__":
    main()
