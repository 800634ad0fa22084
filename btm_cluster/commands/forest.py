"""The commands that show, change or weigh a forest, `btm forest show | log | remove | rollback | diff | contributions`."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btm_cluster.errors import UserError

if TYPE_CHECKING:
    from btm_cluster.forest import Forest
    from btm_cluster.ledger import Ledger
    from btm_cluster.upkeep.purge import Condemned
    from btm_cluster.upkeep.removal import Influence

Store = Annotated[str, typer.Option("--store", help="The store: a folder or URL.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Domain = Annotated[str, typer.Argument(help="The domain.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Adds the commands to the group `btm forest`."""
    for command in (show, log, remove, rollback, diff, contributions):
        app.command(command.__name__)(command)


def show(
    store: Store,
    version: Annotated[int | None, typer.Option(help="A version; without it, the newest.")] = None,
    json_output: Json = False,
) -> None:
    """Show a version of the forest: its experts and what they descend from."""
    from btm_cluster.display import consoles, forest_table, show_table
    from btm_cluster.forest import describe_forest
    from btm_cluster.ledger import Ref
    from btm_cluster.ledger.versions import version_of

    ledger = open_ledger(store)
    forest = ledger.log.newest() if version is None else version_of(ledger, version)
    if forest is None:
        raise UserError(
            f"there is no forest in {store}",
            remedy="check --store, which is relative to this folder; `btm run` grows one",
        )
    if json_output:
        print(json.dumps(describe_forest(forest), indent=1))
    else:
        foundation = forest.foundation
        show_table(forest_table(forest), consoles(False)[0])
        tokenizer = ledger.find(Ref("tokenizer", foundation.tokenizer))
        first = tokenizer.recipe.get("first_token", "end of text") if tokenizer else "which the store has lost"
        print(f"blocks of {foundation.block_tokens} tokens, each read after the token {first}")


def log(store: Store, json_output: Json = False) -> None:
    """Show the versions of the forest, the newest first."""
    from btm_cluster.display import consoles, plain_table, show_table

    entries = [_log_entry(forest, note) for forest, note in reversed(open_ledger(store).log.history())]
    if not entries:
        raise UserError(
            f"there is no forest in {store}",
            remedy="check --store, which is relative to this folder; `btm run` grows one",
        )
    if json_output:
        print(json.dumps(entries, indent=1))
    else:
        rows = [[str(value) for value in entry.values()] for entry in entries]
        table = plain_table(f"Forest log of {store}", ["version", "experts", "when", "by", "why"], rows)
        show_table(table, consoles(False)[0])


def remove(
    domain: Domain,
    store: Store,
    purge: Annotated[bool, typer.Option("--purge", help="Delete it for good: text, tokens, scores, weights.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before purging: for scripts.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Bring a removed domain back, unless it was purged.")] = False,
    json_output: Json = False,
) -> None:
    """Take a domain out of the forest: a new version, at once in effect. Says what still carries its influence."""
    from btm_cluster.ledger.versions import last_expert
    from btm_cluster.upkeep import removal

    if purge and undo:
        raise UserError("--purge and --undo exclude each other")
    if yes and not purge:
        raise UserError("--yes without --purge has nothing to confirm", remedy="add --purge, or leave --yes out")
    ledger = open_ledger(store)
    if undo:
        forest = removal.bring_back(ledger, domain)
        told = json.dumps({"version": forest.version}, indent=1)
        print(told if json_output else f"forest version {forest.version}: {forest.reason}")
        return
    if purge:
        _purge(ledger, domain, yes, json_output)
        return
    forest = removal.remove(ledger, domain)
    expert = last_expert(ledger, domain)
    assert expert is not None
    influence = removal.influence_of(ledger, forest, expert)
    if json_output:
        print(json.dumps({"version": forest.version, "influence": asdict(influence)}, indent=1))
        return
    print(f"forest version {forest.version}: {forest.reason}")
    _tell(influence)


def rollback(
    version: Annotated[int, typer.Argument(help="The version to go back to.", show_default=False)],
    store: Store,
    json_output: Json = False,
) -> None:
    """Append a new version that is equal to an old one. Refused where something of that one was purged."""
    from btm_cluster.upkeep import removal

    forest = removal.rollback(open_ledger(store), version)
    told = json.dumps({"version": forest.version, "reason": forest.reason, "domains": list(forest.domains)}, indent=1)
    print(told if json_output else f"forest version {forest.version}: {forest.reason}, {len(forest.experts)} experts")


