"""Keeping a store: is every committed byte what was written, and what does nothing reach any more.

Knows which artifacts need which; deletes only what no kept forest version, no run or expansion in the making and nothing
young reaches. The inbox, refusals and tombstones are never looked at by a collection.
"""

import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from btm_cluster.errors import StoreError
from btm_cluster.ledger import THREADS, Artifact, Ledger, Ref, artifact_key, blob_key
from btm_cluster.records import EXPANSIONS, HELD, QUARANTINE, TOMBSTONES, open_branch_points
from btm_cluster.requests import way_of
from btm_cluster.storage import Storage

MIXED = ("fit-for-all", "gate", "mixture")
"""What is made of scores; the others of the first too."""


@dataclass(frozen=True)
class Verified:
    """What was read, and what was wrong with it."""

    versions: int
    artifacts: int
    blobs: int
    size_bytes: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Garbage:
    """What may go: manifests first, then what only they named."""

    manifests: tuple[str, ...]
    blobs: tuple[str, ...]
    size_bytes: int
    kinds: Mapping[str, int]
    """Artifacts by kind."""
    older_than: float
    """By the store's clock; a blob that was written since is no garbage any more."""


def verify(ledger: Ledger) -> Verified:
    """Reads every manifest, forest version and blob of a store, in parallel, and checks each byte against its hash."""
    problems: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        keys = [entry.key for entry in _manifest_entries(ledger.storage)]
        artifacts: dict[str, Artifact] = {}
        for key, found in zip(keys, pool.map(lambda key: _attempt(ledger, key), keys), strict=True):
            if isinstance(found, Artifact):
                artifacts[key] = found
            elif found:
                problems.append(found)
        blobs = {
            blob_key(artifact.ref, blob.sha256): (artifact, blob.name, blob.size_bytes)
            for artifact in artifacts.values()
            for blob in artifact.blobs
        }
        problems += [p for p in pool.map(lambda b: _check_blob(ledger, b[0], b[1], b[2]), blobs.values()) if p]
    versions = ledger.log.versions()
    purged, damaged = _read_tombstones(ledger)
    problems += damaged + list(_check_versions(ledger, versions, artifacts, purged))
    problems += [f"{key} was purged, and is there again" for key in sorted(purged & artifacts.keys())]
    size = sum(size for _, _, size in blobs.values())
    return Verified(len(versions), len(artifacts), len(blobs), size, tuple(problems))


def find_garbage(ledger: Ledger, keep_versions: int, grace_seconds: float) -> Garbage:
    """What neither the last `keep_versions` nor the pinned ones nor anything younger than `grace_seconds` reaches.

    Ages are taken by the store's own clock. A forest's versions themselves, a few kB each, always stay.
    """
    storage = ledger.storage
    oldest_kept = store_time(storage) - grace_seconds
    entries = {entry.key: entry for entry in _manifest_entries(storage)}
    manifests = read_manifests(ledger, entries)
    young = {key for key in manifests if entries[key].modified >= oldest_kept}
    artifacts = {a.ref: a for key, a in manifests.items() if a.kind != "training"}

    points = open_branch_points(ledger, ledger.log.newest())
    expanding = {point.text for point in points}
    roots = {manifests[key].ref for key in young if manifests[key].kind != "training"}
    in_the_making = {
        artifact.identity: artifact
        for key, artifact in manifests.items()
        if artifact.kind == "training" and (key in young or _is_expert_of(artifact.facts.get("model", {}), expanding))
    }
    for training in in_the_making.values():
        roots |= set(_needs("model", training.facts.get("model", {})))
    roots |= {ref for point in points for ref in (Ref("text", point.text), point.start.model)}
    roots |= {Ref("model", parent.identity) for point in points for parent in point.start.parents}
    roots |= {ref for ref, a in artifacts.items() if ref.kind == "model" and _is_expert_of(a.recipe, expanding)}
    for version in {*ledger.log.versions()[-keep_versions:], *ledger.log.pinned()}:
        forest = ledger.log.version(version)
        roots |= {Ref("model", identity) for identity in (forest.manifests if forest else ())}
    kept = reached(roots, artifacts)

    def stays(key: str) -> bool:
        artifact = manifests[key]
        if artifact.kind == "training":
            return artifact.identity in in_the_making and Ref("model", artifact.identity) not in artifacts
        return artifact.ref in kept

    going = dict.fromkeys(key for key in manifests if key not in young and not stays(key))
    named = {blob_key(a.ref, blob.sha256) for key, a in manifests.items() if key not in going for blob in a.blobs}
    blobs = [e for e in _blob_entries(storage) if e.key not in named and e.modified < oldest_kept]
    return Garbage(
        manifests=tuple(going),
        blobs=tuple(entry.key for entry in blobs),
        size_bytes=sum(entry.size_bytes for entry in blobs),
        kinds=Counter(manifests[key].kind for key in going),
        older_than=oldest_kept,
    )


