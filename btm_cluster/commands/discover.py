"""`btm discover`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from btm_cluster.errors import UserError
from btm_cluster.session import opened_view
from btm_cluster.stopping import unwinding
from btm_cluster.storage.new_folder import check_new_folder
from btm_cluster.terminal.output import end_input
from btm_cluster.terminal.text_options import Delimiter, Field, source_of
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from btm_cluster.operations.discover import Discovery

MOST_CLUSTERS = 200
"""Each has a file open, and 256 are all that some machines allow."""


def discover(
    text: Annotated[
        list[str] | None, typer.Argument(help="Files or globs, local or s3://.", show_default=False)
    ] = None,
    clusters: Annotated[
        int | None, typer.Option(help="How many to find.", min=2, max=MOST_CLUSTERS, show_default=False)
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="New folder for domain files and model.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of clusters found before, to assign the text to.", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A data set, by hub name or folder, instead of files.", show_default=False),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The data set's split; without it, train.", show_default=False)
    ] = None,
    field: Field = "text",
    delimiter: Delimiter = None,
    bad_documents: Annotated[Literal["refuse", "skip"], typer.Option(help="As in a plan.")] = "refuse",
    sample: Annotated[int, typer.Option(help="Documents in which clusters are looked for.", min=2)] = 20_000,
    random_seed: Annotated[int, typer.Option(help="Of the sample and the search.", min=0, max=2**32 - 1)] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Find domains in unlabelled text: a file for each, and a model that assigns new documents to them."""
    _check_call(text, dataset, clusters, model, to)
    check_shadowing()
    end_input()
    source = source_of("unlabelled", text or [], field, delimiter, dataset, split)
    with opened_view() as view:
        from btm_cluster.operations.discover import assign, discover
        from btm_cluster.plan import ReadingPlan

        reading = ReadingPlan(bad_documents=bad_documents)
        view.say("reading documents")
        with unwinding():
            if model is not None:
                found = assign(source, reading, model, to)
            else:
                assert clusters is not None
                assert to is not None
                found = discover(source, reading, clusters, to, random_seed, sample, view.say)
    _show(found, to, json_output)


def _check_call(
    text: list[str] | None, dataset: str | None, clusters: int | None, model: Path | None, to: Path | None
) -> None:
    if bool(text) == (dataset is not None):
        found = "both files and --dataset" if text else "neither files nor --dataset"
        raise UserError("btm discover needs text", found=found, expected="files, or --dataset NAME")
    if (clusters is None) == (model is None):
        raise UserError(
            "btm discover needs to know what to do",
            found="both --clusters and --model" if clusters else "neither --clusters nor --model",
            expected="--clusters K, to find clusters, or --model FOLDER, to use those found before",
            remedy="give one of them",
        )
    if model is None and to is None:
        raise UserError("btm discover --clusters needs a folder to write to", remedy="add --to FOLDER")
    if to is not None:
        check_new_folder(to)


def _show(found: "Discovery", to: Path | None, json_output: bool) -> None:
    from btm_cluster.terminal.tables import consoles, plain_table, show_table

    if json_output:
        print(json.dumps(asdict(found), indent=1))
        return
    documents = max(1, sum(cluster.documents for cluster in found.clusters))
    rows = [
        [
            c.name,
            f"{c.documents:,}",
            f"{c.documents / documents:.1%}",
            f"{c.characters:,}",
            ", ".join(c.words),
        ]
        for c in found.clusters
    ]
    headings = ["cluster", "documents", "share", "characters", "most characteristic words"]
    show_table(plain_table("Clusters", headings, rows), consoles(False)[0])
    for reason, count in found.skipped.items():
        print(f"note: skipped {count} × {reason}")
    if to is not None:
        from btm_cluster.operations.discover import PLAN_FILE

        print(f"wrote {to}; the domains for a plan, to be named by you, are in {to / PLAN_FILE}:\n")
        print(found.plan_snippet, end="")
