"""`btm forest rollback`."""

import json
from typing import Annotated

import typer

from btm_cluster.session import open_ledger
from btm_cluster.terminal.options import ForestPlan, Json, Store, forest_place


def rollback(
    version: Annotated[int, typer.Argument(help="The version to go back to.", show_default=False)],
    plan_path: ForestPlan = None,
    store: Store = None,
    json_output: Json = False,
) -> None:
    """Append a new version that is equal to an old one. Refused where something of that one was purged."""
    from btm_cluster.operations.rollback import rollback

    ledger = open_ledger(forest_place("forest rollback", plan_path, store).store)
    forest = rollback(ledger, version)
    told = json.dumps(
        {"version": forest.version, "reason": forest.reason, "domains": list(forest.domains)}, indent=1
    )
    print(
        told
        if json_output
        else f"forest version {forest.version}: {forest.reason}, {len(forest.experts)} experts"
    )
