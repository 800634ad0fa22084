"""The layout: any command and what it does is found by its name, and imports have few levels."""

import re
import tomllib
from pathlib import Path

import pytest

from btm_cluster.cli import app, forest_app

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "btm_cluster"
MOST_MODULES = MOST_LEVELS = 10
SHARED = {"averages", "ensemble", "given_text", "model_folder", "plan_costs"}
"""Operations without a command, on which others rest."""


def names(folder: str) -> set[str]:
    return {file.stem for file in (PACKAGE / folder).glob("*.py")} - {"__init__"}


def test_every_command_has_a_file_and_an_operation_of_its_name() -> None:
    registered = [command.callback for command in (*app.registered_commands, *forest_app.registered_commands)]
    commands = {function.__name__: function.__module__ for function in registered if function is not None}
    assert commands == {name: f"btm_cluster.commands.{name}" for name in names("commands")}
    assert names("operations") - SHARED == names("commands")


def test_the_root_has_at_most_ten_modules() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_MODULES


def test_imports_have_at_most_ten_levels_and_every_module_of_the_root_is_on_one() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (levels,) = [
        contract["layers"] for contract in contracts if contract["name"] == "imports go downwards only"
    ]
    assert len(levels) <= MOST_LEVELS
    listed = [name.strip() for level in levels for name in level.replace(":", "|").split("|")]
    packages = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert sorted(listed) == sorted(packages | names(""))


@pytest.mark.parametrize("folder", sorted({file.parent.name for file in PACKAGE.glob("*/__init__.py")}))
def test_the_architecture_says_what_each_package_holds(folder: str) -> None:
    assert f"`{folder}/`" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_files_to_change_are_there() -> None:
    """The table of CONTRIBUTING. Files without a folder lie beside the one before them in the cell."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("## Which file to change")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| .+ \| (.+) \|$", table, re.MULTILINE)
    assert len(cells) > 15
    for cell in cells:
        folder = PACKAGE
        for path in re.findall(r"`([\w/]+(?:\.py|/))`", cell.replace("NAME", "run")):
            file = (PACKAGE if "/" in path else folder) / path
            folder = file.parent if file.suffix else file
            assert file.exists(), file
