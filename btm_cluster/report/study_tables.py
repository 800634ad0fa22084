"""The tables of a study's page, from its entries."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from btm_cluster.evaluation.rows import cost_text
from btm_cluster.report.content import Paragraph, Section, Table
from btm_cluster.report.entries import (
    BASELINES,
    CALIBRATED,
    GATE,
    PAPERS,
    PLAIN,
    Wanted,
    select,
    spread,
)
from btm_cluster.report.results import KEY, Entry, Results

# Rows of table 1: what it is called, and which entries it is.
TABLE_1: dict[str, Wanted] = {
    **BASELINES,
    "Transformer-LM, from the seed on at the experts' rate": {
        "system": "transformer-lm at the experts' rate"
    },
    "Transformer-LM, from the seed on at the experts' rate, at its best milestone": {
        "system": "transformer-lm at the experts' rate, at its best milestone"
    },
    "seed": {"system": "seed"},
    "best single expert": {"system": "best single expert"},
    "the domain's own expert": {"system": "own expert"},
    "the domain's own expert, stopped early": {"system": "own expert of forest stopped early"},
    "DEMix, paper's posterior": {"system": "demix", **PAPERS},
    "DEMix, calibrated": {"system": "demix", **CALIBRATED},
    "DEMix from the seed, paper's posterior": {"system": "demix-from-seed", **PAPERS},
    "DEMix from the seed, calibrated": {"system": "demix-from-seed", **CALIBRATED},
    "DEMix from the seed at the experts' rate, paper's posterior": {
        "system": "demix-from-seed at the experts' rate",
        **PAPERS,
    },
    "DEMix from the seed at the experts' rate, calibrated": {
        "system": "demix-from-seed at the experts' rate",
        **CALIBRATED,
    },
    "forest, paper's posterior": {"system": "forest", **PAPERS, **PLAIN},
    "forest, calibrated": {"system": "forest", **CALIBRATED, **PLAIN},
    "forest, learned gate": {"system": "forest", **GATE, **PLAIN},
    "forest with its seed, paper's posterior": {"system": "forest with its seed", **PAPERS, **PLAIN},
    "forest with its seed, calibrated": {"system": "forest with its seed", **CALIBRATED, **PLAIN},
    "forest with its seed, learned gate": {"system": "forest with its seed", **GATE, **PLAIN},
    "forest, experts stopped early, calibrated": {"system": "forest stopped early", **CALIBRATED},
    "forest, experts stopped early, learned gate": {"system": "forest stopped early", **GATE},
    "mixture of experts, top-1": {"system": "mixture of experts", "top_k": 1},
    "mixture of experts, top-2": {"system": "mixture of experts", "top_k": 2},
    "random splits, paper's posterior": {"system": "random-split", **PAPERS},
    "random splits, calibrated": {"system": "random-split", **CALIBRATED},
    "Transformer-LM, trained on the development text": {"system": "transformer-lm on development text"},
    "forest with an expert on the development text": {"system": "forest with an expert on development text"},
}
TABLE_2: dict[str, Wanted] = {
    **BASELINES,
    "average, uniform": {"system": "average", "prior": "uniform"},
    "average, argmax": {"system": "average", "prior": "argmax"},
    "average, posterior (ema)": {"system": "average", "prior": "ema"},
    "average, posterior (fitted)": {"system": "average", "prior": "fitted"},
    "average, greedy soup": {"system": "average", "prior": "greedy"},
    "average, learned soup": {"system": "average", "prior": "learned"},
    "average of random splits, uniform": {"system": "average of random-split", "prior": "uniform"},
    "ensemble, paper's posterior": {"system": "forest", **PAPERS, **PLAIN},
    "ensemble, calibrated": {"system": "forest", **CALIBRATED, **PLAIN},
}
TABLE_8 = (*BASELINES, "DEMix, paper's posterior", "forest, paper's posterior", "forest, calibrated")


def compared_with(entries: Sequence[Entry]) -> str:
    """Which Transformer-LM differences are taken to, by random seed."""
    seeds: dict[str, list[str]] = {}
    for entry in select(entries, **BASELINES["Transformer-LM"]):
        seeds.setdefault(_chosen(entry.get("milestones")), []).append(str(entry["random_seed"]))
    if len(seeds) == 1:
        return f"Differences are to {next(iter(seeds))}."
    listed = "; ".join(f"with random seed {', '.join(own)} to {chosen}" for chosen, own in seeds.items())
    return f"Differences are {listed}."


def _chosen(milestones: Mapping[str, Any] | None) -> str:
    if milestones is None:
        return "the finished Transformer-LM; its milestones were not compared"
    best, last = milestones["best"], milestones["last"]
    if best == last:
        return "the finished Transformer-LM, which is its best milestone by the domains' development text"
    return f"the Transformer-LM at update {best:,} of {last:,}, its best milestone by the domains' development text"


def stopped_at(entries: Sequence[Entry]) -> list[Paragraph]:
    """At which updates experts were stopped early, by random seed; nothing where none were."""
    of_seeds = {one["random_seed"]: one["stopped_at"] for one in entries if "stopped_at" in one}
    if not of_seeds:
        return []
    listed = "; ".join(
        f"with random seed {seed}, {', '.join(f'{domain} at {update:,}' for domain, update in own.items())}"
        for seed, own in of_seeds.items()
    )
    return [
        Paragraph(
            f"Experts stopped early, at the best milestone on their domain's development text: {listed}."
        )
    ]


def means_table(caption: str, entries: Sequence[Entry], wanted_rows: Mapping[str, Wanted]) -> Table:
    """A row for each of `wanted_rows` that was measured; bits per byte and inference cost where entries have
    them, which those of earlier versions have not."""
    has_bits = any("bits_per_byte" in entry for entry in entries)
    rows = []
    for name, wanted in wanted_rows.items():
        found = select(entries, **wanted)
        if not found:
            continue
        cells = [_cell([entry[group] for entry in found]) for group in ("train", "eval", "all")]
        bits = [_bits_and_cost(found)] if has_bits else []
        rows.append([f"{name}{_some_seeds(found, entries)}", *cells, *chain(*bits), _difference(found)])
    measured = ["train", "eval", "all", *(("bits per byte, all", "inference cost") if has_bits else ())]
    return Table(caption, ["system", *measured, "against the Transformer-LM"], rows)


def _bits_and_cost(entries: Sequence[Entry]) -> tuple[str, str]:
    known = [entry["bits_per_byte"]["all"] for entry in entries if "bits_per_byte" in entry]
    bits = [value for value in known if value is not None]
    costs = {entry["inference_cost"] for entry in entries if "inference_cost" in entry}
    return spread(bits).formatted("{:.4f}") if bits else "–", ", ".join(
        f"{cost_text(cost)}x" for cost in sorted(costs)
    ) or "–"


def _some_seeds(found: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """Which random seeds a row has, where the table has others too: its means
    are not to be held against theirs."""
    own, every = ({entry["random_seed"] for entry in some} for some in (found, entries))
    return "" if own == every else f" (random seed {', '.join(map(str, sorted(own)))})"


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known).formatted() if known else "–"


def _difference(entries: Sequence[Entry]) -> str:
    """The mean difference on all texts; with one random seed alone, the interval over documents.

    A Transformer-LM that is the baseline with one random seed and not with another differs by nothing with
    the first.
    """
    if all(entry["difference"] is None for entry in entries):
        return ""
    shown = spread([100 * (entry["difference"] or 0.0) for entry in entries]).formatted("{:+.1f}") + " %"
    if len(entries) > 1:
        return shown
    low, high = entries[0]["difference_interval"]
    return f"{shown} ({100 * low:+.1f} to {100 * high:+.1f})"


def posteriors(entries: Sequence[Entry]) -> dict[str, Wanted]:
    """Every way of mixing the forest's experts."""
    rows = dict(BASELINES)
    for entry in select(entries, system="forest"):
        key = {name: entry[name] for name in KEY if name not in ("size", "seed_share")}
        blocks, k = entry["development_blocks"], entry["top_k"]
        name = f"{entry['posterior']}, prior {entry['prior']}"
        rows[name + (f", {blocks} development blocks" if blocks else "") + (f", top {k}" if k else "")] = key
    return rows


