"""Writes the pages of docs/reference/ that the code itself says: `python tools/reference.py`.

A test compares the pages with what this would write.
"""

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from btm_cluster.cli import app
from btm_cluster.errors import BtmError, Stopped, UserError
from btm_cluster.operations.schema import plan_reference
from btm_cluster.storage.node_cache import DEFAULT_GIGABYTES
from btm_cluster.terminal.output import CLOSED_PIPE

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
SHARED = ("quiet", "verbose", "log_file")
"""Options of every command, which its own section leaves out; with --help."""
FIRST_SENTENCE = 1000
"""Characters of a command's first sentence, at most: the generator's own 45 cut it."""
EXIT_CODES = {
    0: "Done.",
    BtmError.exit_code: "Something failed; the message names it. Where experts failed, the others are merged.",
    UserError.exit_code: "The plan, the call or a text is wrong.",
    Stopped.exit_code: "Stopped, or the budget is spent; everything is saved, and the same command goes on.",
    CLOSED_PIPE: "The reader of standard output has gone.",
}
VARIABLES = {
    "`BTM_STORE`": "The forest's store, for commands that take `--store`.",
    "`BTM_API_KEY`": "The key that callers of `btm serve` need.",
    "`BTM_CACHE_FOLDER`": "Folder of a node's cache of models; by default one in the folder for temporary files.",
    "`BTM_CACHE_GIGABYTES`": f"Its largest size; by default {DEFAULT_GIGABYTES:g}.",
    "`TMPDIR`": "Folder for temporary files: models are written there before they are stored.",
    "`RAY_ADDRESS`": "The Ray cluster to join, as `--address`.",
    "`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`": "Ray's token authentication; clusters that are started here use it.",
    "`RAY_TMPDIR`": "Folder of a local cluster's sockets and logs, instead of `TMPDIR`.",
    "`RAY_TRAIN_*`": "Settings of Ray Train; they are passed on to trainings.",
    "`AWS_ENDPOINT_URL_S3`, `AWS_REGION`, …": "Endpoint, region and credentials of S3, by boto3's standard chain.",
    "`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`": "Token, address and use of the Hugging Face hub.",
    "`WANDB_*`, `MLFLOW_*`": "Key, server and credentials of those that `tracking` names.",
    "`CC`, `CXX`": "The compilers that `torch.compile` uses.",
    "`TORCHINDUCTOR_CACHE_DIR`": "Folder of compiled code; by default one in the node's cache.",
    "`NO_COLOR`, `TERM`": "No colours; with `TERM=dumb`, no live progress either.",
}


def command_reference() -> str:
    """Every command with its arguments and options, by typer's own generator."""
    command = typer.main.get_command(app)
    commands = list(_commands(command))
    shared = _options(commands[0].params)
    for each in commands:
        each.short_help = each.get_short_help_str(FIRST_SENTENCE)
        each.params = [parameter for parameter in each.params if parameter.name not in SHARED]
        each.add_help_option = False
    context = typer.Context(command, info_name="btm")
    pages = html.unescape(get_docs_for_click(obj=command, ctx=context, name="btm", title="Commands"))
    opening = [
        "# Commands",
        "Written by `make reference` from the commands themselves; do not edit.",
        "## Exit codes",
        _table(("code", "meaning"), EXIT_CODES.items()),
        "## Environment variables",
        _table(("variable", "meaning"), VARIABLES.items()),
        "## Options of every command",
        "\n".join(shared),
        "## `btm`\n",
    ]
    return pages.replace("# Commands\n\n", "\n\n".join(opening) + "\n", 1)


def _commands(group: Any) -> Iterator[Any]:
    """Those of a group, and of the groups in it."""
    for command in getattr(group, "commands", {}).values():
        yield command
        yield from _commands(command)


def _options(parameters: Sequence[Any]) -> Iterator[str]:
    """The options that all commands have, as the generator words an option."""
    context = typer.Context(typer.main.get_command(app), info_name="btm")
    for parameter in parameters:
        if parameter.name in SHARED and (record := parameter.get_help_record(context)):
            yield "* `{}`: {}".format(*record)
    yield "* `-h, --help`: Show this message and exit."


def _table(headings: Sequence[str], rows: Iterable[tuple[object, str]]) -> str:
    lines = [" | ".join(headings), "|".join("---" for _ in headings)]
    lines += [f"{name} | {meaning}" for name, meaning in rows]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


PAGES = {"plan.md": plan_reference, "commands.md": command_reference}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (FOLDER / name).write_text(write(), encoding="utf-8")
        print(f"wrote {FOLDER / name}")
