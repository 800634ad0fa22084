"""What commands cost on forests of up to a thousand stand-in experts: CPU seconds, store calls and bytes of the
forest's log.

    python benchmarks/many_experts.py                     8, 64, 256 and 1,000 experts
    python benchmarks/many_experts.py --experts 8,64      a quick look

Experts are artifacts of a few bytes that came eight at a time, as expansions add them. Measured are the parts of
commands that know the whole forest: reading its newest version and its log, checking that its models stand,
adding a domain, verifying, collecting, planning a purge. Training and scoring are the new expert's own.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from results import Result, finish, growth_power, parse, this_machine, today
from upkeep import LATER, add_domain, commit, timed

from btm_cluster.forest import Expert, Forest, Foundation, merge_into
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.ledger.purge import plan_purge
from btm_cluster.operations.gc import find_garbage
from btm_cluster.operations.log import log
from btm_cluster.operations.verify import verify
from btm_cluster.storage.store_calls import take_store_calls

ARRIVE = 8


def main() -> None:
    """Measures each size, the smallest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", default="8,64,256,1000")
    asked = parse(parser)
    sizes = [int(size) for size in asked.experts.split(",")]
    finish([result_of({size: measure(size) for size in sizes})], asked)


def measure(experts: int) -> dict[str, tuple[float, int]]:
    """CPU seconds and store calls of each command; of the log, its size in MB and its versions."""
    with tempfile.TemporaryDirectory(prefix="many-experts-") as store:
        ledger = Ledger.open(store)
        forest = grow(ledger, experts)
        newest = forest.experts[-1]
        commands: dict[str, Callable[[], object]] = {
            "newest version": ledger.log.newest,
            "log": lambda: log(ledger),
            "models stand": lambda: ledger.check_all_standing(forest.manifests),
            "verify": lambda: verify(ledger),
            "gc, finding": lambda: find_garbage(ledger, 5, 0.0, now=LATER),
            "purge, planning": lambda: plan_purge(ledger, newest.domain),
            "adding a domain": lambda: append(ledger, forest, experts, 1),
        }
        taken = {}
        for name, act in commands.items():
            take_store_calls()
            seconds = timed(act)
            taken[name] = (seconds, sum(take_store_calls().values()))
        size = sum(entry.size_bytes for entry in ledger.storage.list("forest/"))
        return taken | {"log's size in MB": (size / 1e6, len(ledger.log.versions()))}


def grow(ledger: Ledger, experts: int) -> Forest:
    """A forest whose experts came a few at a time."""
    flush, os.fsync = os.fsync, lambda _: None  # the store is thrown away
    try:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "file")
            file.write_bytes(b"tokenizer")
            tokenizer = commit(ledger, "tokenizer", {}, {}, file)
            file.write_bytes(b"seed")
            seed = commit(ledger, "model", {"seed": 1}, {"tokenizer": (tokenizer,)}, file, {"role": "seed"})
            for number in range(experts):
                add_domain(ledger, number, f"domain-{number}", tokenizer, file)
        foundation = Foundation(seed.identity, tokenizer.identity, "0" * 64, 1024, ())
        manifests = {seed.identity: ledger.get(seed).manifest_hash}
        forest = Forest(0, foundation, (), manifests, "founded")
        ledger.log.append(forest)
        for first in range(0, experts, ARRIVE):
            forest = append(ledger, forest, first, min(ARRIVE, experts - first))
    finally:
        os.fsync = flush
    return forest


def append(ledger: Ledger, forest: Forest, first: int, count: int) -> Forest:
    """The next version, with the experts of these numbers; of none that is there, with the first one's copy."""
    models = experts_by_number(ledger)
    chosen = [models.get(number, models[0]) for number in range(first, first + count)]
    experts = [
        Expert(
            f"domain-{first + place}", one.identity, one.blobs[0].sha256, one.inputs["texts"][0].identity, ()
        )
        for place, one in enumerate(chosen)
    ]
    grown = merge_into(forest, experts, {one.identity: one.manifest_hash for one in chosen}, "added")
    ledger.log.append(grown)
    return grown


_known: dict[str, dict[int, Artifact]] = {}


def experts_by_number(ledger: Ledger) -> dict[int, Artifact]:
    """Stand-in experts, in the order in which a listing has them; listed once a store."""
    place = ledger.storage.location
    if place not in _known:
        found = [one for one in ledger.list_artifacts("model") if one.facts["role"] == "expert"]
        _known[place] = dict(enumerate(found))
    return _known[place]


def result_of(taken: dict[int, dict[str, tuple[float, int]]]) -> Result:
    """The row: by which power of the number of experts the command grows that grows most."""
    small, large = sorted(taken)[-2:]
    powers = {
        name: growth_power(small, large, taken[small][name][0], taken[large][name][0])
        for name in taken[large]
    }
    worst = max(powers, key=powers.__getitem__)
    return Result(
        name="many-experts",
        what=f"growth from {small} to {large:,} stand-in experts, as a power of their number, of what grows most: "
        f"{worst}; experts came {ARRIVE} at a time",
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
            f"{size:,} experts, CPU seconds and store calls": ", ".join(
                f"{name} {value:.2f} ({count})" for name, (value, count) in taken[size].items()
            )
            for size in sorted(taken)
        },
    )


if __name__ == "__main__":
    main()