def by_text_table(entries: Sequence[Entry], texts: Sequence[Entry]) -> Table:
    """The paper's table 8."""
    systems = {name: select(entries, **TABLE_1[name]) for name in TABLE_8}
    systems = {f"{name}{_some_seeds(found, entries)}": found for name, found in systems.items() if found}
    rows = [
        [
            _name(text),
            *(
                _cell([entry["per_domain"].get(text["name"]) for entry in found])
                for found in systems.values()
            ),
        ]
        for text in texts
    ]
    return Table("Table 8: by text", ["text", *systems], rows)


def _name(text: Entry) -> str:
    return f"{text['name']} (target)" if text["is_target"] else str(text["name"])


def texts_section(results: Results) -> Section:
    """The paper's table 7."""
    headings = ["text", "training words", "training tokens", "development tokens", "test tokens"]
    rows = []
    for text in results.texts:
        words, tokens = text["words"].get("train", 0), text["tokens"]
        seen = text["test_windows_in_training"] / max(1, text["test_windows"])
        counts = [words, tokens.get("train", 0), tokens.get("development", 0), tokens.get("test", 0)]
        rows.append([_name(text), *(f"{count:,}" if count else "–" for count in counts), f"{seen:.2%}"])
    heading = "Table 7: texts"
    return Section(
        "texts", heading, [Table(heading, [*headings, "test windows of 20 words also in training"], rows)]
    )


def speeds_section(results: Results) -> Section:
    """Updates and tokens per second of each kind of training."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for speed in results.speeds:
        key = tuple(speed[name] for name in ("size", "role", "blocks_per_update", "gpus", "device"))
        groups.setdefault(key, []).append(speed)
    rows = []
    for (size, role, blocks, gpus, device), speeds in groups.items():
        rates = [
            spread([speed[name] for speed in speeds]).mean
            for name in ("updates_per_second", "tokens_per_second")
        ]
        count = f"{gpus:g} {device}" if gpus else "CPU"
        rows.append(
            [f"{size} {role}", str(len(speeds)), str(blocks), count, f"{rates[0]:.1f}", f"{rates[1]:,.0f}"]
        )
    headings = [
        "model",
        "trained",
        "blocks per update",
        "GPUs of each",
        "updates per second",
        "tokens per second",
    ]
    told = Paragraph("As trained in the study, compilation and neighbours on the same GPU included.")
    return Section("speed", "Speed", [told, Table("Speed", headings, rows)])
