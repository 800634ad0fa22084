"""`btm doctor`: what would make a run fail, before it begins.

Everything is looked at, whatever is wrong before it.
"""

import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from btm_cluster.driver.capacity import Demand, memory_problem
from btm_cluster.driver.gpu_memory import told
from btm_cluster.driver.recipes import expert_resources, seed_resources
from btm_cluster.equations.budget import stored_bytes
from btm_cluster.errors import BtmError, StoreError
from btm_cluster.ledger import Ledger
from btm_cluster.operations.gc import store_time
from btm_cluster.operations.plan import Preview, preview
from btm_cluster.plan import Plan
from btm_cluster.plan.folder import refuse_in_jobs_copy
from btm_cluster.storage import Storage, open_storage
from btm_cluster.tracking.tracking import check_tracking
from btm_cluster.workers.checks import LEAST_FREE_BYTES, Check, Needs, judge_machines
from btm_cluster.workers.machine import inspect_machine

RACERS = 8
CLOCK_SECONDS = 300.0
"""S3 refuses requests from a clock that is 15 minutes off; long before that, logs and alerts lead astray."""


def examine(plan: Plan | None, address: str | None, folder: Path) -> list[Check]:
    """All checks. Without a plan, those of Ray and of this machine."""
    from btm_cluster.workers.on_ray.examination import (
        examine_cluster,
        examine_local,
        examine_working_directory,
    )

    checks, seen = examine_plan(plan) if plan is not None else ([], None)
    demands = demands_of(plan, seen) if plan is not None else []
    store = plan.store if plan is not None else None
    if address is None:
        machines = [inspect_machine(None)]
        checks += examine_local(demands, machines[0])
    else:
        of_ray, machines = examine_cluster(
            address, store, demands, plan is not None and plan.cluster.autoscaling
        )
        checks += of_ray
    carried = examine_working_directory(folder)
    if address is None and carried.state == "wrong":  # only a job that is submitted carries it
        carried = replace(carried, state="note")
    checks.append(carried)
    known = max((machine.gpu_bytes for machine in machines if machine.gpu_bytes), default=None)
    may_grow = address is not None and plan is not None and plan.cluster.autoscaling
    checks += judge_memory(demands, known, may_grow)
    return checks + judge_machines(machines, needs_of(plan, seen))


def judge_memory(demands: Sequence[Demand], gpu_bytes: int | None, may_grow: bool) -> list[Check]:
    """A line for each training on GPUs: its memory, by an estimate, and whether the largest GPU that was looked
    at holds it."""
    checks = []
    for demand in demands:
        if demand.memory is None:
            continue
        name = f"memory of {'' if demand.label.startswith('an ') else 'the '}{demand.label}"
        problem = memory_problem(demand, gpu_bytes)
        if problem is None:
            there = "; no GPU was looked at" if gpu_bytes is None else ""
            checks.append(Check(name, "ok", told(demand.memory, gpu_bytes) + there))
        else:
            found = f"{problem.found}: estimated; {problem.expected}"
            checks.append(Check(name, "note" if may_grow else "wrong", found, problem.remedy))
    return checks


def examine_plan(plan: Plan) -> tuple[list[Check], Preview | None]:
    """The store, and whether a run of the plan would be refused."""
    try:
        storage = open_storage(plan.store)
    except BtmError as exc:
        return [_wrong("store", exc)], None
    checks = examine_store(storage)
    if any(check.state == "wrong" for check in checks):
        return checks, None
    try:
        check_tracking(plan)
        seen = preview(plan, Ledger(storage))
    except BtmError as exc:
        return [*checks, _wrong("plan", exc)], None
    words = f"{plan.name}: {len(seen.steps)} steps, {seen.parameters:,} parameters"
    return [*checks, Check("plan", "ok", words)], seen


def examine_store(storage: Storage) -> list[Check]:
    """Whether it can be used, read and written, whether one of several
    racing creators wins, and its clock."""
    try:
        refuse_in_jobs_copy(storage.location)
        storage.check()
    except BtmError as exc:
        return [_wrong("store", exc)]
    checks = [Check("store", "ok", storage.location)]
    steps: list[tuple[str, Callable[[Storage], Check]]] = [
        ("store, written and read", _written_and_read),
        ("store, conditional create", _created_once),
        ("clock", _clock),
    ]
    for name, step in steps:
        try:
            checks.append(step(storage))
        except StoreError as exc:
            checks.append(_wrong(name, exc))
    return checks


def demands_of(plan: Plan, seen: Preview | None) -> Sequence[Demand]:
    """The groups that a run asks for: those of the preview, or what the plan says where there is none."""
    if seen is not None:
        return seen.demands
    return [Demand("seed", seed_resources(plan)), Demand("an expert", expert_resources(plan))]


def needs_of(plan: Plan | None, seen: Preview | None) -> Needs:
    """The needs of the plan's largest training on each machine."""
    if plan is None:
        return Needs()
    asked = [demand.how for demand in demands_of(plan, seen)]
    largest = 2 * stored_bytes(seen.parameters, with_optimizer=True) if seen is not None else 0
    compiles, on_cpu = (
        any(how.compile and (how.gpus_per_worker > 0) == on_gpu for how in asked) for on_gpu in (True, False)
    )
    return Needs(
        max([1, *(how.cpus_per_worker for how in asked)]), LEAST_FREE_BYTES + largest, compiles, on_cpu
    )


def _written_and_read(storage: Storage) -> Check:
    key, data = f"clock/{uuid.uuid4().hex}", uuid.uuid4().bytes
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "written")
        file.write_bytes(data)
        storage.upload(key, file)
    try:
        if storage.read(key) != data:
            remedy = "use another service: this one does not return what was written"
            return Check("store, written and read", "wrong", "other bytes than were written", remedy)
    finally:
        storage.delete(key)
    return Check("store, written and read", "ok", "what was written is what is read, and it can be deleted")


def _created_once(storage: Storage) -> Check:
    key, name = f"clock/{uuid.uuid4().hex}", "store, conditional create"
    try:
        with ThreadPoolExecutor(RACERS) as pool:
            winners = sum(pool.map(lambda i: storage.create(key, str(i).encode()), range(RACERS)))
        first = storage.read(key)
        again = storage.create(key, b"later")
        if winners != 1 or again or storage.read(key) != first:
            found = (
                f"{winners + again} of {RACERS + 1} creators of one object got the answer that they made it"
            )
            return Check(
                name,
                "wrong",
                found,
                "use a service that keeps `If-None-Match: *` on a PUT: races are decided by it",
            )
    finally:
        storage.delete(key)
    return Check(name, "ok", f"one of {RACERS} racing creators won, and a later one was refused")


def _clock(storage: Storage) -> Check:
    before = time.time()
    by_store = store_time(storage)
    seconds_off = max(by_store - time.time(), before - by_store - 1, 0)  # a store may show whole seconds
    if seconds_off > CLOCK_SECONDS:
        found = f"{seconds_off:.0f} s between this machine's clock and the store's"
        return Check("clock", "wrong", found, "set this machine's clock by NTP")
    return Check("clock", "ok", f"within {max(seconds_off, 1):.0f} s of the store's")


def _wrong(name: str, exc: BtmError) -> Check:
    return Check(name, "wrong", f"{exc.what}{': ' if exc.found else ''}{exc.found}", exc.remedy)
