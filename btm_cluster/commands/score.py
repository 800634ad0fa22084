"""`btm score` on the command line: texts and a forest from arguments; a line for each
document as it is scored, then the total."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from btm_cluster.errors import UserError
from btm_cluster.session import driving, open_ledger, opened_view
from btm_cluster.terminal.options import (
    Cluster,
    ForestPlace,
    JsonAndProgress,
    NoCluster,
    Store,
    forest_place,
)
from btm_cluster.terminal.output import end_input
from btm_cluster.terminal.text_options import Delimiter, Field, source_of
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from btm_cluster.language_model.document_scores import DocumentScorer, NamedText
    from btm_cluster.terminal.progress import ProgressView


def score(
    files: Annotated[
        list[str] | None, typer.Argument(help="Files or globs, local or s3://.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A text itself, instead of files.", show_default=False)
    ] = None,
    plan_path: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="The forest's plan; experts are mixed as its `merging` says.", show_default=False
        ),
    ] = None,
    store: Store = None,
    target: Annotated[
        str | None,
        typer.Option("--for", help="Text of the plan whose fitted mixture to use.", show_default=False),
    ] = None,
    field: Field = "text",
    delimiter: Delimiter = None,
    bad_documents: Annotated[Literal["refuse", "skip"], typer.Option(help="As in a plan.")] = "refuse",
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Documents follow each other in blocks, as the verdict reads them."),
    ] = False,
    json_output: JsonAndProgress = False,
    address: Cluster = None,
    in_process: NoCluster = False,
) -> None:
    """Say how surprising texts are to each expert and to the ensemble, and which domain each is of.

    With --plan the experts are mixed as it says; with --store alone, by the paper's posterior.
    """
    _check_call(files, text)
    place = forest_place("score", plan_path, store, "--plan")
    if target is not None and place.plan is None:
        raise UserError("--for needs a plan", expected="--plan, by which a text's mixture is fitted")
    check_shadowing()
    bad = Counter[str]()
    with opened_view() as view:
        from btm_cluster.operations.score import check_sources, documents_of, reading_of

        reading = reading_of(bad_documents)
        sources = [source_of("your-text", [file], field, delimiter) for file in files or ()]
        check_sources(sources, reading)
        texts = documents_of(sources, reading, bad) if text is None else _string(text)
        end_input()
        scorer = _scorer(view, place, target, address, in_process)
    _show(scorer, texts, packed, json_output, bad)


def _check_call(files: Sequence[str] | None, text: str | None) -> None:
    if bool(files) == (text is not None):
        found = "both files and --text" if files else "neither files nor --text"
        raise UserError("btm score needs texts", found=found, expected="files, or --text with a text itself")
    if text is not None and not text.strip():
        raise UserError("--text is empty", expected="a text")


def _string(text: str) -> "list[NamedText]":
    from btm_cluster.language_model.document_scores import NamedText
    from btm_cluster.operations.score import STRING

    try:
        return [NamedText(STRING, 1, os.fsencode(text).decode())]
    except UnicodeDecodeError as exc:
        raise UserError("--text is no UTF-8", found=str(exc), remedy="convert it, such as by iconv") from exc


def _scorer(
    view: "ProgressView", place: ForestPlace, target: str | None, address: str | None, in_process: bool
) -> "DocumentScorer":
    from btm_cluster.operations.score import scorer_of_plan, scorer_of_store

    if place.plan is None:
        view.say("opening the forest's models")
        return scorer_of_store(open_ledger(place.store))
    with driving(view, place.plan, address, in_process or address is None, command="score") as driver:
        return scorer_of_plan(place.plan, target, driver)


def _show(
    scorer: "DocumentScorer", texts: "Iterable[NamedText]", packed: bool, json_output: bool, bad: Counter[str]
) -> None:
    from btm_cluster.operations.score import STRING
    from btm_cluster.terminal.scores import HEADING, as_json, document_line, total_table
    from btm_cluster.terminal.tables import consoles, show_table

    total = scorer.total()
    for text, sums in scorer.score(texts, packed):
        total.add(sums)
        one = sums.scored(scorer.names, scorer.domains)
        if json_output:
            print(json.dumps({"source": text.source, "document": text.number} | as_json(one)), flush=True)
        elif text.source != STRING:
            if total.documents == 1:
                print(HEADING)
            print(document_line(text, one), flush=True)
    if not total.documents:
        raise UserError("there is no text to score", found=f"{sum(bad.values())} empty or bad documents")
    whole = total.scored(scorer.names, scorer.domains)
    if json_output:
        print(json.dumps({"total": {"documents": total.documents} | as_json(whole), "skipped": dict(bad)}))
        return
    show_table(total_table(whole, total.documents), consoles(False)[0])
    for reason, count in bad.items():
        print(f"note: skipped {count} × {reason}")
