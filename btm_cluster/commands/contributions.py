"""`btm forest contributions`."""

import json

from btm_cluster.session import open_ledger, opened_view
from btm_cluster.terminal.options import ForestPlan, Json, Store, forest_place
from btm_cluster.terminal.tables import consoles, plain_table, show_table


def contributions(plan_path: ForestPlan = None, store: Store = None, json_output: Json = False) -> None:
    """Show what each expert is worth on each text: how test perplexity rises without it, from stored scores alone."""
    with opened_view() as view:
        from btm_cluster.operations.contributions import contributions

        view.say("reading scores")
        found = contributions(open_ledger(forest_place("forest contributions", plan_path, store).store))
    if json_output:
        print(json.dumps(found.to_json(), indent=1))
        return
    rows = [["all experts", "", *(f"{text.perplexity:.2f}" for text in found.texts)]]
    rows += [
        [
            f"without {domain}",
            f"{found.mean_rise(domain):+.1%}",
            *(f"{text.rise(domain):+.1%}" for text in found.texts),
        ]
        for domain in sorted(found.domains, key=found.mean_rise, reverse=True)
    ]
    title = f"Test perplexity of forest version {found.version}, and its rise without an expert"
    table = plain_table(title, ["ensemble", "mean", *(text.text for text in found.texts)], rows)
    show_table(table, consoles(False)[0])
