"""A study's page: the paper's tables and figures, in Markdown, SVG and PNG, from results alone.

Numbers are means over random seeds, ± their standard deviation where there are several.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from btm_cluster.report.entries import (
    BASELINES,
    CALIBRATED,
    GATE,
    PAPERS,
    PLAIN,
    Wanted,
    main_entries,
    main_share,
    select,
    spread,
)
from btm_cluster.report.figures import draw_figures
from btm_cluster.report.results import KEY, Entry, Results, repeats_left

# Rows of table 1: what it is called, and which entries it is.
TABLE_1: dict[str, Wanted] = {
    **BASELINES,
    "Transformer-LM, from the seed on at the experts' rate": {
        "system": "transformer-lm at the experts' rate"
    },
    "seed": {"system": "seed"},
    "best single expert": {"system": "best single expert"},
    "the domain's own expert": {"system": "own expert"},
    "DEMix, paper's posterior": {"system": "demix", **PAPERS},
    "DEMix, calibrated": {"system": "demix", **CALIBRATED},
    "DEMix from the seed, paper's posterior": {"system": "demix-from-seed", **PAPERS},
    "DEMix from the seed, calibrated": {"system": "demix-from-seed", **CALIBRATED},
    "forest, paper's posterior": {"system": "forest", **PAPERS, **PLAIN},
    "forest, calibrated": {"system": "forest", **CALIBRATED, **PLAIN},
    "forest, learned gate": {"system": "forest", **GATE, **PLAIN},
    "forest with its seed, paper's posterior": {"system": "forest with its seed", **PAPERS, **PLAIN},
    "forest with its seed, calibrated": {"system": "forest with its seed", **CALIBRATED, **PLAIN},
    "forest with its seed, learned gate": {"system": "forest with its seed", **GATE, **PLAIN},
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


def write_page(results: Results, folder: Path) -> None:
    """Writes README.md, and the figures where there is something to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [*_size_sections(results), *draw_figures(results, folder), _texts_section(results)]
    sections += [_trials_section(results), _speeds_section(results)]
    seeds = sorted({entry["random_seed"] for entry in results.entries})
    opening = (
        "# Results of a study\n\nMade by `btm study` and `btm report` from `summary.json`; do not edit. "
        "Perplexity per token on "
        "test text, mean over texts; everything fitted or chosen was so on development text. "
        f"Random seeds: {', '.join(map(str, seeds))}; ± is the standard deviation over them.\n"
    )
    left = repeats_left(results)
    if left:
        opening += f"\n**Not finished: written with {left} of the sizes and random seeds still to come.**\n"
    (folder / "README.md").write_text(opening + "\n" + "\n".join(filter(None, sections)), encoding="utf-8")


def _size_sections(results: Results) -> Iterator[str]:
    for size in dict.fromkeys(entry["size"] for entry in results.entries):
        entries = main_entries(select(results.entries, size=size))
        first = entries[0]
        yield (
            f"## {size}: {first['non_embedding_parameters']:,} parameters without embeddings, "
            f"{first['tokens']:,} tokens, "
            f"seed share {main_share(entries)}\n"
        )
        yield _compared_with(entries)
        yield "### Table 1: systems\n\n" + _means_table(entries, TABLE_1)
        yield "### Table 2: averages of parameters, at the inference cost of one model\n\n" + _means_table(
            entries, TABLE_2
        )
        yield "### Table 8: by text\n\n" + _texts_table(entries, results.texts)
        yield "### What a posterior is worth\n\n" + _means_table(entries, _posteriors(entries))


def _compared_with(entries: Sequence[Entry]) -> str:
    """Which Transformer-LM differences are taken to, by random seed."""
    seeds: dict[str, list[str]] = {}
    for entry in select(entries, **BASELINES["Transformer-LM"]):
        seeds.setdefault(_chosen(entry.get("milestones")), []).append(str(entry["random_seed"]))
    if len(seeds) == 1:
        return f"Differences are to {next(iter(seeds))}.\n"
    listed = "; ".join(f"with random seed {', '.join(own)} to {chosen}" for chosen, own in seeds.items())
    return f"Differences are {listed}.\n"


def _chosen(milestones: Mapping[str, Any] | None) -> str:
    if milestones is None:
        return "the finished Transformer-LM; its milestones were not compared"
    best, last = milestones["best"], milestones["last"]
    if best == last:
        return "the finished Transformer-LM, which is its best milestone by the domains' development text"
    return f"the Transformer-LM at update {best:,} of {last:,}, its best milestone by the domains' development text"


def _means_table(entries: Sequence[Entry], rows: Mapping[str, Wanted]) -> str:
    lines = ["| | train | eval | all | against the Transformer-LM |", "|---|---|---|---|---|"]
    for name, wanted in rows.items():
        found = select(entries, **wanted)
        if not found:
            continue
        cells = [_words([entry[group] for entry in found]) for group in ("train", "eval", "all")]
        lines.append(f"| {name}{_some_seeds(found, entries)} | {' | '.join(cells)} | {_difference(found)} |")
    return "\n".join(lines) + "\n"


