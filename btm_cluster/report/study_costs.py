"""The tables of a study's page on costs, and on experts by what they train, from its entries."""

import math
from collections.abc import Iterator, Mapping, Sequence

from btm_cluster.evaluation.costs import is_better
from btm_cluster.evaluation.systems import FOREST_OF
from btm_cluster.report.content import Block, Paragraph, Section, Table
from btm_cluster.report.entries import (
    BASELINES,
    CALIBRATED,
    GATE,
    PLAIN,
    Wanted,
    main_entries,
    select,
    spread,
)
from btm_cluster.report.results import Entry
from btm_cluster.report.study_tables import TABLE_1, means_table

ANSWERS = {True: "yes", False: "no", None: "open"}
SEVERAL_MODELS = {
    name: wanted
    for name, wanted in TABLE_1.items()
    if wanted["system"] in ("forest", "forest with its seed", "mixture of experts")
}

CONTINUED = {
    f"{name}: continued pretraining of the seed on all domains": wanted for name, wanted in BASELINES.items()
}
_TOLD = (
    "Training counts every model that a system needs, from the seed on, and none of a pretrained model; FLOPs are "
    "by parameters and attention, without a gradient for what is frozen. GPU-seconds are those of the trainings as "
    "they ran, neighbours on the same GPU and compilation included. A system is better at equal cost if it is, with "
    "the whole interval, and costs no more than the finished Transformer-LM; what costs more and is better leaves "
    "that open, and so does what costs less and is not."
)


def experts_blocks(entries: Sequence[Entry]) -> list[Block]:
    """Forests by what their experts train, beside the Transformer-LM; nothing where a study has none of these."""
    forests = _forests(entries)
    if not forests:
        return []
    told = (
        "All experts start from the same seed and see the same tokens. So does the Transformer-LM, of all domains at "
        "once: it is the seed's continued pretraining with as many tokens as all experts together."
    )
    rows = CONTINUED | {name: wanted for one in forests for name, wanted in _rows_of(one).items()}
    return [
        Paragraph(told),
        means_table("Experts by what they train", entries, rows),
        _sizes_table(entries, forests),
    ]


def cost_blocks(entries: Sequence[Entry], wanted: Mapping[str, Wanted]) -> list[Block]:
    """The cost of each of the wanted systems; nothing of results of earlier versions, which have none."""
    wanted = {**wanted, **{name: row for one in _forests(entries) for name, row in _rows_of(one).items()}}
    # Two tables have some rows alike.
    first = {tuple(row.items()): name for name, row in reversed(wanted.items())}
    wanted = {name: row for name, row in wanted.items() if first[tuple(row.items())] == name}
    found = {name: _with_costs(select(entries, **row)) for name, row in wanted.items()}
    rows = [[name, *_cost_cells(some)] for name, some in found.items() if some]
    if not rows:
        return []
    headings = ["system", "training tokens", "training FLOPs", "GPU-seconds", "inference FLOPs per token"]
    headings += [
        "stored",
        "bits per byte, all",
        "better at equal training cost",
        "better at equal inference cost",
    ]
    return [Paragraph(_TOLD), Table("Costs", headings, rows)]


def _forests(entries: Sequence[Entry]) -> list[str]:
    """The forests of other experts, as the study lists them."""
    named = (entry["system"] for entry in entries)
    return list(dict.fromkeys(name for name in named if name.startswith(FOREST_OF)))


def _rows_of(forest: str) -> dict[str, Wanted]:
    """The rows of a forest of other experts."""
    experts = forest.removeprefix(FOREST_OF)
    return {
        f"{experts}: each on its own domain": {"system": f"own expert of {forest}"},
        f"{experts}: ensemble, calibrated": {"system": forest, **CALIBRATED, **PLAIN},
        f"{experts}: ensemble, learned gate": {"system": forest, **GATE, **PLAIN},
        f"{experts}: average, uniform": {"system": f"average of {forest}", "prior": "uniform"},
        f"{experts}: average, posterior (fitted)": {"system": f"average of {forest}", "prior": "fitted"},
        f"{experts}: mixture of experts, top-1": {"system": f"mixture of experts of {forest}", "top_k": 1},
        f"{experts}: mixture of experts, top-2": {"system": f"mixture of experts of {forest}", "top_k": 2},
    }


