"""Renders a section of a page as Markdown, with its figures as files beside it."""

from collections.abc import Sequence

from btm_cluster.report.content import Block, Figure, Paragraph, Section, Table


def markdown(section: Section) -> str:
    """The section under its heading."""
    return "\n".join(
        [f"## {section.heading}\n", *(_block(block, section.heading) for block in section.blocks)]
    )


def _block(block: Block, heading: str) -> str:
    if isinstance(block, Table):
        under = "" if block.caption == heading else f"### {block.caption}\n\n"
        return under + _table(block)
    if isinstance(block, Figure):
        return f"![{block.caption}]({block.file})\n"
    assert isinstance(block, Paragraph), block
    return f"{block.text}\n"


def _table(table: Table) -> str:
    lines = [_row(table.headings), "|---" * len(table.headings) + "|"]
    for number, row in enumerate(table.rows):
        *cells, last = row
        lines.append(_row([*cells, f"**{last}**" if number in table.strong else last]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
