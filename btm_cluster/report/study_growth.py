"""The section of a study's page on growth: a forest that gets its domains one by one, step by step."""

from collections.abc import Iterator, Sequence

from btm_cluster.curve import Rise
from btm_cluster.report.content import Block, Paragraph, Section, Table
from btm_cluster.report.results import Entry, Results

POSTERIORS = {"full": "paper's posterior", "calibrated": "calibrated"}
_TOLD = (
    "The forest is founded on the first domains and gets the others one by one, as `btm expand` adds them: each new "
    "expert starts from the seed, or from the average of the experts so far by their posterior on its text or "
    "uniformly. The Transformer-LM is retrained from its start on the domains of each step, and taken at its best "
    "milestone. Differences are to it. In the end the forest is held against one that was founded on all domains, "
    "and domains are taken out of it, for which nothing is trained. Costs are of trainings; those of a step are what "
    "the step adds."
)
_HEADINGS = (
    "step",
    "system",
    "domains it has",
    "domains to come or removed",
    "targets",
    "all texts",
    "bits per byte, all",
    "against the retrained Transformer-LM",
    "tokens of the step",
    "tokens so far",
    "GPU-seconds of the step",
)


def growth_sections(results: Results) -> Iterator[Section]:
    """A section for each size and random seed that was grown step by step."""
    for size, random_seed in dict.fromkeys((one["size"], one["random_seed"]) for one in results.growth):
        rows = [one for one in results.growth if (one["size"], one["random_seed"]) == (size, random_seed)]
        heading = f"Growth: {size}, random seed {random_seed}"
        table = Table(heading, list(_HEADINGS), [_row(entry) for entry in rows])
        blocks: list[Block] = [Paragraph(_TOLD), *_totals(rows), table, *_rises(rows)]
        yield Section(f"growth-{size}-{random_seed}", heading, blocks)


def _row(entry: Entry) -> list[str]:
    return [
        f"{len(entry['domains'])} domains, {entry['change']}",
        _system(entry),
        *(_perplexity(entry[name]) for name in ("known", "unknown", "eval", "all")),
        "–" if entry["bits_per_byte"] is None else f"{entry['bits_per_byte']:.4f}",
        _difference(entry),
        f"{entry['tokens']:,}",
        f"{entry['tokens_so_far']:,}",
        _gpu_seconds(entry),
    ]


def _gpu_seconds(entry: Entry) -> str:
    """Those of the step; nothing known where none were spent so far, as on CPUs."""
    is_known = entry["gpu_seconds"] is not None and entry["gpu_seconds_so_far"]
    return f"{entry['gpu_seconds']:,.1f}" if is_known else "–"


def _system(entry: Entry) -> str:
    if entry["posterior"] is None:
        return "Transformer-LM, retrained"
    return f"{entry['system']}, {POSTERIORS[entry['posterior']]}"


def _perplexity(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _difference(entry: Entry) -> str:
    if entry["difference"] is None:
        return ""
    low, high = entry["difference_interval"]
    return f"{100 * entry['difference']:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})"


def _totals(rows: Sequence[Entry]) -> Iterator[Paragraph]:
    """The cost of following the growth to its end, by system."""
    whole: dict[str, int] = {}
    for entry in rows:
        name = "the retrained Transformer-LM" if entry["posterior"] is None else entry["system"]
        whole[name] = entry["tokens_so_far"]
    told = ", ".join(f"{name} {tokens:,}" for name, tokens in whole.items())
    yield Paragraph(f"Tokens trained on in all: {told}.")


def _rises(rows: Sequence[Entry]) -> Iterator[Paragraph]:
    for row in rows:
        if row.get("rise"):
            step = f"{len(row['domains'])} domains, {row['change']}"
            yield Paragraph(
                f"The Transformer-LM of the step {step!r} is no fair baseline: its {Rise(**row['rise']).sentence}."
            )
