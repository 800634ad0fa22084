"""`btm export`."""

import json
import re
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from btm_cluster.errors import UserError
from btm_cluster.session import driving, local_driver, opened_view
from btm_cluster.terminal.options import (
    Cluster,
    Density,
    ForestPlan,
    JsonAndProgress,
    NoCluster,
    Scale,
    Store,
    Target,
    forest_place,
)
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from btm_cluster.operations.averages import Average
    from btm_cluster.operations.export import MixtureOptions

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export(
    to: Annotated[Path, typer.Option(help="Folder for the model or models.", show_default=False)],
    plan_path: ForestPlan = None,
    store: Store = None,
    expert: Annotated[str | None, typer.Option(help="The expert of this domain.", show_default=False)] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a LoRA expert, the adapter alone, as PEFT opens it.")
    ] = False,
    seed: Annotated[bool, typer.Option("--seed", help="The seed.")] = False,
    average: Annotated[
        str | None,
        typer.Option(
            help="uniform, ties or task-arithmetic; with a plan whatever `btm merge` has as --weights.",
            show_default=False,
        ),
    ] = None,
    target: Target = None,
    density: Density = None,
    scale: Scale = None,
    moe: Annotated[
        bool,
        typer.Option(
            "--moe",
            help="All experts as one mixture of experts, in an architecture that vLLM has; needs a plan.",
        ),
    ] = False,
    experts_per_token: Annotated[
        int | None,
        typer.Option(
            min=1, help="Experts of a token, with --moe; by default the plan's, or 2.", show_default=False
        ),
    ] = None,
    rest: Annotated[
        Literal["average", "seed"] | None,
        typer.Option(
            help="With --moe: whose attention, embeddings and norms; by default what suits the experts.",
            show_default=False,
        ),
    ] = None,
    all_models: Annotated[bool, typer.Option("--all", help="Seed and experts, a folder each.")] = False,
    mergekit: Annotated[
        Path | None,
        typer.Option(
            help="File for mergekit's YAML of the same average; needs --average and --all.",
            show_default=False,
        ),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes of weights in a file.")] = "5GB",
    licence: Annotated[
        str | None,
        typer.Option("--license", help="For the model card, as the hub spells it.", show_default=False),
    ] = None,
    repository: Annotated[
        str | None,
        typer.Option("--push-to-hub", help="OWNER/NAME to push to, private.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Push to a public repository.")] = False,
    json_output: JsonAndProgress = False,
    address: Cluster = None,
    in_process: NoCluster = False,
) -> None:
    """Write experts, seed, average or a mixture of experts as Hugging Face folders, and push them to the hub."""
    place = forest_place("export", plan_path, store)
    plan = place.plan
    check_shadowing()
    with opened_view() as view:
        from btm_cluster.operations.export import Export, check_export_call
        from btm_cluster.operations.export import export as write

        asked = Export(
            to,
            expert,
            seed,
            _average(average, target, density, scale),
            all_models,
            _mixture_of_experts(moe, experts_per_token, rest),
            mergekit,
            repository,
            public,
            licence,
            adapter,
            _bytes(shard_size),
        )
        check_export_call(asked, plan)
        with (
            driving(view, plan, address, in_process or address is None, command="export")
            if plan is not None
            else nullcontext(local_driver(view, place.store))
        ) as driver:
            view.say("writing")
            written = write(asked, plan, driver)
    if json_output:
        models = [asdict(one) | {"folder": str(one.folder)} for one in written]
        print(json.dumps({"models": models, "mergekit": mergekit and str(mergekit)}, indent=1))
        return
    for one in written:
        print(f"wrote {one.folder}" + (f", pushed to {one.url}" if one.url else ""))
    if mergekit is not None:
        print(f"wrote {mergekit}")


def _average(
    weights: str | None, target: str | None, density: float | None, scale: float | None
) -> "Average | None":
    from btm_cluster.operations.averages import Average

    if weights is not None:
        return Average(weights, target, density, scale)
    given = {"--for": target, "--density": density, "--scale": scale}
    alone = [option for option, value in given.items() if value is not None]
    if alone:
        raise UserError(f"{alone[0]} is of an average", remedy="add --average WEIGHTS, or leave it out")
    return None


def _mixture_of_experts(
    is_wanted: bool, experts_per_token: int | None, rest: Literal["average", "seed"] | None
) -> "MixtureOptions | None":
    from btm_cluster.operations.export import MixtureOptions

    if is_wanted:
        return MixtureOptions(experts_per_token, rest)
    given = {"--experts-per-token": experts_per_token, "--rest": rest}
    alone = [option for option, value in given.items() if value is not None]
    if alone:
        raise UserError(f"{alone[0]} is of a mixture of experts", remedy="add --moe, or leave it out")
    return None


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", size.strip().upper())
    if found is None:
        raise UserError("--shard-size is no size", found=size, expected="such as 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2]])
