"""What `btm verify`, `btm gc` and a purge cost in stores of many artifacts, and whether that grows linearly.

    python benchmarks/upkeep.py --artifacts 1000,10000,100000
    python benchmarks/upkeep.py --artifacts 500,2000            a quick look

The store is a folder. Of every ten domains one is purged, with all that was made of it; then all others are
collected, since no forest names them. Files have a few bytes each: what counts is how many there are.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import Result, finish, growth_power, parse, this_machine, today

from btm_cluster.identity import Inputs, Ref, identity_by
from btm_cluster.ledger import Ledger, Origin
from btm_cluster.ledger.purge import plan_purge, purge
from btm_cluster.operations.gc import collect, find_garbage
from btm_cluster.operations.verify import verify

DOMAIN_ARTIFACTS = 5
DOMAINS_PURGED = 10
LATER = 10.0**11


def main() -> None:
    """Measures each size, the smallest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifacts", default="1000,10000,100000")
    parser.add_argument("--folder", type=Path, help="for the store; default: a temporary one")
    asked = parse(parser)
    sizes = [int(size) for size in asked.artifacts.split(",")]
    taken = {size: measure(size, asked.folder) for size in sizes}
    finish([result_of(taken)], asked)


def measure(artifacts: int, folder: Path | None) -> dict[str, float]:
    """CPU seconds of each command in a store of so many artifacts."""
    with tempfile.TemporaryDirectory(prefix="upkeep-", dir=folder) as store:
        ledger = Ledger.open(store)
        domains = fill(ledger, artifacts)
        taken = {"verify": timed(lambda: verify(ledger))}
        taken["find garbage"] = timed(lambda: find_garbage(ledger, 1, 0.0, now=LATER))
        taken["purge of one domain"] = timed(lambda: purge(ledger, plan_purge(ledger, domains[0])))
        taken[f"purge of a domain with a {DOMAINS_PURGED}th of all"] = timed(
            lambda: purge(ledger, plan_purge(ledger, "large"))
        )
        taken["delete garbage"] = timed(lambda: collect(ledger, find_garbage(ledger, 1, 0.0, now=LATER)))
        return taken


def timed(act: Callable[[], Any]) -> float:
    """CPU seconds, of all threads: what else the machine does hardly changes them."""
    before = time.process_time()
    act()
    return time.process_time() - before


def fill(ledger: Ledger, artifacts: int) -> list[str]:
    """Domains with a source, a text, token blocks, a model and scores each; their names. The last of every
    ten go by one name."""
    flush, os.fsync = os.fsync, lambda _: None  # the store is thrown away
    try:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "file")
            file.write_bytes(b"tokenizer")
            tokenizer = commit(ledger, "tokenizer", {}, {}, file)
            count = artifacts // DOMAIN_ARTIFACTS
            names = [f"domain-{n}" if n % DOMAINS_PURGED else "large" for n in range(1, count + 1)]
            for number, name in enumerate(names):
                add_domain(ledger, number, name, tokenizer, file)
    finally:
        os.fsync = flush
    return names


def add_domain(ledger: Ledger, number: int, name: str, tokenizer: Ref, file: Path) -> None:
    """A domain's artifacts, each with a file of its own."""

    def write(what: str) -> Path:
        file.write_text(f"{what} {number}")
        return file

    documents = identity_by("documents", {"number": number}, {})
    text = Ref("text", documents)
    ledger.commit(Origin(text, {"documents": documents}, {}), {"file": write("text")}, {})
    source = Ref("source", identity_by("source", {"number": number}, {}))
    ledger.commit(Origin(source, {"number": number}, {}), {}, {}, {"name": name}, parts=[text])
    inputs: Inputs = {"text": (text,), "tokenizer": (tokenizer,)}
    tokens = commit(ledger, "tokens", {}, inputs, write("tokens"))
    facts = {"role": "expert", "origin": "0" * 64}
    model = commit(ledger, "model", {}, {"texts": (text,), "tokenizer": (tokenizer,)}, write("model"), facts)
    commit(ledger, "scores", {}, {"model": (model,), "tokens": (tokens,)}, write("scores"))


def commit(
    ledger: Ledger, kind: str, recipe: dict[str, Any], inputs: Inputs, file: Path, facts: Any = None
) -> Ref:
    """An artifact of one file."""
    origin = Origin(Ref(kind, identity_by(kind, recipe, inputs)), recipe, inputs)
    return ledger.commit(origin, {"file": file}, facts or {}).ref


def result_of(taken: dict[int, dict[str, float]]) -> Result:
    """The row: by which power of the number of artifacts the slowest-growing-wrong command grows."""
    sizes = sorted(taken)
    small, large = sizes[-2], sizes[-1]
    powers = {
        name: growth_power(small, large, taken[small][name], taken[large][name]) for name in taken[large]
    }
    worst = max(powers, key=powers.__getitem__)
    return Result(
        name="upkeep",
        what=f"growth of the CPU time of `verify`, `gc` and purges from {small:,} to {large:,} artifacts in a folder, "
        f"as a power of their number: 1 is linear; of the command that grows most, {worst}",
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
        beside={
            f"CPU seconds at {size:,}": ", ".join(
                f"{name} {seconds:.2f}" for name, seconds in taken[size].items()
            )
            for size in sizes
        },
    )


if __name__ == "__main__":
    main()
