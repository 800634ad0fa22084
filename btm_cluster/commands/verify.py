"""`btm forest verify`."""

import json
from dataclasses import asdict

from btm_cluster.session import open_ledger
from btm_cluster.terminal.options import ForestPlan, Json, Store, forest_place


def verify(plan_path: ForestPlan = None, store: Store = None, json_output: Json = False) -> None:
    """Read the whole store and check every byte against its hash."""
    from btm_cluster.errors import IntegrityError, UserError
    from btm_cluster.operations.verify import verify as read_all

    place = forest_place("forest verify", plan_path, store).store
    seen = read_all(open_ledger(place))
    if json_output:
        print(json.dumps(asdict(seen), indent=1))
    else:
        print(
            f"read {seen.versions} versions, {seen.artifacts} artifacts, {seen.blobs} blobs of "
            f"{seen.size_bytes:,} bytes"
        )
        for note in seen.notes:
            print(f"note: {note}")
    if seen.problems:
        raise IntegrityError(
            f"{len(seen.problems)} problem(s) in {place}\n" + "\n".join(f"- {p}" for p in seen.problems)
        )
    if not (seen.versions or seen.artifacts):
        raise UserError(
            f"there is nothing of a forest in {place}",
            remedy="check the plan's `store`, or --store, which is relative to this folder",
        )
