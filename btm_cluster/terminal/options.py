"""Arguments and options that several commands take.

A command that reads a forest takes it one way: a PLAN as its last argument, or `--store` with the forest's
store. Where the arguments are files without number, the plan is `--plan`.
"""

import os
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from btm_cluster.errors import UserError
from btm_cluster.plan import Plan, read_plan
from btm_cluster.terminal.logs import logging_to

STORE_VARIABLE = "BTM_STORE"

PlanPath = Annotated[Path, typer.Argument(help="The plan, a YAML file.", show_default=False)]
JsonAndProgress = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, progress on standard error.")
]
Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS", help="Ray cluster to join, or `auto`; without it, a local one is started."
    ),
]
InProcess = Annotated[bool, typer.Option("--in-process", help="Without Ray, one step after the other.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_ADDRESS",
        help="Ray cluster (or `auto`) that computes what the store lacks; without it, this process does.",
    ),
]
NoCluster = Annotated[
    bool, typer.Option("--in-process", help="Join no cluster, though RAY_ADDRESS names one.")
]
Dashboard = Annotated[bool, typer.Option("--dashboard", help="Serve the Ray dashboard of a local cluster.")]
Details = Annotated[
    bool, typer.Option("--details", help="Also show each text's figures and size, and what was fitted.")
]
NewResources = Annotated[
    bool,
    typer.Option(
        "--new-resources",
        help="Go on from training checkpoints with the plan's GPUs, CPUs and precision, not with those of "
        "their start.",
    ),
]
ForestPlan = Annotated[
    Path | None,
    typer.Argument(metavar="[PLAN]", help="The forest's plan, a YAML file; or --store.", show_default=False),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar=STORE_VARIABLE,
        help="The forest's store, a folder or URL, instead of a plan.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what it would do. Nothing is started, nothing is written.")
]
Domain = Annotated[str, typer.Argument(help="The domain.", show_default=False)]
Target = Annotated[
    str | None,
    typer.Option("--for", help="Text of the plan or the forest to merge for.", show_default=False),
]
Density = Annotated[
    float | None,
    typer.Option(help="Share of each tensor's differences that ties keeps; default 0.2.", show_default=False),
]
Scale = Annotated[
    float | None,
    typer.Option(
        help="Factor of differences; default 1 for ties, 0.4 for task-arithmetic.", show_default=False
    ),
]


class ForestPlace(NamedTuple):
    """Where a forest is: its store, and its plan where that was named."""

    store: str
    plan: Plan | None = None


def forest_place(
    command: str, plan_path: Path | None, store: str | None, plan_is: str = "a plan"
) -> ForestPlace:
    """The forest that a command was given. A plan that is named comes before a store of the environment.

    Raises:
        UserError: both or neither is named.
        PlanError: the plan is wrong.
    """
    if not store or (plan_path is not None and store == os.environ.get(STORE_VARIABLE)):
        store = None
    if (plan_path is None) == (store is None):
        raise UserError(
            f"btm {command} needs a forest",
            found=f"both {plan_is} and --store" if store else f"neither {plan_is} nor --store",
            expected=f"{plan_is}, or --store (or {STORE_VARIABLE}) with its location",
        )
    if plan_path is None:
        assert store is not None
        return ForestPlace(store)
    plan = read_plan(plan_path)
    return ForestPlace(plan.store, plan)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show results and errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what happens in detail.")]
LogFile = Annotated[
    Path | None, typer.Option("--log-file", help="Append all that happens, in detail.", show_default=False)
]


def logged(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with options for its log: --quiet, --verbose and --log-file."""

    @wraps(command)
    def with_log(*args: Any, quiet: bool, verbose: bool, log_file: Path | None, **options: Any) -> Any:
        with logging_to(quiet, verbose, log_file):
            return command(*args, **options)

    own = signature(command, eval_str=True)
    added = {"quiet": (Quiet, False), "verbose": (Verbose, False), "log_file": (LogFile, None)}
    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in added.items()
    ]
    with_log.__signature__ = own.replace(parameters=[*own.parameters.values(), *parameters])  # type: ignore[attr-defined]
    return with_log
