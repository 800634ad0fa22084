"""Commands in the documents exist, with the options that they are given; plans in them are plans."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.exceptions import TyperException

from btm_cluster.cli import app
from btm_cluster.plan import Plan
from btm_cluster.study.checks import check_study, sizes_of
from tests.conftest import DOMAINS, TARGETS, plan_fields
from tests.documented import ROOT, Block, blocks, inline_commands, pages

BTM: Any = typer.main.get_command(app)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words lead to, and the words that are left for it."""
    command, name, rest = BTM, *words[:1], words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, name, rest = command.commands[rest[0]], rest[0], rest[1:]
    assert not getattr(command, "commands", None) or not rest or rest[0].startswith("-"), (name, rest)
    return command, rest


def parse(words: list[str]) -> None:
    """Refuses what the command line would: a command, option or argument that is not there, or is missing."""
    command, rest = command_of(words)
    command.make_context(words[0], [*rest])


def check(words: list[str]) -> None:
    """A command of a block, whatever program it calls."""
    program, *rest = words
    if "--" in rest:
        check(rest[rest.index("--") + 1 :])
    if program == "btm":
        parse(words)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program == "python" and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), words


SHELL = [block for page in pages() for block in blocks(page) if block.is_shell]


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}: {block.text.splitlines()[0]}")
def test_every_command_of_a_block_can_be_called_so(block: Block) -> None:
    assert block.commands
    for words in block.commands:
        check(words)


@pytest.mark.parametrize("page", pages())
def test_commands_in_the_text_have_their_names_and_options(page: str) -> None:
    for words in inline_commands(page):
        command, rest = command_of(words)
        known = {option for parameter in command.params for option in getattr(parameter, "opts", [])}
        for word in rest:
            assert not word.startswith("--") or word.partition("=")[0] in {*known, "--help"}, words


PROGRAMS = [block for page in pages() for block in blocks(page) if block.language == "python"]


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: f"{block.page}: {block.text.splitlines()[0]}")
def test_every_python_program_is_one(block: Block) -> None:
    compile(block.text, block.page, "exec")


PLANS = [block for page in pages() for block in blocks(page) if block.language == "yaml"]


@pytest.mark.parametrize("block", PLANS, ids=lambda block: f"{block.page}: {block.text.splitlines()[0]}")
def test_every_piece_of_a_plan_fits_into_one(block: Block, tmp_path: Path) -> None:
    given = yaml.safe_load(block.text)
    if "task" in given:  # lm-evaluation-harness's own
        return
    texts = {name: tmp_path / f"{name}.jsonl" for name in (*DOMAINS, *TARGETS)}
    assert Plan.model_validate(plan_fields(texts, tmp_path) | given)


STUDIES = [block for block in PLANS if "study" in yaml.safe_load(block.text)]


@pytest.mark.parametrize("block", STUDIES, ids=lambda block: block.text.split()[1])
def test_every_study_is_one_that_is_not_refused(block: Block, tmp_path: Path) -> None:
    given = yaml.safe_load(block.text)
    fields = plan_fields(dict.fromkeys((*DOMAINS, *TARGETS), tmp_path), tmp_path) | {"training": {}}
    removed = (given["study"].get("growth") or {}).get("remove", ())
    domains = [{"name": name, "text": f"{name}.jsonl"} for name in (*DOMAINS, *removed)]
    plan = Plan.model_validate(fields | {"domains": domains} | given)
    assert plan.study is not None
    check_study(plan, plan.study, sizes_of(plan, plan.study))


@pytest.mark.parametrize(
    "line",
    ["btm grow plan.yaml", "btm run plan.yaml --epochs 3", "btm forest pin", "python jobs/none.py", "make x"],
)
def test_a_command_that_is_not_there_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, TyperException)):
        check(line.split())
