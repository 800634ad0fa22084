"""Deleting a domain for good: its text, tokens, scores, checkpoints, weights and inbox
files, in all versions a store keeps.

A blob that something else shares stays. A record of all that goes is written before anything is deleted, so
that a purge which was cut short goes on when it is run again. Record and tombstones stay: they keep what was
purged from coming back, end roll-back, and hold the lineage that descendants still have.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from btm_cluster.errors import UserError
from btm_cluster.forest import Forest
from btm_cluster.ledger import (
    Artifact,
    Ledger,
    PurgeRecord,
    Ref,
    artifact_key,
    blob_key,
    in_parallel,
    training_folder,
)
from btm_cluster.ledger.keys import INBOX, MARKER
from btm_cluster.ledger.lineage import layers, purged_with
from btm_cluster.ledger.records import (
    EXPANSIONS,
    HELD,
    LOGS,
    QUARANTINE,
    list_branch_points,
    list_refusals,
    newest_held,
)
from btm_cluster.ledger.timelines import TIMELINE_FILE


@dataclass(frozen=True)
class PurgePlan:
    """The plan of a purge: all that it deletes of a domain."""

    domain: str
    texts: tuple[str, ...]
    experts: Mapping[str, tuple[str, ...]]
    """Models that go, with their parents: the domain's experts, merged, held back, or lost in a race; a
    study's on random splits that hold some of its text; its part of a DEMix; and averages of any of these, or
    whose weights were fitted on it."""
    manifests: tuple[str, ...]
    blobs: tuple[str, ...]
    trainings: tuple[str, ...]
    """Models with training checkpoints, or with versions of such."""
    records: tuple[str, ...]
    """Branch points, judgements and refusals of the domain, and branch points that
    would start from something that goes."""
    inbox_files: int
    kinds: Mapping[str, int]
    """Artifacts by kind."""
    size_bytes: int

    def to_record(self) -> PurgeRecord:
        """The record that is written before anything is deleted."""
        folders = [f"{INBOX}{self.domain}/", *map(training_folder, self.trainings)]
        prefixes = tuple(sorted({*folders, *self.records}))
        return PurgeRecord(self.domain, self.texts, self.experts, self.manifests, self.blobs, prefixes)


def plan_purge(ledger: Ledger, domain: str) -> PurgePlan:
    """Finds everything of a domain, without touching it, and what purges that were cut short have left of it.

    Raises:
        UserError: the store has nothing of it.
    """
    if "/" in domain or domain.startswith("."):
        raise UserError(f"{domain!r} is no domain")
    begun = [record for record in ledger.tombstones.unfinished() if record.domain == domain]
    forests = [forest for forest, _ in ledger.log.history()]
    manifests = ledger.read_manifests()
    texts = _texts_of(ledger, domain, forests, manifests) | {
        text for record in begun for text in record.texts
    }
    going, experts = _artifacts_of(texts, forests, begun, manifests)
    going |= {key for key, artifact in manifests.items() if _reads(artifact, domain)}
    blobs = _blobs_of_these_alone(ledger, going, manifests, begun)
    inbox = list(ledger.storage.list(f"{INBOX}{domain}/"))
    records = _records_of(ledger, domain, forests, {manifests[key].ref for key in going})
    models = {artifact_key(Ref("model", identity)) for identity in experts}
    training = {manifests[key].identity for key in going if manifests[key].kind == "training"}
    found = PurgePlan(
        domain=domain,
        texts=tuple(sorted(texts)),
        experts=dict(sorted(experts.items())),
        manifests=tuple(sorted({*going, *models, *(key for record in begun for key in record.manifests)})),
        blobs=tuple(sorted(blobs)),
        trainings=tuple(
            sorted({*experts, *training, *(p.split("/")[1] for p in _prefixes(begun, "training/"))})
        ),
        records=tuple(
            sorted(
                {*records, *_told_of(ledger, domain), *_prefixes(begun, EXPANSIONS, QUARANTINE, HELD, LOGS)}
            )
        ),
        inbox_files=len(inbox),
        kinds=dict(Counter(manifests[key].kind for key in going)),
        size_bytes=sum(blobs.values()) + sum(entry.size_bytes for entry in inbox),
    )
    if not (texts or experts or going or inbox or records or begun):
        raise UserError(
            f"the store has nothing of {domain!r}", expected="a domain of the forest, its log or its inbox"
        )
    return found


def _artifacts_of(
    texts: Collection[str], forests: list[Forest], begun: list[PurgeRecord], manifests: Mapping[str, Artifact]
) -> tuple[set[str], dict[str, tuple[str, ...]]]:
    """Keys of the manifests that go with some texts, and every model that
    goes or has gone, with its parents."""
    listed = {
        e.identity: tuple(p.identity for p in e.parents)
        for f in forests
        for e in f.experts
        if e.text in texts
    }
    purged = {Ref("text", text) for text in texts} | {Ref("model", model) for model in listed}
    going = purged_with(purged | {ref for record in begun for ref in record.refs}, manifests)
    models = {m.identity: m.parents for key in going if (m := manifests[key]).kind == "model"} | listed
    for record in begun:
        models = dict(record.models) | models
    return going, models


def purge(ledger: Ledger, purge_plan: PurgePlan) -> None:
    """Deletes it: record and tombstones first, then what an expansion would pick up, then
    manifests, then what only they named.

    Whoever commits something looks for tombstones afterwards. So what is not found once they are written is
    not there.

    Raises:
        UserError: the expert of another domain would go with it. Nothing is deleted, though where that one was
            merged meanwhile, the purge has begun: it goes on when it is run again.
    """
    check_spares_others(ledger, purge_plan)
    record = purge_plan.to_record()
    ledger.tombstones.begin(record)
    while True:
        again = plan_purge(ledger, purge_plan.domain)
        check_spares_others(ledger, again)
        if again.to_record() == record:
            break
        record = again.to_record()
        ledger.tombstones.begin(record)
    _delete(ledger, record)
    for begun in ledger.tombstones.unfinished():
        if begun.domain == record.domain:
            ledger.tombstones.end(begun)


def check_spares_others(ledger: Ledger, purge_plan: PurgePlan) -> None:
    """Refuses a purge with which the expert of another domain of the forest would go.

    Raises:
        UserError: naming such domains.
    """
    forest, domain = ledger.log.newest(), purge_plan.domain
    others = [e.domain for e in (forest.experts if forest else ()) if e.identity in purge_plan.experts]
    if over := [name for name in others if name != domain]:
        raise UserError(
            f"{domain!r} cannot be purged while experts of other domains hold only what changed of a model that "
            "goes with it",
            found=f"{', '.join(over)}: trained in part, from an average that the expert of {domain!r} is part of",
            expected="no expert in the forest that is of no use afterwards",
            remedy=f"take these out first: `btm forest remove {over[0]}`; other text may come under another name",
        )


def still_there(ledger: Ledger, record: PurgeRecord, manifests: Mapping[str, Artifact]) -> set[str]:
    """The objects of a purge that was cut short which a listing shows. `manifests` are all of the store's."""
    named = _named_by(manifests[key] for key in manifests.keys() - {*record.manifests})
    blobs = {entry.key for entry in ledger.storage.list("blobs/")} & {*record.blobs} - named
    others = in_parallel(lambda prefix: [entry.key for entry in ledger.storage.list(prefix)], record.prefixes)
    return blobs | (manifests.keys() & {*record.manifests}) | {key for keys in others for key in keys}


