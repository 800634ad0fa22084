"""Results of benchmarks: `results.json`, a row for each measured name, and the README made from it.

A script reads its arguments by `parse` and calls `finish` with what it measured; `--record` keeps the row.

    python benchmarks/results.py        writes the README anew from results.json
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

FOLDER = Path(__file__).parent
ROWS = FOLDER / "results.json"
README = FOLDER / "README.md"
TOY = "toy"
"""The name of a size in scripts that only shows that they work."""
NAMES = {
    "train-125m": "training, GPT-2 shape of 125M parameters",
    "train-350m": "training, GPT-2 shape of 350M parameters",
    "train-1.3b": "training, GPT-2 shape of 1.3B parameters",
    "small-expert": "training small experts side by side on one GPU",
    "optimizer": "Muon beside AdamW",
    "scoring": "log-probabilities and entropies of every token",
    "adapter-ensemble": "text written by LoRA experts of one base together",
    "averaging": "a weighted average of models",
    "averages-together": "several weighted averages of the same models",
    "ensemble": "arithmetic on stored scores",
    "calibration": "fitting an ensemble's calibration",
    "gate": "fitting one text's gate",
    "text-to-blocks": "text files to token blocks",
    "compressed-text": "reading compressed JSONL",
    "store-up": "large files into an S3 bucket",
    "store-down": "large files from an S3 bucket",
    "store-up-many": "many files into an S3 bucket",
    "store-down-many": "many files from an S3 bucket",
    "store-small-reads": "many small reads from an S3 bucket",
    "upkeep": "gc, verify and purge of a large store",
    "fan-out": "starting many experts on a cluster",
    "many-experts": "commands on a forest of a thousand experts",
}
"""Names that a row may have, in the README's order."""


class Result(BaseModel):
    """One measurement, in `unit`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    what: str
    """The work: sizes and counts."""
    machine: str
    measured: datetime.date
    unit: str
    """"tokens/s" or "s", for example."""
    better: Literal["higher", "lower"]
    ours: float
    theirs: float | None
    """The peer on the same work and machine, in the same run; None where nothing else does this work."""
    peer: str | None
    """The peer's name, version and settings."""
    goal: float | None
    """Smallest ratio that is good enough, or, without a peer, the worst value of `ours` that is."""
    limit: float | None
    """The best that the machine allows; None where nothing physical sets it."""
    limit_is: str | None
    """The limit in words: which resource, and how it was measured or computed."""
    beside: dict[str, str] = Field(default_factory=dict)
    """Other figures, by what they are: CPU seconds, peak memory, seconds to the first update."""
    command: str = Field(default_factory=lambda: command_of(sys.argv))
    """The command that repeats it."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in NAMES:
            raise ValueError(f"{name!r} is not among the names of results.py: {', '.join(NAMES)}")
        return name

    @property
    def ratio(self) -> float | None:
        """How many times better ours is than the peer's; above 1, ours is."""
        if self.theirs is None:
            return None
        return self.ours / self.theirs if self.better == "higher" else self.theirs / self.ours

    @property
    def share_of_limit(self) -> float | None:
        """1 at the physical limit, less where it is not reached."""
        if self.limit is None:
            return None
        return self.ours / self.limit if self.better == "higher" else self.limit / self.ours

    @property
    def is_good_enough(self) -> bool | None:
        """None without a goal."""
        if self.goal is None:
            return None
        if self.ratio is not None:
            return self.ratio >= self.goal
        return self.ours >= self.goal if self.better == "higher" else self.ours <= self.goal


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """A script's arguments, with `--json` and `--record`; exits where a toy size is to be recorded."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON, a line each")
    parser.add_argument("--record", action="store_true", help="keep them in results.json and the README")
    asked = parser.parse_args(arguments)
    values = [
        one for value in vars(asked).values() for one in (value if isinstance(value, list) else [value])
    ]
    if asked.record and TOY in values:
        parser.error(
            "--record: a toy size only shows that the script works; leave --record out, or ask for another size"
        )
    return asked


def growth_power(small: int, large: int, at_small: float, at_large: float) -> float:
    """By which power of a size something grows from the small one to the large one; less than a thousandth counts as
    that."""
    return math.log(max(at_large, 1e-3) / max(at_small, 1e-3)) / math.log(large / small)


def command_of(arguments: Sequence[str]) -> str:
    """The command line of a script, to be repeated elsewhere: a path of this machine is its last part in capitals,
    for a reader to put their own in."""
    script, *rest = arguments
    shown = [_shown(one) for one in rest if one not in ("--json", "--record")]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *shown])


def _shown(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    is_path = os.sep in value and "://" not in value
    return option + equals + (Path(value).name.upper().replace("-", "_") if is_path else value)


def finish(results: Sequence[Result], asked: argparse.Namespace) -> None:
    """Prints the results, as a table with what was measured beside or as JSON, and records them where that was
    asked for."""
    if asked.json:
        for result in results:
            print(json.dumps(as_json(result)))
    else:
        print(table(results))
        for result in results:
            print("\n".join([result.what, *(f"{name}: {figure}" for name, figure in result.beside.items())]))
    if asked.record:
        record(results)


def record(results: Sequence[Result], rows: Path = ROWS, readme: Path = README) -> None:
    """Puts each result in the place of its name's last one, and writes the README."""
    kept = {result.name: result for result in [*stored(rows), *results]}
    ordered = [kept[name] for name in NAMES if name in kept]
    rows.write_text(json.dumps([as_json(result) for result in ordered], indent=1) + "\n", encoding="utf-8")
    readme.write_text(page(ordered), encoding="utf-8")


