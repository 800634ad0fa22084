"""A study's results as files: `summary.json`, a list with an entry for each
system, and `study.json` with what it ran on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from btm_cluster.errors import UserError

SUMMARY_FILE = "summary.json"
STUDY_FILE = "study.json"
Entry = Mapping[str, Any]
OTHERS = ("speeds", "trials", "runs", "growth", "rises")
"""Lists beside the entries and the texts, those of several studies one after the other."""
KEY = ("size", "seed_share", "system", "posterior", "prior", "development_blocks", "top_k")
"""Fields that entries have in common which differ in their random seed alone."""
SHOWN = ("experts", "tokens", "train", "eval", "all", "per_domain", "difference", "difference_interval")
"""Other fields that the page reads of an entry, beside the number of parameters."""
LATER = ("growth", "rises")
"""Those that earlier versions had not."""
GROWTH_KEY = ("size", "random_seed", "step", "system", "posterior")
"""Fields of a row of growth that no two have in common."""


@dataclass(frozen=True)
class Results:
    """Results of one study, or of several that belong together."""

    entries: tuple[Entry, ...]
    texts: tuple[Entry, ...]
    speeds: tuple[Entry, ...]
    trials: tuple[Entry, ...]
    runs: tuple[Entry, ...]
    """For each study, its plan and the versions that it ran with."""
    growth: tuple[Entry, ...] = ()
    """A row for each step and system of a forest that is grown step by step."""
    rises: tuple[Entry, ...] = ()
    """Trainings whose loss ended higher than it had been."""


def write_results(results: Results, folder: Path) -> None:
    """Writes both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY_FILE).write_text(_lines(results.entries), encoding="utf-8")
    rest = {name: getattr(results, name) for name in ("texts", *OTHERS)}
    (folder / STUDY_FILE).write_text(json.dumps(rest, indent=1) + "\n", encoding="utf-8")


def _lines(entries: Sequence[Entry]) -> str:
    """A list with an entry per line, so that two versions can be compared by eye."""
    return "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"


def read_results(folders: Sequence[Path]) -> Results:
    """The results in several folders together; where two have the same system, size
    and random seed, the later one's counts, and so of growth at the same step. Equal trials and rises count once.

    Raises:
        UserError: a folder without them, not one entry in all of them, or two that cannot stand in one table.
    """
    entries: dict[tuple[Any, ...], Entry] = {}
    texts: dict[str, Entry] = {}
    rest: dict[str, list[Entry]] = {name: [] for name in ("texts", *OTHERS)}
    for folder in {folder.resolve(): folder for folder in folders}.values():
        try:
            found = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
            keyed = {_key(entry): entry for entry in found}
            _check_alike([*entries.values()], found, folder)
            entries |= keyed
            study = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))
            for name, values in rest.items():
                values += study.get(name, ()) if name in LATER else study[name]
            texts = {text["name"]: text for text in rest["texts"]}
            rest["growth"] = list({_growth_key(row): row for row in rest["growth"]}.values())
            for name in ("trials", "rises"):
                rest[name] = [row for i, row in enumerate(rest[name]) if row not in rest[name][:i]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise UserError(
                f"cannot read the results in {folder}",
                found=f"nothing called {exc}" if isinstance(exc, KeyError) else str(exc),
                expected=f"{SUMMARY_FILE} and {STUDY_FILE}, as `btm study` writes them",
                remedy="name folders that `btm study --to` or `btm report --to` wrote",
            ) from exc
    if not entries:
        raise UserError("there are no results to show", found=f"{SUMMARY_FILE} without an entry")
    others = (tuple(rest[name]) for name in OTHERS)
    return Results(tuple(entries.values()), tuple(texts.values()), *others)


def _check_alike(earlier: Sequence[Entry], later: Sequence[Entry], folder: Path) -> None:
    """Refuses to join studies of one size whose rows are not to be held against each other.

    Raises:
        UserError: naming in what they differ.
    """
    baselines = [
        [entry for entry in entries if entry["system"] == "transformer-lm"] for entries in (earlier, later)
    ]
    for one, other in product(*baselines):
        if one["size"] != other["size"]:
            continue
        alike = ("tokens", "experts", "non_embedding_parameters")
        pairs = {name: (one[name], other[name]) for name in alike}
        pairs["texts"] = (", ".join(sorted(one["per_domain"])), ", ".join(sorted(other["per_domain"])))
        if one["random_seed"] == other["random_seed"]:
            pairs[f"the Transformer-LM's perplexity with random seed {one['random_seed']}"] = (
                one["all"],
                other["all"],
            )
        differing = [f"{name}: {old} and {new}" for name, (old, new) in pairs.items() if old != new]
        if differing:
            raise UserError(
                f"the results in {folder} cannot stand in one table with those before it",
                found=f"size {one['size']}, {'; '.join(differing)}",
                expected="one size, budget and set of texts, and one Transformer-LM for each random seed",
                remedy="write a page for each, or give their sizes names of their own",
            )


def check_nothing_is_lost(folder: Path, results: Results) -> None:
    """Refuses results that would replace others in a folder which they do not hold,
    or finished ones by unfinished ones.

    Raises:
        UserError: naming the folder.
    """
    if not (folder / SUMMARY_FILE).exists():
        return
    old = read_results([folder])
    missing = _keys(old) - _keys(results)
    if missing or (repeats_left(results) and not repeats_left(old)):
        raise UserError(
            f"results in {folder} would be lost",
            found=f"{len(missing)} entries and rows of growth that the new ones lack"
            if missing
            else "finished results, and unfinished new ones",
            remedy="name another folder with --to",
        )


def repeats_left(results: Results) -> int:
    """Parts that the studies had still to come when they were written: sizes and random seeds, and growth."""
    return sum(run.get("repeats_left", 0) for run in results.runs)


def _keys(results: Results) -> set[tuple[Any, ...]]:
    """The keys of all entries and of all rows of growth."""
    return {*map(_key, results.entries), *map(_growth_key, results.growth)}


def _growth_key(row: Entry) -> tuple[Any, ...]:
    return tuple(row[name] for name in GROWTH_KEY)


def _key(entry: Entry) -> tuple[Any, ...]:
    """The key of an entry, its random seed included. KeyError: it lacks something that the page reads."""
    missing = [name for name in (*SHOWN, "non_embedding_parameters") if name not in entry]
    if missing:
        raise KeyError(missing[0])
    return (entry["random_seed"], *(entry[name] for name in KEY))