def _some_seeds(found: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """Which random seeds a row has, where the table has others too: its means
    are not to be held against theirs."""
    own, every = ({entry["random_seed"] for entry in some} for some in (found, entries))
    return "" if own == every else f" (random seed {', '.join(map(str, sorted(own)))})"


def _words(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known).words() if known else "–"


def _difference(entries: Sequence[Entry]) -> str:
    """The mean difference on all texts; with one random seed alone, the interval over documents.

    A Transformer-LM that is the baseline with one random seed and not with another differs by nothing with
    the first.
    """
    if all(entry["difference"] is None for entry in entries):
        return ""
    words = spread([100 * (entry["difference"] or 0.0) for entry in entries]).words("{:+.1f}") + " %"
    if len(entries) > 1:
        return words
    low, high = entries[0]["difference_interval"]
    return f"{words} ({100 * low:+.1f} to {100 * high:+.1f})"


def _posteriors(entries: Sequence[Entry]) -> dict[str, Wanted]:
    """Every way of mixing the forest's experts."""
    rows = dict(BASELINES)
    for entry in select(entries, system="forest"):
        key = {name: entry[name] for name in KEY if name not in ("size", "seed_share")}
        blocks, k = entry["development_blocks"], entry["top_k"]
        name = f"{entry['posterior']}, prior {entry['prior']}"
        rows[name + (f", {blocks} development blocks" if blocks else "") + (f", top {k}" if k else "")] = key
    return rows


def _texts_table(entries: Sequence[Entry], texts: Sequence[Entry]) -> str:
    rows = {name: select(entries, **TABLE_1[name]) for name in TABLE_8}
    rows = {f"{name}{_some_seeds(found, entries)}": found for name, found in rows.items() if found}
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for text in texts:
        cells = [
            _words([entry["per_domain"].get(text["name"]) for entry in found]) for found in rows.values()
        ]
        lines.append(f"| {text['name']}{' (target)' if text['is_target'] else ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _texts_section(results: Results) -> str:
    lines = [
        "## Table 7: texts\n",
        "| | training words | training tokens | development tokens | test tokens | test windows of 20 words "
        "also in training |",
        "|---|---|---|---|---|---|",
    ]
    for text in results.texts:
        words, tokens = text["words"].get("train", 0), text["tokens"]
        seen = text["test_windows_in_training"] / max(1, text["test_windows"])
        counts = [words, tokens.get("train", 0), tokens.get("development", 0), tokens.get("test", 0)]
        cells = [f"{count:,}" if count else "–" for count in counts]
        lines.append(
            f"| {text['name']}{' (target)' if text['is_target'] else ''} | {' | '.join(cells)} | {seen:.2%} |"
        )
    return "\n".join(lines) + "\n"


def _trials_section(results: Results) -> str:
    recipes = _tried_section(
        "## Recipes\n\nTried on the Transformer-LM alone; all systems were trained by the one in bold.\n",
        "learning_rate",
        {
            "learning_rate": "learning rate",
            "updates": "updates",
            "blocks_per_domain_update": "blocks of a domain per update",
        },
        "perplexity on the domains' development text",
        results.trials,
    )
    scales = _tried_section(
        "## Experts' learning rates\n\nOver the seed's at the same update. Tried on the forest alone; all "
        "experts that branch from "
        "a seed were trained by the one in bold.\n",
        "learning_rate_scale",
        {"learning_rate_scale": "scale"},
        "perplexity of the ensemble on the domains' development text",
        results.trials,
    )
    return "\n".join(filter(None, [recipes, scales]))


def _tried_section(
    opening: str, tried: str, columns: Mapping[str, str], measured: str, trials: Sequence[Entry]
) -> str:
    """The trials of one thing, with what each column is called and what they were measured by."""
    trials = [trial for trial in trials if tried in trial]
    if not trials:
        return ""
    lines = [opening, f"| | {' | '.join(columns.values())} | {measured} |", "|---" * (len(columns) + 2) + "|"]
    for trial in trials:
        cells = [_number(trial[name]) for name in columns]
        found = "diverged" if trial["development"] is None else f"{trial['development']:.2f}"
        lines.append(
            f"| {trial['size']} | {' | '.join(cells)} | {f'**{found}**' if trial['chosen'] else found} |"
        )
    return "\n".join([*lines, *_edges(trials, tried, columns[tried])]) + "\n"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _edges(trials: Sequence[Entry], name: str, words: str) -> Iterator[str]:
    """A warning for each size whose chosen value has none tried beyond it: of a
    recipe, the rival may do better there."""
    for size in dict.fromkeys(trial["size"] for trial in trials):
        values = {trial[name] for trial in select(trials, size=size)}
        chosen = {trial[name] for trial in select(trials, size=size, chosen=True)}
        for edge, side in ((max(values), "highest"), (min(values), "lowest")):
            if len(values) > 1 and edge in chosen:
                yield f"\nThe {side} {words} tried for {size} is the best: one beyond it may be better still."


def _speeds_section(results: Results) -> str:
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for speed in results.speeds:
        key = tuple(speed[name] for name in ("size", "role", "blocks_per_update", "gpus", "device"))
        groups.setdefault(key, []).append(speed)
    lines = [
        "## Speed\n",
        "As trained in the study, compilation and neighbours on the same GPU included.\n",
        "| | trained | blocks per update | GPUs of each | updates per second | tokens per second |",
        "|---|---|---|---|---|---|",
    ]
    for (size, role, blocks, gpus, device), speeds in groups.items():
        rates = [
            spread([speed[name] for speed in speeds]).mean
            for name in ("updates_per_second", "tokens_per_second")
        ]
        count = f"{gpus:g} {device}" if gpus else "CPU"
        lines.append(
            f"| {size} {role} | {len(speeds)} | {blocks} | {count} | {rates[0]:.1f} | {rates[1]:,.0f} |"
        )
    return "\n".join(lines) + "\n"
