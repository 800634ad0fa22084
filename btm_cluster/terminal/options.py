"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

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
