"""From a plan to its verdict: what happens when, and in which share of the time the GPU computes.

    python benchmarks/plan_to_verdict.py quickstart                              what `make run` does
    python benchmarks/plan_to_verdict.py quickstart --beside main --repeats 3    beside another commit, in turn
    python benchmarks/plan_to_verdict.py --plan PLAN.yaml --json result.json
    python benchmarks/plan_to_verdict.py --corpus CORPUS --domains 4 --targets 4 --updates 1600 --kill-an-expert

Runs `btm run` in a process of its own, from an empty store, on a Ray cluster that it starts itself.
Prints a timeline in seconds since the command started, the longest stretches between two events, and the
share of time in which GPUs run kernels or, without a GPU, the share of CPU time. Events come from progress
lines (a first update is told up to 1.5 s late) and from the manifests in the store.

`--kill-an-expert` kills the process of a training, as a lost machine would, once an expert is half way. On a CPU the hash
of the experts' weights, which is printed, is that of a run without it; on a GPU compare the verdicts.

A corpus has a folder for each text, in CORPUS/train_domains and CORPUS/eval_domains, with files train.*,
valid.* and test.*; the plan then has the settings of docs/results/3m, with other updates.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from busy_share import CpuMeter, GpuMeter, Process, gpu_meter, mean_between
from checkouts import ROOT, Tree, check_code, checked_out, commit_of
from corpus_plan import MODEL_SIZES, corpus_plan
from expert_killer import ExpertKiller, experts_hash
from run_timeline import Event, first_update, last_score, longest_waits, parse_line, read_store, timeline


@dataclass(frozen=True)
class Run:
    """The timeline and shares of one run. Seconds count from the start of the command."""

    tree: str
    commit: str
    verdict_seconds: float
    exit_seconds: float
    load_before: float
    timeline: list[Event]
    gpu_method: str | None
    gpu_share_of_run: float | None
    gpu_share_of_work: float | None
    """Between the seed's first update and the last score, as all shares of work."""
    cpu_method: str
    cpu_share_of_run: float
    cpu_share_of_work: float | None
    cpu_seconds_of_others: float
    processes: list[Process]
    sentence: str
    weights: str
    """A hash of all experts' weights: on a CPU the same in every run."""
    killed: str | None
    """The process that was killed, and when; None where none was to be."""
    lines: list[tuple[float, str]]


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="plan-to-verdict-") as scratch, ExitStack() as stack:
        plan, folder = _plan(arguments, Path(scratch))
        trees = [Tree("this tree", ROOT)]
        if arguments.beside:
            checkout = stack.enter_context(checked_out(arguments.beside, Path(scratch)))
            trees.append(Tree(arguments.beside, checkout))
        runs = []
        for number in range(arguments.repeats):
            for tree in trees if number % 2 == 0 else reversed(trees):
                with tempfile.TemporaryDirectory(prefix="run-", dir=scratch) as own:
                    runs.append(_run(tree, plan, folder, Path(own), arguments.kill_an_expert))
                _show(runs[-1])
    summary = _summary(runs, [tree.name for tree in trees])
    print(summary["words"])
    if arguments.json:
        whole = {**summary, "cores": psutil.cpu_count(), "plan": plan, "runs": [asdict(run) for run in runs]}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("preset", nargs="?", choices=["quickstart"])
    asked.add_argument("--plan", type=Path, help="a plan, whose store is left out")
    asked.add_argument("--corpus", type=Path)
    parser.add_argument("--beside", metavar="COMMIT", help="runs the plan by this commit's code too, in turn")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="everything that was measured goes there too"
    )
    parser.add_argument("--kill-an-expert", action="store_true", help="half way through its training")
    of_corpus = parser.add_argument_group("with --corpus")
    of_corpus.add_argument("--domains", type=int, default=8)
    of_corpus.add_argument("--targets", type=int, default=8)
    of_corpus.add_argument("--updates", type=int, default=600)
    of_corpus.add_argument("--model-size", choices=MODEL_SIZES, default="3m")
    of_corpus.add_argument("--blocks", type=int, default=32, help="of each domain in an update")
    of_corpus.add_argument("--seed-share", type=float, default=0.75)
    of_corpus.add_argument("--seed-gpus", type=float, help="a part of one, or 0 without a GPU")
    of_corpus.add_argument(
        "--gpus-per-expert", type=float, help="a part of one for each domain, or 0 without a GPU"
    )
    return parser.parse_args()