def diff(
    before: Annotated[int, typer.Argument(metavar="A", help="A version.", show_default=False)],
    after: Annotated[int, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    store: Store,
    json_output: Json = False,
) -> None:
    """Show which domains two versions differ in."""
    from btm_cluster.forest import difference
    from btm_cluster.ledger.versions import version_of

    ledger = open_ledger(store)
    found = difference(version_of(ledger, before), version_of(ledger, after))
    if json_output:
        print(json.dumps(asdict(found), indent=1))
        return
    for sign, names in (("+", found.added), ("-", found.removed), ("~", found.replaced)):
        for name in names:
            print(f"{sign} {name}")
    if not (found.added or found.removed or found.replaced):
        print(f"versions {before} and {after} have the same experts")


def contributions(store: Store, json_output: Json = False) -> None:
    """Show what each expert is worth on each text: how test perplexity rises without it, from cached scores alone."""
    from btm_cluster.display import consoles, plain_table, show_table
    from btm_cluster.upkeep import contributions as weigh

    found = weigh.contributions(open_ledger(store))
    if json_output:
        print(json.dumps(found.to_json(), indent=1))
        return
    rows = [["all experts", "", *(f"{text.perplexity:.2f}" for text in found.texts)]]
    rows += [
        [f"without {domain}", f"{found.mean_rise(domain):+.1%}", *(f"{text.rise(domain):+.1%}" for text in found.texts)]
        for domain in sorted(found.domains, key=found.mean_rise, reverse=True)
    ]
    title = f"Test perplexity of forest version {found.version}, and its rise without an expert"
    table = plain_table(title, ["ensemble", "mean", *(text.text for text in found.texts)], rows)
    show_table(table, consoles(False)[0])


def _purge(ledger: "Ledger", domain: str, yes: bool, json_output: bool) -> None:
    from btm_cluster.ledger.versions import last_expert
    from btm_cluster.upkeep import purge, removal

    condemned = purge.condemn(ledger, domain)
    if not json_output:
        _state(condemned)
    if not yes and not _confirmed(domain):
        raise UserError(f"{domain!r} was not purged", found="no confirmation", remedy="confirm it, or say --yes")
    forest = ledger.log.newest()
    if forest is not None and domain in forest.domains:
        forest = removal.remove(ledger, domain)
    expert = last_expert(ledger, domain)
    influence = removal.influence_of(ledger, forest, expert) if forest and expert else None
    condemned = purge.condemn(ledger, domain)
    purge.purge(ledger, condemned)
    newest = ledger.log.newest()
    if newest is not None and domain in newest.domains:  # a run merged it before there were tombstones to see
        forest = removal.remove(ledger, domain)
    if json_output:
        told = {"version": forest.version if forest else None, "purged": asdict(condemned)}
        print(json.dumps(told | {"influence": asdict(influence) if influence else None}, indent=1))
        return
    print(f"purged {domain}" + (f"; the forest stands at version {forest.version}" if forest else ""))
    if influence is not None:
        _tell(influence, purged=True)
    if "://" in ledger.storage.location:
        print(
            "this node's cache is clear of it; empty BTM_CACHE_FOLDER on the others, or let them evict what is unused"
        )


def _state(condemned: "Condemned") -> None:
    """Says what a purge deletes."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(condemned.kinds.items())) or "no artifacts"
    print(f"purging {condemned.domain} deletes, in every version that the store keeps:")
    print(f"  {kinds}; {len(condemned.blobs)} blobs and {condemned.inbox_files} files of the inbox")
    print(f"  {condemned.size_bytes:,} bytes; what others share stays")
    print("and ends roll-back to any version that has it. Tombstones keep its text from coming back.")


def _log_entry(forest: "Forest", note: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": forest.version,
        "experts": len(forest.experts),
        "created": note.get("created"),
        "by": note.get("by"),
        "reason": forest.reason,
    }


def _confirmed(domain: str) -> bool:
    if not sys.stdin.isatty():
        return False
    return typer.confirm(f"Purge {domain} for good?")


def _tell(influence: "Influence", purged: bool = False) -> None:
    """Says what still carries a removed domain."""
    carriers = []
    if influence.seed:
        carriers.append(f"the seed {influence.seed[:12]}, since it was a founding domain, and so every expert")
    if influence.tokenizer:
        carriers.append(f"the tokenizer {influence.tokenizer[:12]}, trained on its text among others")
    carriers += [f"the baseline {identity[:12]}, trained on it among others" for identity in influence.baselines]
    carriers += [f"the expert of {domain}, which descends from its expert" for domain in influence.descendants]
    if influence.merged and not purged:
        carriers.append(f"{len(influence.merged)} averaged models in the store")
    carriers.append("averaged models that were written elsewhere before, with `btm merge`")
    print("what still carries its influence:")
    for carrier in carriers:
        print(f"- {carrier}")


def open_ledger(store: str) -> "Ledger":
    """The ledger of a store that was found to be usable."""
    from btm_cluster.ledger import Ledger

    ledger = Ledger.open(store)
    ledger.storage.check()
    return ledger
