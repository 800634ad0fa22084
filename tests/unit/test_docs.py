"""The documents: links lead somewhere, every page of decisions is in the index,
and the README's results are the stored ones."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in [*ROOT.glob("*.md"), *ROOT.glob("d*/**/*.md")])
DECISIONS = ROOT / "docs" / "decisions"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_generated(page: Path) -> bool:
    """Whether its headings come from the code when the site is built, which then checks links to them."""
    return "\n::: " in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target) or is_generated(target), link


def test_the_index_of_decisions_has_every_page_once() -> None:
    index = re.findall(
        r"^\| \[([\w-]+\.md)\]", (DECISIONS / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(index) == sorted(page.name for page in DECISIONS.glob("*.md") if page.name != "README.md")


def stored_rows() -> Iterator[tuple[str, ...]]:
    """The systems of the README's table from the stored study, as a page would write them."""
    results: list[dict[str, Any]] = json.loads(
        (ROOT / "docs/results/3m/summary.json").read_text(encoding="utf-8")
    )
    names = ("system", "posterior", "prior", "development_blocks", "top_k")
    for wanted in (
        ("transformer-lm", None, None, None, None),
        ("average", None, "learned", None, None),
        ("forest", "calibrated", "fitted", None, 4),
        ("forest", "full", "ema", None, None),
        ("forest", "calibrated", "fitted", None, None),
        ("forest with its seed", "gate", "fitted", None, None),
    ):
        repeats = [row for row in results if tuple(row[name] for name in names) == wanted]
        assert len(repeats) == 3, wanted
        perplexities = [f"{mean(row[column] for row in repeats):.1f}" for column in ("train", "eval", "all")]
        differences = [100 * row["difference"] for row in repeats if row["difference"] is not None]
        told = (
            f"{mean(differences):+.1f} ± {stdev(differences):.1f} %".replace("-", "−") if differences else ""
        )
        yield (*perplexities, told)


def test_the_results_in_the_readme_are_the_stored_ones() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(
        number for number, line in enumerate(lines) if line.startswith("| system | inference cost |")
    )
    table = lines[start + 2 : lines.index("", start)]
    shown = [tuple(cell.strip() for cell in line.strip("|").split("|"))[2:] for line in table]
    assert shown == list(stored_rows())
