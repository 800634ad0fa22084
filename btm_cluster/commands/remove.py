"""`btm forest remove`: says what still carries a domain's influence, and before a purge, what it deletes."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from btm_cluster.errors import UserError
from btm_cluster.session import dry_ledger, open_ledger
from btm_cluster.terminal.options import Domain, DryRun, ForestPlan, Json, Store, forest_place

if TYPE_CHECKING:
    from btm_cluster.ledger import Ledger
    from btm_cluster.ledger.purge import PurgePlan
    from btm_cluster.operations.remove import Influence


def remove(
    domain: Domain,
    plan_path: ForestPlan = None,
    store: Store = None,
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete it for good: text, tokens, scores, weights.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before purging: for scripts.")] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Bring a removed domain back, unless it was purged.")
    ] = False,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Take a domain out of the forest: a new version, at once in effect. Says what still carries its influence."""
    from btm_cluster.ledger.versions import last_expert
    from btm_cluster.operations.remove import bring_back, influence_of, remove

    _check_call(purge, yes, undo)
    place = forest_place("forest remove", plan_path, store).store
    ledger = dry_ledger(place) if dry_run else open_ledger(place)
    would = "it would be " if dry_run else ""
    if undo:
        forest = bring_back(ledger, domain)
        told = json.dumps({"version": forest.version}, indent=1)
        print(told if json_output else f"{would}forest version {forest.version}: {forest.reason}")
        return
    if purge:
        _purge_domain(ledger, domain, yes, json_output, dry_run)
        return
    forest = remove(ledger, domain)
    expert = last_expert(ledger, domain)
    assert expert is not None
    influence = influence_of(ledger, forest, expert)
    if json_output:
        print(json.dumps({"version": forest.version, "influence": asdict(influence)}, indent=1))
        return
    print(f"{would}forest version {forest.version}: {forest.reason}")
    _tell(influence)


def _check_call(purge: bool, yes: bool, undo: bool) -> None:
    if purge and undo:
        raise UserError("--purge and --undo exclude each other")
    if yes and not purge:
        raise UserError(
            "--yes without --purge has nothing to confirm", remedy="add --purge, or leave --yes out"
        )


def _purge_domain(ledger: "Ledger", domain: str, yes: bool, json_output: bool, dry_run: bool) -> None:
    from btm_cluster.operations.remove import planned_purge, purge

    purge_plan = planned_purge(ledger, domain)
    if not json_output:
        _state(purge_plan)
    if dry_run:
        if json_output:
            print(json.dumps({"would_purge": asdict(purge_plan)}, indent=1))
        return
    if not yes and not _confirmed(domain):
        raise UserError(
            f"{domain!r} was not purged", found="no confirmation", remedy="confirm it, or say --yes"
        )
    purged = purge(ledger, domain)
    forest, influence = purged.forest, purged.influence
    if json_output:
        told = {"version": forest.version if forest else None, "purged": asdict(purged.purge_plan)}
        print(json.dumps(told | {"influence": asdict(influence) if influence else None}, indent=1))
        return
    print(f"purged {domain}" + (f"; the forest stands at version {forest.version}" if forest else ""))
    if influence is not None:
        _tell(influence, purged=True)
    if "://" in ledger.storage.location:
        print(
            "this node's cache is clear of it; empty BTM_CACHE_FOLDER on the others, or let them evict what "
            "is unused"
        )


def _state(purge_plan: "PurgePlan") -> None:
    """Says what a purge deletes."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(purge_plan.kinds.items())) or "no artifacts"
    print(f"purging {purge_plan.domain} deletes, in every version that the store keeps:")
    print(f"  {kinds}; {len(purge_plan.blobs)} blobs and {purge_plan.inbox_files} files of the inbox")
    print(f"  {purge_plan.size_bytes:,} bytes; what others share stays")
    print("and ends roll-back to any version that has it. Tombstones keep its text from coming back.")


def _confirmed(domain: str) -> bool:
    if not sys.stdin.isatty():
        return False
    return typer.confirm(f"Purge {domain} for good?")


def _tell(influence: "Influence", purged: bool = False) -> None:
    """Says what still carries a removed domain."""
    carriers = []
    if influence.seed:
        carriers.append(
            f"the seed {influence.seed[:12]}, since it was a founding domain, and so every expert"
        )
    if influence.tokenizer:
        carriers.append(f"the tokenizer {influence.tokenizer[:12]}, trained on its text among others")
    carriers += [
        f"the baseline {identity[:12]}, trained on it among others" for identity in influence.baselines
    ]
    carriers += [
        f"the expert of {domain}, which descends from its expert" for domain in influence.descendants
    ]
    if influence.merged and not purged:
        carriers.append(f"{len(influence.merged)} averaged models in the store")
    carriers.append("averaged models that were written elsewhere before, with `btm merge`")
    print("what still carries its influence:")
    for carrier in carriers:
        print(f"- {carrier}")
