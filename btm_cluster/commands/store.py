"""The commands that look after a forest's store, `btm forest verify | gc | pin`: thin, like `cli.py`."""

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer

from btm_cluster.commands.forest import Json, Store, open_ledger


def register(app: typer.Typer) -> None:
    """Adds the commands to the group `btm forest`."""
    for command in (verify, gc, pin):
        app.command(command.__name__)(command)


def verify(store: Store, json_output: Json = False) -> None:
    """Read the whole store and check every byte against its hash."""
    from btm_cluster.errors import IntegrityError, UserError
    from btm_cluster.upkeep.housekeeping import verify as read_all

    seen = read_all(open_ledger(store))
    if json_output:
        print(json.dumps(asdict(seen), indent=1))
    else:
        print(
            f"read {seen.versions} versions, {seen.artifacts} artifacts, {seen.blobs} blobs of {seen.size_bytes:,} bytes"
        )
        for note in seen.notes:
            print(f"note: {note}")
    if seen.problems:
        raise IntegrityError(
            f"{len(seen.problems)} problem(s) in {store}\n" + "\n".join(f"- {p}" for p in seen.problems)
        )
    if not (seen.versions or seen.artifacts):
        raise UserError(
            f"there is nothing of a forest in {store}", remedy="check --store, which is relative to this folder"
        )


def gc(
    store: Store,
    keep_versions: Annotated[int, typer.Option(help="Newest versions whose models stay.", min=1)] = 10,
    grace_days: Annotated[float, typer.Option(help="What is younger stays: longer than any run takes.", min=0)] = 30,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; without this, only say what would go.")] = False,
    json_output: Json = False,
) -> None:
    """Find, and with --delete remove, what no kept version, no run in the making and nothing young reaches.

    Without --delete nothing is written, so ages are by this machine's clock and not by the store's.
    """
    from btm_cluster.upkeep.gc import collect, find_garbage

    ledger = open_ledger(store)
    garbage = find_garbage(ledger, keep_versions, 86_400 * grace_days, now=None if delete else time.time())
    if delete:
        collect(ledger, garbage)
    if json_output:
        print(json.dumps(asdict(garbage) | {"deleted": delete}, indent=1))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(garbage.kinds.items())) or "no artifacts"
    blobs = f"{len(garbage.blobs)} blobs" + (f" and {len(garbage.unfinished)} unfinished" if garbage.unfinished else "")
    print(f"{'deleted' if delete else 'would delete'}: {kinds}, {blobs} of {garbage.size_bytes:,} bytes")
    if not delete and (garbage.manifests or garbage.blobs or garbage.unfinished):
        print("the same with --delete deletes them; ages are by this machine's clock here, and by the store's there")


def pin(
    store: Store,
    version: Annotated[int, typer.Argument(help="The version.", show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="Unpin it.")] = False,
    json_output: Json = False,
) -> None:
    """Keep a version from being collected, however old it becomes."""
    ledger = open_ledger(store)
    if remove:
        ledger.unpin(version)
    else:
        ledger.pin(version)
    pinned = ledger.log.pinned()
    told = f"pinned versions: {', '.join(map(str, pinned)) or 'none'}"
    print(json.dumps({"pinned": pinned}) if json_output else told)
