"""Arguments and options that several commands take."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from btm_cluster.terminal.logs import logging_to

PlanPath = Annotated[Path, typer.Argument(help="The plan, a YAML file.", show_default=False)]
JsonAndProgress = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, progress on standard error.")
]
Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS", help="A Ray cluster to join, or auto; without it a local one is started."
    ),
]
InProcess = Annotated[bool, typer.Option("--in-process", help="Without Ray, one step after the other.")]
Dashboard = Annotated[bool, typer.Option("--dashboard", help="Serve the Ray dashboard of a local cluster.")]
Details = Annotated[
    bool, typer.Option("--details", help="Every text's figures, what was fitted, and sizes of texts, too.")
]
NewResources = Annotated[
    bool,
    typer.Option(
        "--new-resources",
        help="Go on from training checkpoints with the plan's GPUs, CPUs and precision, not with those of "
        "their start.",
    ),
]
Store = Annotated[str, typer.Option("--store", help="The store: a folder or URL.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Domain = Annotated[str, typer.Argument(help="The domain.", show_default=False)]
Target = Annotated[
    str | None,
    typer.Option("--for", help="Text of the plan or the forest to merge for.", show_default=False),
]
Density = Annotated[
    float | None,
    typer.Option(
        help="Share of each tensor's differences that ties keeps; else the paper's.", show_default=False
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        help="Factor of differences, for ties and task-arithmetic; else the papers'.", show_default=False
    ),
]
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
