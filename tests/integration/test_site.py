"""The documentation's site is built as `make docs` does it: strictly, so that every link in it leads somewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import ROOT, blocks
from tools.reference import PAGES

SOURCES = ("docs", "btm_cluster", "benchmarks", "tools", "CHANGELOG.md", "zensical.toml")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documentation")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_the_site_has_every_page_in_its_navigation(site: Path) -> None:
    listed = set(re.findall(r'"([\w/.-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    for page in listed:
        assert (site / page.replace("README.md", "index.md").replace(".md", ".html")).is_file(), page


def test_pages_fetch_nothing_from_elsewhere_and_need_no_script_for_formulas(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//[^"]*"', text), page
        assert not re.findall(r'<link[^>]* href="(?:https?:)?//[^"]*"', text), page
    formulas = [block for block in blocks("docs/concepts.md") if block.language == "math"]
    assert (site / "concepts.html").read_text(encoding="utf-8").count("<math") == len(formulas) > 0


def test_the_python_api_has_every_public_name(site: Path) -> None:
    import btm_cluster

    page = (site / "reference" / "python-api.html").read_text(encoding="utf-8")
    assert [name for name in btm_cluster.__all__ if f'id="btm_cluster.{name}"' not in page] == ["Plan"]


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_up_to_date(name: str) -> None:
    page = ROOT / "docs" / "reference" / name
    assert page.read_text(encoding="utf-8") == PAGES[name](), "write it anew: make reference"
