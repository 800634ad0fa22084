"""Deleting a domain for good: its text, tokens, scores, checkpoints, weights and inbox files, in all versions a store keeps.

A blob that something else shares stays. Tombstones stay too, written before anything is deleted: they keep what was purged
from coming back, end roll-back, and hold the lineage that descendants still have. Run again, an interrupted purge goes on.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from btm_cluster.errors import UserError
from btm_cluster.expansion.inbox import INBOX, MARKER
from btm_cluster.forest import Forest
from btm_cluster.ledger import THREADS, Artifact, Ledger, Ref, artifact_key, blob_key, tombstone_key, training_folder
from btm_cluster.records import EXPANSIONS, HELD, LOGS, QUARANTINE, list_branch_points, list_refusals, newest_held
from btm_cluster.upkeep.housekeeping import read_manifests
from btm_cluster.upkeep.lineage import MIXED, needs

DERIVED = ("scores", *MIXED)
"""Each kind is found by those before it, so they are deleted in reverse: an interrupted purge still finds what is left."""


@dataclass(frozen=True)
class Condemned:
    """What a purge of a domain deletes."""

    domain: str
    texts: tuple[str, ...]
    experts: Mapping[str, tuple[str, ...]]
    """Models that were trained on its text alone, with their parents: merged, held back, or lost in a race; and a study's
    experts on random splits that hold some of it."""
    manifests: tuple[str, ...]
    blobs: tuple[str, ...]
    trainings: tuple[str, ...]
    """Models with training checkpoints, or with versions of such."""
    records: tuple[str, ...]
    """Branch points, judgements and refusals of the domain, and branch points that would start from its expert."""
    inbox_files: int
    kinds: Mapping[str, int]
    """Artifacts by kind."""
    size_bytes: int


def condemn(ledger: Ledger, domain: str) -> Condemned:
    """Finds everything of a domain, without touching it.

    Raises:
        UserError: the store has nothing of it.
    """
    if "/" in domain or domain.startswith("."):
        raise UserError(f"{domain!r} is no domain")
    versions = [forest for version in ledger.log.versions() if (forest := ledger.log.version(version)) is not None]
    manifests = read_manifests(ledger)
    texts = _texts_of(ledger, domain, versions, manifests)
    listed = {e.identity: tuple(p.identity for p in e.parents) for f in versions for e in f.experts if e.text in texts}
    trained = {
        a.identity: a.parents for a in manifests.values() if a.kind == "model" and _is_expert_of(a.recipe, texts)
    }
    experts = {**listed, **trained}
    going = {key for key, artifact in manifests.items() if _goes(artifact, domain, texts, experts)}
    models = {artifact_key(Ref("model", identity)) for identity in experts}
    for kind in DERIVED:
        of_it = {key for key, one in manifests.items() if one.kind == kind and _is_of(one, going | models)}
        going |= of_it
    kept = {blob_key(a.ref, blob.sha256) for key, a in manifests.items() if key not in going for blob in a.blobs}
    blobs = {blob_key(manifests[key].ref, b.sha256): b.size_bytes for key in going for b in manifests[key].blobs}
    inbox = list(ledger.storage.list(f"{INBOX}{domain}/"))
    records = _records_of(ledger, domain, versions, experts)
    found = Condemned(
        domain=domain,
        texts=tuple(sorted(texts)),
        experts=experts,
        manifests=tuple(sorted(going | models)),
        blobs=tuple(sorted(blobs.keys() - kept)),
        trainings=tuple(sorted({*experts, *(manifests[key].identity for key in going if key.startswith("training/"))})),
        records=tuple(sorted(records)),
        inbox_files=len(inbox),
        kinds=Counter(manifests[key].kind for key in going),
        size_bytes=sum(size for key, size in blobs.items() if key not in kept) + sum(e.size_bytes for e in inbox),
    )
    if not (texts or experts or going or inbox or records):
        raise UserError(f"the store has nothing of {domain!r}", expected="a domain of the forest, its log or its inbox")
    return found


def purge(ledger: Ledger, condemned: Condemned) -> None:
    """Deletes it: tombstones first, then what an expansion would pick up, then manifests, then what only they named."""
    storage = ledger.storage
    for kind, identity, parents in [
        *(("text", text, ()) for text in condemned.texts),
        *(("model", model, parents) for model, parents in condemned.experts.items()),
    ]:
        body = {"domain": condemned.domain, "kind": kind, "identity": identity, "parents": parents}
        ledger.documents.create(tombstone_key(Ref(kind, identity)), body)
    storage.delete(f"{INBOX}{condemned.domain}/{MARKER}")
    storage.erase(f"{INBOX}{condemned.domain}/")
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(storage.erase, condemned.records))
        for kind in reversed(DERIVED):
            list(pool.map(storage.erase, [key for key in condemned.manifests if key.startswith(f"artifacts/{kind}/")]))
        list(pool.map(storage.erase, condemned.manifests))
        list(pool.map(lambda identity: storage.erase(training_folder(identity)), condemned.trainings))
        # Whoever committed meanwhile may share a blob by now.
        named = {blob_key(a.ref, blob.sha256) for a in read_manifests(ledger).values() for blob in a.blobs}
        list(pool.map(storage.erase, [key for key in condemned.blobs if key not in named]))


def _texts_of(
    ledger: Ledger, domain: str, versions: Iterable[Forest], manifests: Mapping[str, Artifact]
) -> frozenset[str]:
    """The texts that ever went by a domain's name, but for those that another domain of the forest stands on."""
    forests = list(versions)
    named = {expert.text for forest in forests for expert in forest.experts if expert.domain == domain}
    named |= {text for forest in forests[:1] for name, text in forest.foundation.domains if name == domain}
    named |= {point.text for point in list_branch_points(ledger) if point.domain == domain}
    named |= {str(a.facts["text"]) for a in manifests.values() if _reads(a, domain)}
    # A study's random splits hold its documents among others'.
    named |= {str(a.facts["text"]) for a in manifests.values() if named & {*a.recipe.get("shuffle", ())}}
    others = {expert.text for forest in forests[-1:] for expert in forest.experts if expert.domain != domain}
    return frozenset(named - others)


