"""`btm forest pin`."""

import json
from typing import Annotated

import typer

from btm_cluster.session import open_ledger
from btm_cluster.terminal.options import ForestPlan, Json, Store, forest_place


def pin(
    version: Annotated[int, typer.Argument(help="The version.", show_default=False)],
    plan_path: ForestPlan = None,
    store: Store = None,
    remove: Annotated[bool, typer.Option("--remove", help="Unpin it.")] = False,
    json_output: Json = False,
) -> None:
    """Keep a version from being collected, however old it becomes."""
    from btm_cluster.operations.pin import pin

    ledger = open_ledger(forest_place("forest pin", plan_path, store).store)
    pinned = pin(ledger, version, remove)
    told = f"pinned versions: {', '.join(map(str, pinned)) or 'none'}"
    print(json.dumps({"pinned": pinned}) if json_output else told)