def _delete(ledger: Ledger, record: PurgeRecord) -> None:
    storage = ledger.storage
    storage.delete(f"{INBOX}{record.domain}/{MARKER}")
    in_parallel(storage.erase, record.prefixes)
    for layer in layers(ledger.read_manifests(record.manifests)):
        in_parallel(storage.erase_object, layer)
    in_parallel(storage.erase_object, record.manifests)  # whose older versions a bucket may keep
    for folder in ("artifacts/", "blobs/"):  # nobody knows of whom it is: who still writes it begins anew
        in_parallel(storage.discard, [entry.key for entry in storage.unfinished(folder)])
    named = _named_by(ledger.read_manifests().values())  # whoever committed meanwhile may share a blob by now
    in_parallel(storage.erase_object, [key for key in record.blobs if key not in named])


def _blobs_of_these_alone(
    ledger: Ledger, going: Collection[str], manifests: Mapping[str, Artifact], begun: Iterable[PurgeRecord]
) -> dict[str, int]:
    """Blobs that go, with their sizes: no manifest that stays names them."""
    blobs = {
        blob_key(manifests[key].ref, b.sha256): b.size_bytes for key in going for b in manifests[key].blobs
    }
    left = {key for record in begun for key in record.blobs} - blobs.keys()  # whose manifests are gone
    listed = in_parallel(lambda key: [entry.size_bytes for entry in ledger.storage.list(key)], sorted(left))
    blobs |= {key: sum(sizes) for key, sizes in zip(sorted(left), listed, strict=True)}
    kept = _named_by(manifests[key] for key in manifests.keys() - {*going})
    return {key: size for key, size in blobs.items() if key not in kept}


