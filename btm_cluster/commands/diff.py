"""`btm forest diff`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from btm_cluster.session import open_ledger
from btm_cluster.terminal.options import ForestPlan, Json, Store, forest_place


def diff(
    before: Annotated[int, typer.Argument(metavar="A", help="A version.", show_default=False)],
    after: Annotated[int, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    plan_path: ForestPlan = None,
    store: Store = None,
    json_output: Json = False,
) -> None:
    """Show which domains two versions differ in."""
    from btm_cluster.operations.diff import diff

    ledger = open_ledger(forest_place("forest diff", plan_path, store).store)
    found = diff(ledger, before, after)
    if json_output:
        print(json.dumps(asdict(found), indent=1))
        return
    for sign, names in (("+", found.added), ("-", found.removed), ("~", found.replaced)):
        for name in names:
            print(f"{sign} {name}")
    if not (found.added or found.removed or found.replaced):
        print(f"versions {before} and {after} have the same experts")