def _plan(arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], Path]:
    """The plan as plain values, and the folder that its relative paths are relative to."""
    if arguments.plan:
        return yaml.safe_load(arguments.plan.read_text(encoding="utf-8")), arguments.plan.resolve().parent
    if arguments.corpus:
        gpus = 0 if gpu_meter() is None else 1
        if arguments.seed_gpus is None:  # beside it the Transformer-LM, and all experts at once
            arguments.seed_gpus = 0.3 * gpus
        if arguments.gpus_per_expert is None:
            arguments.gpus_per_expert = gpus * (4_000 // arguments.domains) / 10_000
        return corpus_plan(arguments), Path.cwd()
    started = time.monotonic()
    command = [sys.executable, "-m", "btm_cluster", "quickstart"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=scratch, env=environment, check=True, stdout=subprocess.DEVNULL)
    print(f"text by btm quickstart: {time.monotonic() - started:.1f} s, not counted")
    return yaml.safe_load((scratch / "quickstart.yaml").read_text(encoding="utf-8")), scratch


def _run(tree: Tree, plan: Mapping[str, Any], folder: Path, own: Path, kills: bool) -> Run:
    """Runs the plan once by a tree's code, in an empty store; with `kills`, one of its trainings is killed."""
    # In the folder that its paths begin at.
    file, store = folder / f".{own.name}.yaml", own / "store"
    file.write_text(yaml.safe_dump({**plan, "store": str(store)}, sort_keys=False), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    others = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment |= {"PYTHONPATH": os.pathsep.join([str(tree.folder), *others]), "PYTHONUNBUFFERED": "1"}
    python = [sys.executable, "-P"]  # without the current folder, where another tree may be
    check_code(python, tree, folder, environment)
    load, meter, lines = os.getloadavg()[0], gpu_meter(), list[tuple[float, str]]()
    domains = {text["name"] for text in plan["domains"]}
    command = [*python, "-m", "btm_cluster", "run", str(file), "--json"]
    began = time.time()
    with ExitStack() as stack:
        stack.callback(file.unlink)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        child = stack.enter_context(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
        cpu = stack.enter_context(CpuMeter(child.pid))
        killer = ExpertKiller(domains, psutil.Process(child.pid)) if kills else None
        if meter is not None:
            stack.enter_context(meter)
        result, verdict_at = _listen(child, began, lines, killer)
        ended = time.time()
    if child.returncode:
        sys.exit(
            "\n".join(
                [*(line for _, line in lines[-20:]), f"btm run by {tree.name}: exit {child.returncode}"]
            )
        )
    if killer is not None and killer.killed is None:
        sys.exit("no training was killed: the experts were too short, or none ran in a Ray worker of its own")
    made, names = read_store(store, began)
    progress = [said for said in (parse_line(*line) for line in lines) if said is not None]
    events = timeline(progress, made, names, verdict_at - began)
    return Run(
        tree=tree.name,
        commit=commit_of(tree.folder),
        verdict_seconds=verdict_at - began,
        exit_seconds=ended - began,
        load_before=load,
        timeline=events,
        sentence=json.loads(result)["verdict"]["sentence"],
        weights=experts_hash(store),
        killed=killer.killed if killer is not None else None,
        lines=lines,
        **_shares(events, meter, cpu, began, ended),
    )


def _listen(
    child: subprocess.Popen[str], began: float, lines: list[tuple[float, str]], killer: ExpertKiller | None
) -> tuple[str, float]:
    """Waits for the end of `btm run --json`: what it printed and when, while its progress goes to `lines`."""
    assert child.stdout is not None
    assert child.stderr is not None
    progress = child.stderr

    def note() -> None:
        for line in progress:
            lines.append((round(time.time() - began, 3), line.rstrip()))
            if killer is not None:
                killer.look(line, time.time() - began)

    listener = threading.Thread(target=note, daemon=True)
    listener.start()
    first = child.stdout.read(1)  # the verdict is printed at once
    verdict_at = time.time()
    result = first + child.stdout.read()
    child.wait()
    listener.join()
    return result, verdict_at


def _shares(
    events: Sequence[Event], meter: GpuMeter | None, cpu: CpuMeter, began: float, ended: float
) -> dict[str, Any]:
    """How busy the machine was, over the run and between the seed's first update and the last score."""
    first, last = first_update(events), last_score(events)
    work = (began + first, began + last) if first is not None and last is not None else None
    readings = meter.readings if meter is not None else []
    return {
        "gpu_method": meter.method if meter is not None else None,
        "gpu_share_of_run": mean_between(readings, began, ended),
        "gpu_share_of_work": mean_between(readings, *work) if work else None,
        "cpu_method": cpu.method,
        "cpu_share_of_run": cpu.share(began, ended),
        "cpu_share_of_work": cpu.share(*work) if work else None,
        "cpu_seconds_of_others": cpu.seconds_of_others,
        "processes": [replace(p, began=p.began - began, seen=p.seen - began) for p in cpu.processes],
    }


def _show(run: Run) -> None:
    print(f"\n{run.tree} ({run.commit}): verdict after {run.verdict_seconds:.1f} s, ", end="")
    print(f"command ended after {run.exit_seconds:.1f} s; load average before {run.load_before:.1f}")
    for event in run.timeline:
        print(f"{event.seconds:9.1f}  {event.name:24} {event.what}")
    print("longest stretches between two events")
    for seconds, earlier, later in longest_waits(run.timeline):
        print(f"{seconds:9.1f}  {earlier.name} {earlier.what} → {later.name} {later.what}")
    if run.gpu_method is not None:
        print(
            f"GPU: {_percent(run.gpu_share_of_work)} from the seed's first update to the last score, ", end=""
        )
        print(f"{_percent(run.gpu_share_of_run)} of the whole run ({run.gpu_method})")
    else:
        print("no GPU on this machine; CPU instead")
    print(f"CPU: {_percent(run.cpu_share_of_work)} from the seed's first update to the last score, ", end="")
    print(f"{_percent(run.cpu_share_of_run)} of the whole run ({run.cpu_method})")
    print(f"{len(run.processes)} processes; CPU seconds: {_by_name(run.processes)}; ", end="")
    print(f"what is not of the run {run.cpu_seconds_of_others:.0f}")
    print(run.sentence)
    print(f"the experts' weights: {run.weights}")
    if run.killed is not None:
        print(f"killed: {run.killed}")


def _by_name(processes: Sequence[Process]) -> str:
    """The CPU seconds of processes of a name together, the most first, and how many there were."""
    counts = Counter(process.name for process in processes)
    seconds: Counter[str] = Counter()
    for process in processes:
        seconds[process.name] += process.cpu_seconds  # type: ignore[assignment]
    return ", ".join(f"{name} {used:.0f} ({counts[name]})" for name, used in seconds.most_common(10))


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _summary(runs: Sequence[Run], trees: Sequence[str]) -> dict[str, Any]:
    """Each tree's times and, of two, the ratio of their medians: over 1 where this tree is faster."""
    seconds = {tree: [run.verdict_seconds for run in runs if run.tree == tree] for tree in trees}
    medians = {tree: statistics.median(times) for tree, times in seconds.items()}
    words = [f"{t}: {', '.join(f'{s:.1f}' for s in seconds[t])} s, median {medians[t]:.1f} s" for t in trees]
    ratio = medians[trees[1]] / medians[trees[0]] if len(trees) > 1 else None
    if ratio is not None:
        words.append(f"{trees[1]} takes {ratio:.2f} times as long as {trees[0]}")
    return {"words": "\n".join(["", *words]), "verdict_seconds": seconds, "ratio": ratio}


if __name__ == "__main__":
    main()
