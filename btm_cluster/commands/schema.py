"""`btm schema`."""

import json
from typing import Annotated

import typer


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print tables for people instead: docs/reference/plan.md.")
    ] = False,
) -> None:
    """Print the JSON schema of a plan, for editors."""
    from btm_cluster.operations.schema import plan_reference
    from btm_cluster.plan import plan_schema

    print(plan_reference() if markdown else json.dumps(plan_schema(), indent=1), end="" if markdown else "\n")