def _named_by(artifacts: Iterable[Artifact]) -> set[str]:
    return {blob_key(artifact.ref, blob.sha256) for artifact in artifacts for blob in artifact.blobs}


def _texts_of(
    ledger: Ledger, domain: str, forests: list[Forest], manifests: Mapping[str, Artifact]
) -> frozenset[str]:
    """The texts that ever went by a domain's name, but for those that another
    domain of the forest stands on."""
    named = {expert.text for forest in forests for expert in forest.experts if expert.domain == domain}
    named |= {text for forest in forests[:1] for name, text in forest.foundation.domains if name == domain}
    named |= {point.text for point in list_branch_points(ledger) if point.domain == domain}
    named |= {
        part.identity
        for artifact in manifests.values()
        if _reads(artifact, domain)
        for part in artifact.parts
    }
    # A study's random splits hold its documents among others'.
    dealt = [
        a
        for a in manifests.values()
        if a.kind == "source" and any(ref.identity in named for ref in a.made_from)
    ]
    named |= {part.identity for artifact in dealt for part in artifact.parts}
    others = {expert.text for forest in forests[-1:] for expert in forest.experts if expert.domain != domain}
    return frozenset(named - others)


def _records_of(ledger: Ledger, domain: str, forests: list[Forest], going: Collection[Ref]) -> set[str]:
    standing = forests[-1].domains if forests else ()
    points = {
        point.identity
        for point in list_branch_points(ledger)
        if point.domain == domain or (point.domain not in standing and point.start.model in going)
    }
    refused = {identity for identity, refusal in list_refusals(ledger).items() if refusal.folder == domain}
    keys = {f"{EXPANSIONS}{point}.json" for point in points} | {
        f"{QUARANTINE}{identity}.json" for identity in refused
    }
    curves = (entry.key.split("/")[:3] for entry in ledger.storage.list(LOGS))
    keys |= {"/".join([*folders, ""]) for folders in curves if folders[-1] == domain and ".." not in folders}
    held = {
        f"{HELD}{one.branch_point}-" for one in newest_held(ledger).values() if one.branch_point in points
    }
    return keys | held


def _told_of(ledger: Ledger, domain: str) -> set[str]:
    """Files of runs that may tell of a domain, beside its curves: timelines that mention it, and every verdict
    and report, which name and quote all domains and can be made again."""
    listed = [entry.key for entry in ledger.storage.list(LOGS)]
    keys = [key for key in listed if key.count("/") == 2 and ".." not in key.split("/")]
    return {
        key
        for key in keys
        if not key.endswith(f"/{TIMELINE_FILE}") or domain.encode() in ledger.storage.read(key)
    }


def _prefixes(begun: Iterable[PurgeRecord], *folders: str) -> set[str]:
    return {prefix for record in begun for prefix in record.prefixes if prefix.startswith(folders)}


def _reads(artifact: Artifact, domain: str) -> bool:
    """Whether it is the reading of a text of that name, as a domain or,
    earlier or by another plan, as a target."""
    return artifact.kind == "source" and artifact.note.get("name") == domain