def _records_of(
    ledger: Ledger, domain: str, versions: list[Forest], experts: Mapping[str, tuple[str, ...]]
) -> set[str]:
    standing = versions[-1].domains if versions else ()
    points = {
        point.identity
        for point in list_branch_points(ledger)
        if point.domain == domain
        or (point.domain not in standing and {parent.identity for parent in point.start.parents} & experts.keys())
    }
    refused = {identity for identity, refusal in list_refusals(ledger).items() if refusal.folder == domain}
    keys = {f"{EXPANSIONS}{point}.json" for point in points} | {f"{QUARANTINE}{identity}.json" for identity in refused}
    curves = (entry.key.split("/")[:3] for entry in ledger.storage.list(LOGS))
    keys |= {"/".join([*folders, ""]) for folders in curves if folders[-1] == domain}
    return keys | {
        f"{HELD}{held.branch_point}-" for held in newest_held(ledger).values() if held.branch_point in points
    }


def _goes(artifact: Artifact, domain: str, texts: frozenset[str], experts: Mapping[str, object]) -> bool:
    recipe = artifact.recipe
    match artifact.kind:
        case "text":
            return artifact.identity in texts
        case "source":
            return artifact.facts["text"] in texts or _reads(artifact, domain)
        case "tokens":
            return recipe["text"] in texts
        case "overlap":
            return not texts.isdisjoint({recipe["train"], *recipe["tests"]})
        case "model":  # an average that holds its weights is made again without them, where somebody asks for one
            of_expert = "average" in recipe and any(parent in experts for parent in artifact.parents)
            is_named = artifact.note.get("name") in _averages_for(domain)
            of_demix = "demix" in recipe and recipe["text"] in texts  # its feed-forwards saw nothing else
            return artifact.identity in experts or of_expert or of_demix or is_named
        case "soup":
            return not experts.keys().isdisjoint(recipe["models"])
        case "training":
            return _is_expert_of(artifact.facts.get("model", {}), texts)
    return False


def _averages_for(domain: str) -> tuple[str, ...]:
    """What averages of other experts are called that were made for a domain: where its expert starts, and of its posterior."""
    return (f"start of {domain}", f"posterior for {domain}")


def _is_of(artifact: Artifact, going: set[str]) -> bool:
    """Whether scores are of a model or of tokens that go, or a mixture of such scores."""
    return any(artifact_key(ref) in going for ref in needs(artifact))


def _reads(artifact: Artifact, domain: str) -> bool:
    """Whether it is the reading of a text of that name, as a domain or, earlier or by another plan, as a target."""
    return artifact.kind == "source" and artifact.note.get("name") == domain


def _is_expert_of(recipe: Mapping[str, object], texts: frozenset[str]) -> bool:
    """Whether a training is of an expert on these texts: the seed, and what it shares with others, learns from all of them."""
    given = recipe.get("texts")
    if not recipe.get("restart_data") or not isinstance(given, list):
        return False
    return bool(given) and {text.partition("/")[0] for text in given} <= texts  # `<text>/development/…`: a study's
