"""`btm init`: texts as they are named on the command line."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btm_cluster.errors import UserError
from btm_cluster.terminal.output import width_of, wrapped

if TYPE_CHECKING:
    from btm_cluster.plan import TextPlan


def init(
    path: Annotated[Path, typer.Argument(help="Where to write the plan.")] = Path("plan.yaml"),
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILES of a domain, a file or glob; may be repeated.",
            metavar="NAME=FILES",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILES of a target: evaluated, never trained on; may be repeated.",
            metavar="NAME=FILES",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a commented starter plan, sized to the texts that are named and to this machine."""
    from btm_cluster.operations.init import NamedTexts, write_starter_plan

    if target and not text:
        raise UserError("a forest needs a domain", found="only --target", remedy="add --text NAME=FILES")
    texts = NamedTexts(_texts("--text", text), _texts("--target", target)) if text else None
    assumed = write_starter_plan(path, texts)
    if assumed:
        print(wrapped(assumed, width_of(sys.stdout)))
    edit = "" if texts else "edit its texts, then "
    print(f"wrote {path}; next: {edit}`btm plan {path}`")


def _texts(option: str, given: list[str] | None) -> "list[TextPlan]":
    """The named texts; files of one name are one text."""
    from btm_cluster.terminal.text_options import source_of

    files: dict[str, list[str]] = {}
    for one in given or ():
        name, is_named, pattern = one.partition("=")
        if not (is_named and name and pattern):
            raise UserError(
                f"{option} is no text", found=one, expected="NAME=FILES, such as legal='text/legal/*.jsonl'"
            )
        files.setdefault(name, []).append(pattern)
    return [source_of(name, patterns, "text", None) for name, patterns in files.items()]