def _sizes_table(entries: Sequence[Entry], forests: Sequence[str]) -> Table:
    """The ensemble of each forest, and the Transformer-LM: what is stored, and how fast it was trained."""
    wanted = {"Transformer-LM": BASELINES["Transformer-LM"]}
    wanted |= {one.removeprefix(FOREST_OF): {"system": one, **CALIBRATED, **PLAIN} for one in forests}
    rows = []
    for name, row in wanted.items():
        found = _with_costs(select(entries, **row))
        if found:
            speeds = [speed for one in found if (speed := one["cost"]["tokens_per_second"]) is not None]
            each, whole = (_bytes(_mean(found, field)) for field in ("bytes_of_each", "stored_bytes"))
            speed = f"{spread(speeds).mean:,.0f}" if speeds else "–"
            rows.append([name, each, whole, f"{_mean(found, 'training_flops'):.3g}", speed])
    headings = [
        "models",
        "stored for each",
        "stored, with what they share",
        "training FLOPs, with the seed's",
    ]
    return Table("Size and speed", [*headings, "tokens per second of each training"], rows)


def _with_costs(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.get("cost")]


def _cost_cells(entries: Sequence[Entry]) -> list[str]:
    known = [seconds for one in entries if (seconds := one["cost"]["gpu_seconds"]) is not None]
    gpu_seconds = spread(known).mean if len(known) == len(entries) else None
    bits = [entry["bits_per_byte"]["all"] for entry in entries if entry["bits_per_byte"]["all"] is not None]
    return [
        f"{_mean(entries, 'training_tokens'):,.0f}",
        f"{_mean(entries, 'training_flops'):.3g}",
        f"{gpu_seconds:,.0f}" if gpu_seconds else "–",
        f"{_mean(entries, 'inference_flops'):.3g}",
        _bytes(_mean(entries, "stored_bytes")),
        spread(bits).formatted("{:.4f}") if bits else "–",
        _at_equal_cost(entries, "training"),
        _at_equal_cost(entries, "inference"),
    ]


def _at_equal_cost(entries: Sequence[Entry], kind: str) -> str:
    """Whether the system is better with every random seed, with none, or not told by all; and its cost."""
    if all(entry["difference"] is None for entry in entries):
        return ""
    compared = [entry["at_equal_cost"][kind] for entry in entries]
    answers = {one["is_better"] for one in compared}
    answer = ANSWERS[answers.pop() if len(answers) == 1 else None]
    return f"{answer}, at {spread([one['relative_cost'] for one in compared]).mean:.2f}x"


def _mean(entries: Sequence[Entry], field: str) -> float:
    return spread([entry["cost"][field] for entry in entries]).mean


def _bytes(size: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size >= u), (1e3, "kB"))
    return f"{size / unit:.3g} {name}"


def across_sizes(entries: Sequence[Entry]) -> Iterator[Section]:
    """Systems that run several models beside the Transformer-LM of another size that costs most nearly as much;
    nothing without another size on the same texts."""
    groups = {
        size: main_entries(select(entries, size=size)) for size in dict.fromkeys(e["size"] for e in entries)
    }
    baselines = {size: _transformer_lm(own) for size, own in groups.items()}
    rows = []
    for size, own in groups.items():
        for name, wanted in SEVERAL_MODELS.items():
            found = _with_costs(select(own, **wanted))
            others = [one for other, one in baselines.items() if other != size and _on_same_texts(found, one)]
            if found and others:
                nearest = min(others, key=lambda one: abs(math.log(_relative_inference(found, one))))
                rows.append([f"{size} {name}", *_beside(found, nearest)])
    if not rows:
        return
    told = (
        "Each system beside the Transformer-LM of another size whose forward pass costs most nearly as much, at its "
        "best milestone. That one has taken other training. By means over random seeds, without an interval."
    )
    headings = ["system", "inference FLOPs per token", "bits per byte, all", "Transformer-LM of size"]
    headings += ["its bits per byte, all", "better at equal inference cost"]
    name = "At equal inference cost, across sizes"
    yield Section("across-sizes", name, [Paragraph(told), Table(name, headings, rows)])


def _transformer_lm(entries: Sequence[Entry]) -> list[Entry]:
    """A size's Transformer-LM with each random seed, at its best milestone."""
    named = {name: {e["random_seed"]: e for e in select(entries, **row)} for name, row in BASELINES.items()}
    finished, best = named.values()
    return _with_costs(list((finished | best).values()))


def _on_same_texts(some: Sequence[Entry], others: Sequence[Entry]) -> bool:
    return bool(some and others) and some[0]["per_domain"].keys() == others[0]["per_domain"].keys()


def _relative_inference(entries: Sequence[Entry], baseline: Sequence[Entry]) -> float:
    return _mean(entries, "inference_flops") / _mean(baseline, "inference_flops")


def _beside(entries: Sequence[Entry], baseline: Sequence[Entry]) -> list[str]:
    own, other = (spread([e["bits_per_byte"]["all"] for e in some]).mean for some in (entries, baseline))
    ratio = _relative_inference(entries, baseline)
    answer = ANSWERS[is_better((own - other, own - other), ratio)]
    flops = f"{_mean(entries, 'inference_flops'):.3g}"
    return [flops, f"{own:.4f}", baseline[0]["size"], f"{other:.4f}", f"{answer}, at {ratio:.2f}x"]
