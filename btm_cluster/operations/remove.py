"""`btm forest remove`: taking a domain out of a forest, bringing one back, and purging one.

A removal is at once effective in whatever is made of the forest afterwards. What was made before may still
carry the domain's influence, and that is found from lineage. What a purge deletes is `ledger/purge.py`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from btm_cluster.errors import UserError
from btm_cluster.forest import Expert, Forest, descendants, put_back, take_out
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.ledger.purge import PurgePlan, check_spares_others, plan_purge
from btm_cluster.ledger.purge import purge as delete
from btm_cluster.ledger.versions import append_next, last_expert, newest_version


@dataclass(frozen=True)
class Influence:
    """Carriers of a domain's influence once its expert is out of the forest."""

    seed: str | None
    """The seed, and the tokenizer where it was trained here: of a founding domain."""
    tokenizer: str | None
    baselines: tuple[str, ...]
    """Transformer-LMs and DEMixes that were trained on its text."""
    descendants: tuple[str, ...]
    """Domains of the forest whose experts branched from an average that its
    expert was part of, or descend from such."""
    merged: tuple[str, ...]
    """Averaged models in the store."""


@dataclass(frozen=True)
class Purged:
    """The outcome of a purge: what it deleted, and what it leaves."""

    forest: Forest | None
    """The newest version; None where the store has none."""
    purge_plan: PurgePlan
    influence: Influence | None
    """None where the domain never had an expert in a version."""


def remove(ledger: Ledger, domain: str) -> Forest:
    """The next version, without the domain.

    Raises:
        UserError: the forest has no such domain.
    """
    return append_next(ledger, lambda forest: take_out(forest, domain, f"removed {domain}"))


def planned_purge(ledger: Ledger, domain: str) -> PurgePlan:
    """A purge of `domain`, planned: all that it would delete.

    Raises:
        UserError: the store has nothing of it, or the expert of another domain would go with it.
    """
    found = plan_purge(ledger, domain)
    check_spares_others(ledger, found)
    return found


def purge(ledger: Ledger, domain: str) -> Purged:
    """Takes a domain out of the forest where it is in it, and deletes for good what the store has of it.

    Raises:
        UserError: the store has nothing of it, or the expert of another domain would go with it.
    """
    planned_purge(ledger, domain)
    forest = ledger.log.newest()
    if forest is not None and domain in forest.domains:
        forest = remove(ledger, domain)
    expert = last_expert(ledger, domain)
    influence = influence_of(ledger, forest, expert) if forest and expert else None
    purge_plan = plan_purge(ledger, domain)
    delete(ledger, purge_plan)
    newest = ledger.log.newest()
    if newest is not None and domain in newest.domains:  # a run merged it before there were tombstones to see
        forest = remove(ledger, domain)
    return Purged(forest, purge_plan, influence)


def bring_back(ledger: Ledger, domain: str) -> Forest:
    """The next version, with the expert that the domain had when it was taken out.

    Raises:
        UserError: it was not taken out, or was purged.
    """
    expert = last_expert(ledger, domain)
    if expert is None or domain not in newest_version(ledger).withdrawn:
        raise UserError(
            f"{domain!r} was not taken out of the forest", remedy="`btm forest log` says what was"
        )
    ledger.check_not_purged(Ref("model", expert.identity), remedy="other text may come under another name")
    manifest_hash = ledger.get(Ref("model", expert.identity)).manifest_hash
    ledger.check_standing(Ref("model", expert.identity), manifest_hash)
    return append_next(
        ledger, lambda forest: put_back(forest, expert, manifest_hash, f"brought back {domain}")
    )


def influence_of(ledger: Ledger, forest: Forest, expert: Expert) -> Influence:
    """Carriers of the influence of an expert's domain, in the forest and in the store.

    `forest` is without it.
    """
    models = {model.identity: model for model in ledger.list_artifacts("model")}
    text, carriers = Ref("text", expert.text), descendants(expert.identity, parents_of(ledger, models))
    founding = expert.text in {text for _, text in forest.foundation.domains}
    seed = models.get(forest.foundation.seed)
    tokenizer = ledger.find(Ref("tokenizer", forest.foundation.tokenizer))
    learned = [model for model in models.values() if text in model.inputs.get("texts", ())]
    return Influence(
        seed=forest.foundation.seed if founding and (seed is None or seed in learned) else None,
        tokenizer=tokenizer.identity if tokenizer and text in tokenizer.inputs.get("texts", ()) else None,
        baselines=tuple(m.identity for m in learned if m.facts.get("role") in ("transformer-lm", "demix")),
        descendants=tuple(e.domain for e in forest.experts if e.identity in carriers),
        merged=tuple(sorted(i for i in carriers if i in models and "models" in models[i].inputs)),
    )


def parents_of(ledger: Ledger, models: Mapping[str, Artifact]) -> dict[str, set[str]]:
    """The models that each model was made from, by identity: of those in the store,
    of what was purged, and of every version.

    The average that an expert started from may be collected. What it averaged is in the forest's log.
    """
    parents = {identity: set(model.parents) for identity, model in models.items()}
    for ref, tombstone in ledger.tombstones.all().items():
        parents.setdefault(ref.identity, set()).update(tombstone.body["parents"])
    for forest, _ in ledger.log.history():
        for expert in forest.experts:
            parents.setdefault(expert.identity, set()).update(parent.identity for parent in expert.parents)
    return parents
