"""A study's page: the paper's tables and figures, in Markdown and HTML, from results alone.

Numbers are means over random seeds, ± their standard deviation where there are several.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from btm_cluster.curve import Rise
from btm_cluster.ledger.records import REPORT_FILE
from btm_cluster.report.content import Block, Page, Paragraph, Section, Tile
from btm_cluster.report.entries import (
    main_entries,
    main_share,
    select,
    spread,
)
from btm_cluster.report.figures import study_figures
from btm_cluster.report.markdown import markdown
from btm_cluster.report.page import render, standalone
from btm_cluster.report.results import Entry, Results, repeats_left
from btm_cluster.report.study_costs import across_sizes, cost_blocks, experts_blocks
from btm_cluster.report.study_growth import growth_sections
from btm_cluster.report.study_tables import (
    TABLE_1,
    TABLE_2,
    by_text_table,
    compared_with,
    means_table,
    posteriors,
    speeds_section,
    stopped_at,
    texts_section,
)
from btm_cluster.report.study_trials import trials_sections

MARKDOWN_FILE = "README.md"
TITLE = "Results of a study"


def write_page(results: Results, folder: Path) -> None:
    """Writes README.md, report.html, and the figures where there is something to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in study_figures(results):
        (folder / one.figure.file).write_text(standalone(one.figure.svg), encoding="utf-8")
    sections = [*_size_sections(results), *across_sizes(results.entries), *figure_sections(results)]
    sections += _other_sections(results)
    opening = f"# {TITLE}\n\nMade by `btm study` and `btm report` from `summary.json`; do not edit. {_opening(results)}\n"
    left = repeats_left(results)
    if left:
        opening += f"\n**Not finished: {_unfinished(left)}.**\n"
    text = "\n".join([opening, *map(markdown, sections)])
    (folder / MARKDOWN_FILE).write_text(text, encoding="utf-8")
    (folder / REPORT_FILE).write_text(render(_page(results, sections)), encoding="utf-8")


def _page(results: Results, sections: Sequence[Section]) -> Page:
    left = repeats_left(results)
    lead = _opening(results) + (f" Not finished: {_unfinished(left)}." if left else "")
    found = [best for size in _sizes(results) if (best := _best(select(results.entries, size=size), size))]
    tiles = [tile for _, tile in found]
    mean = min((mean for mean, _ in found), default=None)
    headline = TITLE if mean is None else f"At best {_signed(mean)} perplexity against the Transformer-LM"
    is_good = None if mean is None else mean < 0
    return Page(TITLE, headline, is_good, lead, tiles, sections, "Made by btm report from summary.json.")


def _best(entries: Sequence[Entry], size: str) -> tuple[float, Tile] | None:
    """The best ensemble of a size: its mean difference, which may be zero."""
    rows = {
        name: select(main_entries(entries), **wanted) for name, wanted in TABLE_1.items() if "forest" in name
    }
    known = {
        name: [entry["difference"] for entry in found]
        for name, found in rows.items()
        if found and all(entry["difference"] is not None for entry in found)
    }
    if not known:
        return None
    name, values = min(known.items(), key=lambda one: spread(one[1]).mean)
    mean = spread(values).mean
    detail = f"{name}; {len(values)} random seed{'s' * (len(values) > 1)}; all texts"
    return mean, Tile(f"Best of size {size}", _signed(mean), detail, mean < 0)


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def _sizes(results: Results) -> list[str]:
    return list(dict.fromkeys(entry["size"] for entry in results.entries))


def _opening(results: Results) -> str:
    seeds = sorted({entry["random_seed"] for entry in results.entries})
    return (
        "Perplexity per token on test text, mean over texts; everything fitted or chosen was so on development "
        f"text. Random seeds: {', '.join(map(str, seeds))}; ± is the standard deviation over them."
    )


def _unfinished(left: int) -> str:
    return f"written with {left} of its parts (sizes and random seeds, and growth) still to come"


def figure_sections(results: Results) -> Iterator[Section]:
    """A section for each curve that was measured."""
    for one in study_figures(results):
        yield Section(one.figure.file.removesuffix(".svg"), one.heading, [one.figure])


def _rises(results: Results, size: str) -> Iterator[Paragraph]:
    told = [
        f"{row['training']}: {Rise(row['lowest'], row['at'], row['last']).sentence}"
        for row in select(results.rises, size=size)
    ]
    if told:
        yield Paragraph(f"A lower learning rate may do better: {'; '.join(told)}.")


def _other_sections(results: Results) -> Iterator[Section]:
    yield from growth_sections(results)
    yield texts_section(results)
    yield from trials_sections(results)
    yield speeds_section(results)


def _size_sections(results: Results) -> Iterator[Section]:
    for size in _sizes(results):
        entries = main_entries(select(results.entries, size=size))
        first = entries[0]
        heading = (
            f"{size}: {first['non_embedding_parameters']:,} parameters without embeddings, "
            f"{first['tokens']:,} tokens, "
            + (f"seed share {share}" if (share := main_share(entries)) else "from a pretrained model")
        )
        blocks: list[Block] = [
            Paragraph(compared_with(entries)),
            *_rises(results, size),
            means_table("Table 1: systems", entries, TABLE_1),
            *stopped_at(entries),
            means_table(
                "Table 2: averages of parameters, at the inference cost of one model", entries, TABLE_2
            ),
            by_text_table(entries, results.texts),
            means_table("What a posterior is worth", entries, posteriors(entries)),
            *experts_blocks(entries),
            *cost_blocks(entries, TABLE_1 | TABLE_2),
        ]
        yield Section(f"size-{size}", heading, blocks)
