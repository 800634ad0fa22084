"""Several averages of the same eight models in one pass over them, beside a pass for each.

    python benchmarks/averages_together.py --weightings 8

Models, stores and times are those of `averaging.py`. Averages with a pass each are made one after the other, as in
a single process, and four at a time, as many as an actor on a cluster makes at once.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from averaging import MIB, MODELS, SHAPES, Silent, clear, make_models
from contenders import fastest, in_turn
from results import Result, best_of_rounds, finish, parse, quantity, this_machine, today

AT_ONCE = 4


def main() -> None:
    """Makes the models, and runs the contenders in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="374m")
    parser.add_argument("--weightings", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument(
        "--in", type=Path, dest="inside", help=argparse.SUPPRESS
    )  # the process of a contender
    parser.add_argument("--alone", type=int, default=0, help=argparse.SUPPRESS)  # so many at a time
    asked = parse(parser)
    if asked.inside:
        average_in(asked.inside, asked.weightings, asked.alone)
        return
    with tempfile.TemporaryDirectory(prefix="averages-", dir=asked.folder) as scratch:
        folder = Path(scratch)
        finish([compare(folder, make_models(folder, asked.size), asked)], asked)


def compare(folder: Path, input_bytes: int, asked: argparse.Namespace) -> Result:
    """All contenders on the same files, after a pass that fills the system's cache."""
    together = [sys.executable, __file__, "--in", str(folder), "--weightings", str(asked.weightings)]
    commands = {
        "together": together,
        "one after the other": [*together, "--alone", "1"],
        f"{AT_ONCE} at a time": [*together, "--alone", str(AT_ONCE)],
    }
    in_turn({"together": together}, 1, partial(clear, folder))
    runs = in_turn(commands, asked.rounds, partial(clear, folder))
    taken = {who: fastest(of_one) for who, of_one in runs.items()}
    alone = min(list(taken.values())[1:], key=lambda usage: usage.seconds)
    figures = {
        "Seconds": lambda usage: f"{usage.seconds:.1f}",
        "CPU seconds": lambda usage: f"{usage.cpu_seconds:.1f}",
        "Peak anonymous memory": lambda usage: f"{usage.peak_anonymous_bytes / MIB:,.0f} MiB",
    }
    return Result(
        name="averages-together",
        what=f"{asked.weightings} averages of {MODELS} Llama-shaped models in bf16, "
        f"{quantity(input_bytes / 1e9, 'GB')}, on a warm cache, from a store to that store; whole processes, "
        f"{best_of_rounds(asked.rounds)}",
        machine=this_machine(),
        measured=today(),
        unit="s",
        better="lower",
        ours=taken["together"].seconds,
        theirs=alone.seconds,
        peer="a pass for each, one after the other or four at a time, whichever is quicker",
        goal=1.0,
        limit=None,
        limit_is=None,
        beside={
            name: ", ".join(f"{who} {figure(usage)}" for who, usage in taken.items())
            for name, figure in figures.items()
        },
    )


def average_in(folder: Path, weightings: int, alone: int) -> None:
    """The process of a contender: all averages in one step, or with `alone` in a step for each, so many at a time."""
    from btm_cluster.ledger import Ledger
    from btm_cluster.requests import AverageRequest
    from btm_cluster.steps.registry import run_batch

    ledger = Ledger.open(str(folder / "store"))
    models = tuple(one.ref for one in ledger.list_artifacts("model") if "number" in one.recipe)
    shares = [[1 + (turn * model) % 101 for model in range(len(models))] for turn in range(weightings)]
    requests = [
        AverageRequest(f"average {turn}", models, tuple(share / sum(of_all) for share in of_all))
        for turn, of_all in enumerate(shares)
    ]
    batches = [[request] for request in requests] if alone else [requests]
    with ThreadPoolExecutor(max(1, alone)) as pool:
        list(pool.map(lambda batch: list(run_batch(batch, ledger, Silent())), batches))


if __name__ == "__main__":
    main()