def stored(rows: Path = ROWS) -> list[Result]:
    """Results that were recorded."""
    if not rows.exists():
        return []
    computed = {"ratio", "share_of_limit", "is_good_enough"}
    return [
        Result(**{field: value for field, value in row.items() if field not in computed})
        for row in json.loads(rows.read_text(encoding="utf-8"))
    ]


def as_json(result: Result) -> dict[str, object]:
    """The result with what follows from it."""
    return result.model_dump(mode="json") | {
        "ratio": _rounded(result.ratio),
        "share_of_limit": _rounded(result.share_of_limit),
        "is_good_enough": result.is_good_enough,
    }


def page(results: Sequence[Result]) -> str:
    """The README."""
    lines = [*_head(), table(results, linked=True), ""]
    return "\n".join([*lines, *(line for one in results for line in _details(one))])


def table(results: Sequence[Result], linked: bool = False) -> str:
    """Markdown: a line for each result; where `linked`, its name leads to its section."""
    lines = ["| name | ours | peer | ratio | goal | share of limit |", "|---|---|---|---|---|---|"]
    for result in results:
        cells = [
            f"[{result.name}](#{result.name.replace('.', '')})" if linked else result.name,
            quantity(result.ours, result.unit),
            "" if result.theirs is None else quantity(result.theirs, result.unit),
            "" if result.ratio is None else f"{result.ratio:.2f}×",
            _goal(result),
            "" if result.share_of_limit is None else f"{result.share_of_limit:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_of_rounds(rounds: int) -> str:
    """How often something was measured, for a row's `what`."""
    return "one round" if rounds == 1 else f"best of {rounds}"


def quantity(value: float, unit: str) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def this_machine() -> str:
    """CPU, cores, memory and GPU of this machine, in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores} cores of {_cpu_name()}", f"{memory:.0f} GiB", *_gpu_names()]
    return ", ".join(parts)


def today() -> datetime.date:
    """When a result was measured."""
    return datetime.datetime.now(datetime.UTC).date()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _gpu_names() -> list[str]:
    # Not by torch, which would make this process, and what it starts, look large.
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    version = importlib.metadata.version("torch")
    return [f"{len(names)} × {names[0]}, torch {version}"] if names else []


def _head() -> list[str]:
    return [
        "# Benchmarks",
        "",
        "Each row is one measurement of this project; where people use another program for the same work, that is",
        "measured in turn on the same machine. A ratio above 1 means that ours is better. *Share of limit*, where",
        "given, is how near it is to what the hardware allows. *Goal* is a ratio, or a bound on our own figure.",
        "Written by `python benchmarks/results.py` from `results.json`; a script's `--record` adds its",
        "row to both.",
        "",
    ]


def _goal(result: Result) -> str:
    if result.goal is None:
        return ""
    wanted = f"{result.goal:g}×" if result.ratio is not None else quantity(result.goal, result.unit)
    return f"{wanted}, {'met' if result.is_good_enough else '**missed**'}"


def _details(result: Result) -> list[str]:
    sentences = [f"{NAMES[result.name]}: {result.what}"]
    if result.peer:
        sentences.append(f"peer: {result.peer}")
    if result.limit is not None:
        sentences.append(f"limit: {quantity(result.limit, result.unit)}, {result.limit_is}")
    sentences += [f"{name}: {value}" for name, value in result.beside.items()]
    return [
        f"## {result.name}",
        "",
        *(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences),
        f"Measured on {result.measured} on {result.machine}:",
        "",
        f"    {result.command}",
        "",
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


if __name__ == "__main__":
    record([])
