"""The page of a plan: what it says first, what it says where nothing was measured, and that nothing gets out of it."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from btm_cluster.evaluation.rows import CALIBRATED_ENSEMBLE, POSTERIOR_AVERAGE, SEED, TRANSFORMER_LM
from btm_cluster.evaluation.verdict import verdict
from btm_cluster.report.content import Page, Paragraph, Section, Table
from btm_cluster.report.expert_sections import excerpts_section
from btm_cluster.report.page import render
from btm_cluster.report.run_page import RunReport, run_page
from btm_cluster.report.verdict_sections import headline, tiles
from tests.made_report import HOSTILE, made_report
from tests.unit.test_report import texts_with

MEGABYTE = 1_000_000


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._within = [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("style", "script"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == self._within[-1]:
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if len(self._within) == 1:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def html_of(report: RunReport) -> str:
    return render(run_page(report))


def test_a_page_needs_nothing_from_elsewhere_and_allows_only_its_own_script_and_style() -> None:
    html = html_of(made_report())
    read = Reader(html)
    addresses = [
        value for _, attributes in read.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert addresses
    assert all(value and value.startswith("#") for value in addresses)
    assert not re.search(r"url\(|@import", html)
    policy = next(
        one["content"] for one in read.of("meta") if one.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any("style" in attributes or "onclick" in attributes for _, attributes in read.tags)


def test_a_document_that_is_markup_is_shown_and_not_obeyed() -> None:
    report = made_report(words=(HOSTILE, '"><script>', "{{ 7 * 7 }}"))
    read = Reader(html_of(report))
    assert len(read.of("script")) == 1
    assert not read.of("img")
    assert HOSTILE in read.text
    assert "{{ 7 * 7 }}" in read.text


def test_names_that_are_markup_are_shown_and_not_obeyed() -> None:
    rows = [["<script>alert(1)</script>", "<b>2</b>"]]
    section = Section("one", "<h1>", [Paragraph("`<i>` & more"), Table("<caption>", ["<th>", "x"], rows)])
    read = Reader(render(Page("<title>", "</h1><script>", None, "lead", (), [section], "foot")))
    assert len(read.of("script")) == 1
    assert len(read.of("h1")) == 1
    assert "<script>alert(1)</script>" in read.text


def test_every_figure_says_what_it_shows_and_has_its_numbers_in_a_table_beside_it() -> None:
    html = html_of(made_report())
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    assert len(figures) == html.count("<svg ")
    for figure in figures:
        assert re.search(r"<svg [^>]*role=\"img\"[^>]*><title>[^<]+</title><desc>[^<]+</desc>", figure)
        assert "<table>" in figure
        assert "<figcaption>" in figure


def test_a_page_of_64_experts_and_16_targets_is_under_two_megabytes() -> None:
    assert len(html_of(made_report(64, 16, ("tide ", "and ", "time "))).encode()) < 2 * MEGABYTE


def test_the_same_report_gives_the_same_page() -> None:
    assert html_of(made_report()) == html_of(made_report())


def test_credentials_in_the_plan_are_not_on_the_page() -> None:
    html = html_of(made_report())
    assert "secret" not in html
    assert "@bucket/made-up" in html


def test_where_nothing_was_measured_each_section_says_so_and_the_rest_is_there() -> None:
    report = made_report()
    bare = replace(
        report, evaluated=None, runs=[], trainings=[replace(one, curve=None) for one in report.trainings]
    )
    page = run_page(bare)
    assert page.headline == "Not evaluated yet"
    told = {
        one.identifier: one.blocks[0].text for one in page.sections if isinstance(one.blocks[0], Paragraph)
    }
    assert {"systems", "experts", "tokens", "worth", "curves", "timeline", "study", "texts"} == set(told)
    assert all(text.endswith(".") for text in told.values())
    assert "lineage" in [section.identifier for section in page.sections]
    assert "forest version 3" in render(page)


def test_a_training_whose_loss_rose_is_named_above_the_curves() -> None:
    report = made_report()
    *others, last = report.trainings
    assert last.curve is not None
    risen = replace(last, curve=last.curve.model_copy(update={"loss": last.curve.loss[::-1]}))
    note = "A lower learning rate may do better: Transformer-LM: training loss rose from "
    assert note not in html_of(report)
    assert note in html_of(replace(report, trainings=[*others, risen]))


def test_an_older_version_that_was_evaluated_is_shown_and_said_to_be_older() -> None:
    report = made_report()
    assert report.evaluated is not None
    older = replace(report, evaluated=replace(report.evaluated, forest=report.versions[1]))
    assert "the forest is at version 3" in run_page(older).lead


@pytest.mark.parametrize(
    ("factors", "starts", "is_good"),
    [
        (
            {CALIBRATED_ENSEMBLE: 0.9, POSTERIOR_AVERAGE: 0.95},
            "Worth it: as an ensemble, perplexity is",
            True,
        ),
        ({CALIBRATED_ENSEMBLE: 1.1, POSTERIOR_AVERAGE: 0.95}, "Worth it: as one model, perplexity is", True),
        (
            {CALIBRATED_ENSEMBLE: 1.1, POSTERIOR_AVERAGE: 1.2},
            "Not worth it: as an ensemble, perplexity is",
            False,
        ),
        ({CALIBRATED_ENSEMBLE: 1.0}, "Undecided: as an ensemble, the forest cannot be told apart", None),
    ],
)
def test_the_headline_says_whether_it_was_worth_it(
    factors: dict[str, float], starts: str, is_good: bool | None
) -> None:
    found = verdict(texts_with({SEED: 1.3, TRANSFORMER_LM: 1.0, **factors}))
    words, outcome = headline(found)
    assert words.startswith(starts)
    assert outcome is is_good
    side = {True: "below", False: "above", None: "apart"}[is_good]
    assert side in words
    assert [tile.name.partition(":")[0] for tile in tiles(found)][-1] == "Baseline"


def test_excerpts_of_many_experts_have_a_colour_for_the_busiest_and_grey_for_the_rest() -> None:
    report = made_report(20, 1)
    assert report.evaluated is not None
    section = excerpts_section(report.evaluated.parts, report.evaluated.forest.domains, "")
    _, first, *_ = section.blocks
    assert [key.name for key in first.keys][-1] == "other experts"
    assert {token.colour for token in first.tokens} == set(range(8))
    rows = first.data.rows
    assert sum(int(row[2]) for row in rows) == len(report.evaluated.parts[0].excerpt)
