"""`btm forest show`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from btm_cluster.session import open_ledger
from btm_cluster.terminal.options import ForestPlan, Json, Store, forest_place
from btm_cluster.terminal.tables import consoles, plain_table, show_table

if TYPE_CHECKING:
    from rich.table import Table

    from btm_cluster.forest import Forest


def show(
    plan_path: ForestPlan = None,
    store: Store = None,
    version: Annotated[int | None, typer.Option(help="A version; without it, the newest.")] = None,
    json_output: Json = False,
) -> None:
    """Show a version of the forest: its experts and what they descend from."""
    from btm_cluster.forest import describe_forest
    from btm_cluster.operations.show import show

    shown = show(open_ledger(forest_place("forest show", plan_path, store).store), version)
    if json_output:
        print(json.dumps(describe_forest(shown.forest), indent=1))
    else:
        show_table(forest_table(shown.forest), consoles(False)[0])
        first = shown.first_token or "which the store has lost"
        print(f"blocks of {shown.forest.foundation.block_tokens} tokens, each read after the token {first}")


def forest_table(forest: "Forest") -> "Table":
    """The experts of a version, and what they descend from."""
    rows = [
        [
            expert.domain,
            expert.identity[:12],
            expert.text[:12],
            ", ".join(
                f"{_parent_name(forest, parent.identity)} × {parent.weight:g}" for parent in expert.parents
            ),
        ]
        for expert in forest.experts
    ]
    title = f"Forest version {forest.version}: {forest.reason}; seed {forest.foundation.seed[:12]}"
    if forest.withdrawn:
        title += f"; taken out: {', '.join(forest.withdrawn)}"
    return plain_table(title, ["domain", "expert", "text", "branched from"], rows)


def _parent_name(forest: "Forest", identity: str) -> str:
    if identity == forest.foundation.seed:
        return "seed"
    return next((expert.domain for expert in forest.experts if expert.identity == identity), identity[:12])