def collect(ledger: Ledger, garbage: Garbage) -> None:
    """Deletes garbage: manifests before what they name, so that a crash in between leaves nothing half there."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(ledger.storage.delete, garbage.manifests))
        # Whoever committed meanwhile named its blobs by now, or uploaded them anew: those stay.
        named = {blob_key(a.ref, blob.sha256) for a in read_manifests(ledger).values() for blob in a.blobs}
        old = {entry.key for entry in _blob_entries(ledger.storage) if entry.modified < garbage.older_than}
        list(pool.map(ledger.storage.delete, [key for key in garbage.blobs if key in old and key not in named]))


def read_manifests(ledger: Ledger, keys: Iterable[str] | None = None) -> dict[str, Artifact]:
    """Every manifest of a store, or those of some keys, by key: artifacts and training checkpoints."""
    keys = [entry.key for entry in _manifest_entries(ledger.storage)] if keys is None else list(keys)
    with ThreadPoolExecutor(THREADS) as pool:
        read = zip(keys, pool.map(ledger.read_manifest, keys), strict=True)
        return {key: artifact for key, artifact in read if artifact is not None}


def store_time(storage: Storage) -> float:
    """Now, by the store's clock: seconds since 1970. A machine's own clock may be an hour off."""
    key = f"clock/{uuid.uuid4().hex}"
    storage.create(key, b"")
    try:
        return next(storage.list(key)).modified
    finally:
        storage.delete(key)


def _needs(kind: str, recipe: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> Iterator[Ref]:
    if kind == "model":
        start = recipe.get("start") or {}
        parents = recipe.get("average") or start.get("parents") or ()
        yield from (Ref("model", parent["identity"]) for parent in parents)
        yield from (Ref("text", text) for text in recipe.get("texts", ()))
        if "demix" in recipe:  # a part, and the DEMix of which it is one: neither is of use alone
            yield Ref("model", recipe["demix"])
        yield from (Ref("model", part) for part in (facts or {}).get("parts", ()))
        if "tokenizer" in recipe:
            yield Ref("tokenizer", recipe["tokenizer"])
    elif kind == "scores":
        yield Ref("model", recipe["model"])
        yield from (Ref("tokens", tokens) for tokens in recipe["tokens"])
    elif kind in MIXED:
        yield from (Ref("scores", scores) for split in recipe["scores"] for scores in split)
        yield from (Ref("fit-for-all", fit) for fit in recipe.get("for_all", {}).values())
    elif kind == "soup":
        yield from (Ref("model", model) for model in recipe["models"])
        yield from (Ref("tokens", tokens) for tokens in recipe["tokens"])
    elif kind == "tokens":
        yield Ref("text", recipe["text"])
        yield Ref("tokenizer", recipe["tokenizer"])
    elif kind == "overlap":
        yield from (Ref("text", text) for text in (recipe["train"], *recipe["tests"]))
    elif kind == "source":
        yield Ref("text", (facts or {})["text"])


def needs(artifact: Artifact) -> list[Ref]:
    """What an artifact is made from, and is of no use without."""
    return list(_needs(artifact.kind, artifact.recipe, artifact.facts))


def reached(roots: Iterable[Ref], artifacts: Mapping[Ref, Artifact]) -> set[Ref]:
    """The roots, what they need, the scores and baselines of what is kept, and what is made of kept texts and models alone."""
    kept: set[Ref] = set()

    def keep(ref: Ref) -> None:
        waiting = [ref]  # no recursion: a line of descent may be longer than the stack
        while waiting:
            one = waiting.pop()
            if one not in kept and one in artifacts:
                kept.add(one)
                waiting += needs(artifacts[one])

    for root in roots:
        keep(root)
    for ref, artifact in artifacts.items():
        passed = [Ref("model", seed) for seed in artifact.facts.get("passed", ())]  # by a Transformer-LM
        if any(seed in kept for seed in passed):
            keep(ref)
    rivals = {_trained_alike(artifacts[ref].recipe) for ref in kept if ref.kind == "model"}
    for ref, artifact in artifacts.items():
        if artifact.recipe.get("is_demix") and _trained_alike(artifact.recipe) in rivals:
            keep(ref)
    for ref, artifact in artifacts.items():
        if ref.kind == "scores" and Ref("model", artifact.recipe["model"]) in kept:
            keep(ref)
    for kind in ("tokens", "source", "overlap", "soup", *MIXED):
        for ref, artifact in artifacts.items():
            if ref.kind == kind and all(need in kept for need in needs(artifact)):
                keep(ref)
    return kept


def _trained_alike(recipe: Mapping[str, Any]) -> str:
    """The same for a seed, the Transformer-LM that passes it, and the DEMix that is their rival."""
    return way_of({name: value for name, value in recipe.items() if name != "is_demix"})


def _is_expert_of(recipe: Mapping[str, Any], texts: set[str]) -> bool:
    """Whether a training is of an expert on one of these texts."""
    return bool(recipe.get("restart_data")) and not texts.isdisjoint(recipe.get("texts", ()))


def _manifest_entries(storage: Storage) -> Iterator[Any]:
    for folder in ("artifacts/", "training/"):
        yield from (entry for entry in storage.list(folder) if entry.key.endswith(".json"))


def _blob_entries(storage: Storage) -> Iterator[Any]:
    yield from storage.list("blobs/")
    yield from storage.list("clock/")  # a collection that crashed left it
    yield from (entry for entry in storage.list("training/") if not entry.key.endswith(".json"))


def _attempt(ledger: Ledger, key: str) -> Artifact | str | None:
    try:
        return ledger.read_manifest(key)
    except StoreError as exc:
        return str(exc)


def _check_blob(ledger: Ledger, artifact: Artifact, name: str, size_bytes: int) -> str:
    """What is wrong with a blob; nothing, if it is whole."""
    try:
        found = sum(len(chunk) for chunk in ledger.read_chunks(artifact, name))
        if ledger.storage.read(blob_key(artifact.ref, artifact.blob(name).sha256), size_bytes, 1):
            return f"{artifact.kind} {artifact.identity[:12]}, file {name}: longer than {found} bytes"
    except StoreError as exc:
        return str(exc)
    return ""


def _read_tombstones(ledger: Ledger) -> tuple[set[str], list[str]]:
    """The manifest keys of what was purged; and every record of a living forest that is damaged."""
    damaged: list[str] = []
    keys = [entry.key for folder in (EXPANSIONS, HELD, QUARANTINE, TOMBSTONES) for entry in ledger.storage.list(folder)]

    def check(key: str) -> str:
        try:
            ledger.documents.read(key)
        except StoreError as exc:
            return str(exc)
        return ""

    with ThreadPoolExecutor(THREADS) as pool:
        damaged += [problem for problem in pool.map(check, keys) if problem]
    return {f"artifacts/{key.removeprefix(TOMBSTONES)}" for key in keys if key.startswith(TOMBSTONES)}, damaged


def _check_versions(
    ledger: Ledger, versions: Iterable[int], artifacts: Mapping[str, Artifact], purged: Collection[str]
) -> Iterator[str]:
    """Each version reads, names the version before it, and names models that are there as it names them, or were purged."""
    versions = list(versions)
    kept = {*versions[-1:], *ledger.log.pinned()}  # `gc` may have collected what only older ones name
    parent: str | None = None
    for version in versions:
        try:
            forest, own_hash = ledger.log.version(version), ledger.log.version_hash(version)
        except StoreError as exc:
            yield str(exc)
            parent = None
            continue
        assert forest is not None
        if parent is not None and forest.parent != parent:
            yield f"forest version {version} names another parent\n  found:    {forest.parent}\n  expected: {parent}"
        parent = own_hash
        for identity, manifest_hash in forest.manifests.items():
            key = artifact_key(Ref("model", identity))
            found, gone = artifacts.get(key), key in purged
            if (found is None and version in kept and not gone) or (
                found is not None and found.manifest_hash != manifest_hash
            ):
                what = "another manifest" if found else "no manifest"
                yield f"forest version {version} names model {identity[:12]}\n  found:    {what}\n  expected: {manifest_hash}"
