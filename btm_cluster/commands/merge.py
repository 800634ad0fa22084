"""`btm merge`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from btm_cluster.plan import read_plan
from btm_cluster.session import driving, opened_view
from btm_cluster.terminal.options import Cluster, Density, JsonAndProgress, NoCluster, PlanPath, Scale, Target
from btm_cluster.terminal.text_options import Delimiter, Field, source_of
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from btm_cluster.operations.merge import Merged


def merge(
    plan_path: PlanPath,
    to: Annotated[Path, typer.Option(help="Folder for the Hugging Face model.", show_default=False)],
    weights: Annotated[
        str,
        typer.Option(
            help="uniform, ties, task-arithmetic; for a text argmax, posterior; or searched: greedy, learned."
        ),
    ] = "posterior",
    target: Target = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Files or globs of your own to merge for, instead of --for. Not stored.", show_default=False
        ),
    ] = None,
    field: Field = "text",
    delimiter: Delimiter = None,
    bad_documents: Annotated[Literal["refuse", "skip"], typer.Option(help="As in a plan.")] = "refuse",
    density: Density = None,
    scale: Scale = None,
    json_output: JsonAndProgress = False,
    address: Cluster = None,
    in_process: NoCluster = False,
) -> None:
    """Merge the experts into one model and write it as a Hugging Face folder."""
    plan = read_plan(plan_path)
    check_shadowing()
    with opened_view() as view:
        from btm_cluster.operations.averages import Average
        from btm_cluster.operations.given_text import GivenText
        from btm_cluster.operations.merge import check_merge_call, write_merged_model
        from btm_cluster.operations.score import reading_of

        asked = Average(weights, target, density, scale)
        sources = tuple(source_of("your-text", [file], field, delimiter) for file in text or ())
        given = GivenText(sources, reading_of(bad_documents)) if sources else None
        check_merge_call(plan, asked, given, to)
        with driving(view, plan, address, in_process or address is None, command="merge") as driver:
            merged = write_merged_model(plan, asked, to, driver, given)
    if json_output:
        print(json.dumps({"folder": str(to), "weights": merged.weights, **_as_json(merged)}, indent=1))
        return
    print(f"wrote {to}: {_parts_line(weights, merged.weights)}")
    for line in _spread_lines(merged):
        print(line)
    for reason, count in (given.bad if given else {}).items():
        print(f"note: skipped {count} × {reason}")


def _parts_line(method: str, weights: Mapping[str, float | None]) -> str:
    """Each part of a merged model with its weight, where it has one."""
    if None in weights.values():
        return f"{method} of {', '.join(weights)}"
    return ", ".join(f"{weight:.3g} {name}" for name, weight in weights.items())


def _as_json(merged: "Merged") -> dict[str, Any]:
    if merged.text is None:
        return {}
    experts = {name: asdict(one) for name, one in merged.spread.items()}
    return {"text": {"blocks": merged.text.blocks, "tokens": merged.text.tokens, "experts": experts}}


def _spread_lines(merged: "Merged") -> list[str]:
    """How far the blocks of a given text differ in whose they are."""
    if merged.text is None:
        return []
    width = max(map(len, merged.spread))
    return [
        f"from {merged.text.blocks} blocks with {merged.text.tokens:,} tokens, "
        "whose posterior is, mean ± deviation:",
        *(
            f"  {name:{width}}  {one.block_mean:.3f} ± {one.block_deviation:.3f}"
            for name, one in merged.spread.items()
        ),
    ]
