"""The page in a real browser, without its window: phone and desktop, light, dark and print, keyboard, axe-core."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.report.page import render
from btm_cluster.report.run_page import run_page
from tests.made_report import made_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
PHONE, DESKTOP = 360, 1440
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(run_page(made_report(3, 1, excerpt_tokens=20))), encoding="utf-8")
    return file.as_uri()


class Opened:
    """The page in a window of a width, and all that it asked for or complained of."""

    def __init__(
        self, browser: Any, address: str, width: int, scheme: str = "light", script: bool = True
    ) -> None:
        self._context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=script
        )
        self.page = self._context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_it_opens_without_a_complaint_asks_for_nothing_and_scrolls_no_further_than_it_is_wide(
    browser: Any, address: str, width: int, scheme: str
) -> None:
    with Opened(browser, address, width, scheme) as opened:
        assert opened.said == []
        assert opened.asked == [address]
        assert opened.page.title() == "made-up: forest version 3"
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        for figure in opened.page.query_selector_all("svg"):
            box = figure.bounding_box()
            assert box is not None
            assert box["width"] > 100
            assert box["height"] > 20
        assert opened.page.query_selector("h1").bounding_box()["y"] < 100
        if width == DESKTOP:
            tiles = opened.page.query_selector_all(".tiles li")
            assert all(tile.bounding_box()["y"] < 400 for tile in tiles), "the verdict is seen at once"


def test_a_heading_that_is_pressed_sorts_its_table_by_number(browser: Any, address: str) -> None:
    with Opened(browser, address, DESKTOP) as opened:
        table = opened.page.locator("table").first
        button = table.get_by_role("button", name="all")

        def column() -> list[float]:
            return [float(cell) for cell in table.locator("tbody tr td:nth-child(5)").all_inner_texts()]

        before = column()
        assert before != sorted(before)
        button.click()
        assert column() == sorted(before)
        assert table.locator("th[aria-sort=ascending]").inner_text().startswith("all")
        button.focus()
        opened.page.keyboard.press("Enter")
        assert column() == sorted(before, reverse=True)
        named = table.get_by_role("button", name="system")
        named.click()
        names = table.locator("tbody th").all_inner_texts()
        assert names == sorted(names, key=str.lower)


def test_without_its_script_the_page_is_whole(browser: Any, address: str) -> None:
    with Opened(browser, address, PHONE, script=False) as opened:
        assert opened.page.locator("svg").count() > 8
        assert opened.page.locator("table").first.is_visible()
        assert opened.page.locator("th button").count() == 0


def test_the_keyboard_reaches_the_results_first(browser: Any, address: str) -> None:
    with Opened(browser, address, PHONE) as opened:
        opened.page.keyboard.press("Tab")
        assert opened.page.evaluate("document.activeElement.textContent") == "Skip to the results"
        opened.page.keyboard.press("Enter")
        assert opened.page.url.endswith("#systems")


@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "light"), (DESKTOP, "dark")])
def test_axe_finds_nothing_serious(browser: Any, address: str, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with Opened(browser, address, width, scheme) as opened:
        opened.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        found = Axe().run(opened.page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in SERIOUS] == []


def test_in_print_the_page_is_light_and_nothing_is_cut(browser: Any, address: str, tmp_path: Path) -> None:
    with Opened(browser, address, DESKTOP, "dark") as opened:
        opened.page.emulate_media(media="print")
        opened.page.set_viewport_size({"width": 720, "height": 1000})  # of an A4 sheet
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 720
        assert not opened.page.locator("nav").is_visible()
        opened.page.pdf(path=tmp_path / "page.pdf", format="A4")
        assert (tmp_path / "page.pdf").stat().st_size > 10_000
