"""`btm forest log`."""

import json

from btm_cluster.session import open_ledger
from btm_cluster.terminal.options import ForestPlan, Json, Store, forest_place
from btm_cluster.terminal.tables import consoles, plain_table, show_table


def log(plan_path: ForestPlan = None, store: Store = None, json_output: Json = False) -> None:
    """Show the versions of the forest, the newest first."""
    from btm_cluster.operations.log import log

    place = forest_place("forest log", plan_path, store).store
    entries = log(open_ledger(place))
    if json_output:
        print(json.dumps(entries, indent=1))
    else:
        rows = [[str(value) for value in entry.values()] for entry in entries]
        table = plain_table(f"Forest log of {place}", ["version", "experts", "when", "by", "why"], rows)
        show_table(table, consoles(False)[0])
