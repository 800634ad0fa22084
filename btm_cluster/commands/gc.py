"""`btm forest gc`."""

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer

from btm_cluster.errors import UserError
from btm_cluster.session import open_ledger
from btm_cluster.terminal.options import ForestPlan, Json, Store, forest_place


def gc(
    plan_path: ForestPlan = None,
    store: Store = None,
    keep_versions: Annotated[int, typer.Option(help="Newest versions whose models stay.", min=1)] = 10,
    grace_days: Annotated[
        float, typer.Option(help="Keep whatever is younger than this; must exceed the longest run.", min=0)
    ] = 30,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete it; without this, only say what would go.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go: so it does without --delete.")
    ] = False,
    json_output: Json = False,
) -> None:
    """List what nothing needs any more, and with --delete remove it.

    Kept are recent and pinned versions, unfinished work, and whatever is younger than the grace period.

    Without --delete nothing is written, so ages are by this machine's clock and not by the store's.
    """
    from btm_cluster.operations.gc import collect, find_garbage

    if dry_run and delete:
        raise UserError("--dry-run and --delete exclude each other", remedy="leave one of them out")
    ledger = open_ledger(forest_place("forest gc", plan_path, store).store)
    garbage = find_garbage(ledger, keep_versions, 86_400 * grace_days, now=None if delete else time.time())
    if delete:
        collect(ledger, garbage)
    if json_output:
        print(json.dumps(asdict(garbage) | {"deleted": delete}, indent=1))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(garbage.kinds.items())) or "no artifacts"
    blobs = f"{len(garbage.blobs)} blobs" + (
        f" and {len(garbage.unfinished)} unfinished" if garbage.unfinished else ""
    )
    print(f"{'deleted' if delete else 'would delete'}: {kinds}, {blobs} of {garbage.size_bytes:,} bytes")
    if not delete and (garbage.manifests or garbage.blobs or garbage.unfinished):
        print(
            "the same with --delete deletes them; ages are by this machine's clock here, and by the store's "
            "there"
        )
