"""Costs of commands on forests of up to a thousand stand-in experts: CPU seconds, store calls, memory of the
driver, and bytes of the forest's log.

    python benchmarks/many_experts.py                     8, 64, 256 and 1,000 experts
    python benchmarks/many_experts.py --experts 8,64      a quick look

Experts are artifacts of a few bytes that came eight at a time, as expansions add them, and training takes no time.
Scores of a text are those of a few made-up experts, repeated. All else is the commands' own code: a domain from
the inbox is expanded by, with the fit and the average that its expert starts from; its text is evaluated under all
experts from stored scores; and versions are listed, shown, compared, served, verified, collected and purged.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from results import Result, finish, growth_power, parse, this_machine, today
from stand_ins import ARRIVE, SCORED, StandIns, grow_many, plan_for, without_waiting_for_disk
from upkeep import LATER, timed

from btm_cluster.driver.driver import Driver
from btm_cluster.forest import describe_forest
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.ledger.purge import plan_purge
from btm_cluster.mixing.fitting import cross_fitted_perplexity, one_thread_each
from btm_cluster.mixing.scores import ScoreStack
from btm_cluster.operations.diff import diff
from btm_cluster.operations.expand import expand, find_new
from btm_cluster.operations.gc import find_garbage
from btm_cluster.operations.log import log
from btm_cluster.operations.show import show
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from btm_cluster.requests import StepRequest
from btm_cluster.steps.mixture import mixture_of_store
from btm_cluster.storage.store_calls import take_store_calls

SIZE = "the log's size"
NEW = "arrived"


@dataclass(frozen=True)
class Cost:
    """The cost of a command."""

    seconds: float
    """CPU seconds of all threads."""
    calls: int
    """To the store."""
    megabytes: float
    """By which the process's memory rose above what it was before, at its peak."""

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.calls:,} calls, {self.megabytes:.0f} MB"


def main() -> None:
    """Measures each size in a process of its own, the smallest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", default="8,64,256,1000")
    asked = parse(parser)
    sizes = [int(size) for size in asked.experts.split(",")]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        measured = dict(zip(sizes, pool.map(measure, sizes), strict=True))
    taken = {size: costs for size, (costs, _) in measured.items()}
    finish([result_of(taken, {size: megabytes for size, (_, megabytes) in measured.items()})], asked)


def measure(experts: int) -> tuple[dict[str, Cost], float]:
    """The cost of each command by its name, and the log's size in MB."""
    with tempfile.TemporaryDirectory(prefix="many-experts-") as folder:
        plan = plan_for(Path(folder), [f"domain-{number}" for number in range(ARRIVE)])
        ledger = Ledger.open(plan.store)
        forest = grow_many(plan, ledger, experts)
        size = sum(entry.size_bytes for entry in ledger.storage.list("forest/")) / 1e6
        workers = Apart(ledger)
        deliver(plan)
        commands: dict[str, Callable[[], object]] = {
            "newest version": ledger.log.newest,
            "look up models": lambda: ledger.check_all_standing(forest.manifests),
            "expand --dry-run": lambda: find_new(plan, ledger),
            "expand by a domain": lambda: expand_by_one(plan, ledger, workers),
            "evaluate its text": lambda: evaluate(plan, ledger, workers),
            "forest show": lambda: describe_forest(show(ledger).forest),
            "forest log": lambda: log(ledger),
            "forest diff": lambda: diff(ledger, 0, forest.version),
            "read forest for serve": lambda: mixture_of_store(ledger),
            "verify": lambda: check(ledger),
            "find garbage": lambda: find_garbage(ledger, 5, 0.0, now=LATER),
            "plan a purge": lambda: plan_purge(ledger, NEW),
        }
        return {name: workers.cost_of(act) for name, act in commands.items()}, size


class Apart(StandIns):
    """Stand-ins that keep their own cost out of the driver's."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._own_seconds, self._driver_calls = 0.0, 0

    def cost_of(self, act: Callable[[], object]) -> Cost:
        """The cost of one command in this process, without the time in which stand-ins are made."""
        process = psutil.Process()
        before = process.memory_info().rss
        # The kernel then counts the peak anew (proc(5)).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._own_seconds, self._driver_calls = 0.0, 0
        take_store_calls()
        seconds = timed(act) - self._own_seconds
        self._count()
        return Cost(seconds, self._driver_calls, max(0.0, peak_bytes() - before) / 1e6)

    def make(self, request: StepRequest) -> Artifact:
        self._count()
        started = time.process_time()
        try:
            return super().make(request)
        finally:
            self._own_seconds += time.process_time() - started
            take_store_calls()

    def _count(self) -> None:
        self._driver_calls += sum(take_store_calls().values())


def peak_bytes() -> int:
    """The most memory of this process since the kernel counts."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def deliver(plan: Plan) -> None:
    """A domain in the inbox."""
    folder = Path(plan.store, "inbox", NEW)
    folder.mkdir(parents=True)
    Path(folder, "text.jsonl").write_text('{"text": "new"}\n', encoding="utf-8")
    Path(folder, "READY").touch()


def expand_by_one(plan: Plan, ledger: Ledger, workers: StandIns) -> None:
    """`btm expand` of what is in the inbox, with workers that train nothing."""
    with without_waiting_for_disk():
        expanded = expand(plan, Driver(ledger, workers))
    assert expanded.added == (NEW,), expanded


def evaluate(plan: Plan, ledger: Ledger, workers: StandIns) -> None:
    """The ensemble's perplexity on the new domain's text, fitted and measured on stored scores."""
    (fit,) = workers.fits
    with one_thread_each():  # as texts are evaluated, several at a time
        stack = ScoreStack.of(ledger, fit.development)
        cross_fitted_perplexity(*stack.take(0, plan.merging.development_blocks), plan.merging)


def check(ledger: Ledger) -> None:
    """`btm verify`, which finds nothing."""
    problems = verify(ledger).problems
    assert not problems, problems


def result_of(taken: dict[int, dict[str, Cost]], sizes_mb: dict[int, float]) -> Result:
    """The row: by which power of the number of experts grows what grows most."""
    small, large = sorted(taken)[-2:]
    powers = {
        name: growth_power(small, large, taken[small][name].seconds, cost.seconds)
        for name, cost in taken[large].items()
    } | {SIZE: growth_power(small, large, sizes_mb[small], sizes_mb[large])}
    worst = max(powers, key=powers.__getitem__)
    return Result(
        name="many-experts",
        what=f"growth from {small} to {large:,} stand-in experts, as a power of their number, of what grows most: "
        f"{worst}; experts came {ARRIVE} at a time, and a text has {SCORED:,} scored tokens",
        machine=this_machine(),
        measured=today(),
        unit="exponent",
        better="lower",
        ours=powers[worst],
        theirs=None,
        peer=None,
        goal=1.15,
        limit=None,
        limit_is=None,
        beside={"growth": ", ".join(f"{name} {power:.2f}" for name, power in powers.items())}
        | {
            f"{size:,} experts": f"the log {sizes_mb[size]:.2f} MB; "
            + "; ".join(f"{name} {cost}" for name, cost in taken[size].items())
            for size in sorted(taken)
        },
    )


if __name__ == "__main__":
    main()
