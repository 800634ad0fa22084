"""Artifacts and the forest log on a real folder: write-once, races, damage, half-written work, training checkpoints."""

import hashlib
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.errors import IntegrityError, MissingError, StoreError
from btm_cluster.forest import Expert, Forest, Foundation, Parent, merge_into
from btm_cluster.ledger import CHUNK_BYTES, Artifact, Ledger, Ref, describe_file
from btm_cluster.storage.local_folder import LocalFolder

MODEL = Ref("model", "0123456789abcdef")
FOUNDATION = Foundation("seed", "tokenizer", "model", 1024, (("code", "text-code"), ("law", "text-law")))
PLANTED = Forest(0, FOUNDATION, (), {"seed": "hash"}, "planted")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def ledger(store: Path) -> Ledger:
    return Ledger.open(str(store))


def files(folder: Path, contents: Mapping[str, bytes]) -> dict[str, Path]:
    """Local files to commit."""
    paths = {}
    for name, data in contents.items():
        paths[name] = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}"
        paths[name].write_bytes(data)
    return paths


def commit(ledger: Ledger, folder: Path, contents: Mapping[str, bytes], ref: Ref = MODEL, **facts: Any) -> Artifact:
    return ledger.commit(ref, {"made": "of this"}, files(folder, contents), facts)


def everything_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest_of(store: Path, ref: Ref = MODEL) -> Path:
    return store / "artifacts" / ref.kind / f"{ref.identity}.json"


class FailingFolder(LocalFolder):
    """A folder that is full for keys that contain `word`."""

    def __init__(self, location: str, word: str) -> None:
        super().__init__(location)
        self.word = word

    def create(self, key: str, data: bytes) -> bool:
        if self.word in key:
            raise StoreError(f"cannot create {key}", found="no space left on device")
        return super().create(key, data)


class ForgetfulFolder(LocalFolder):
    """A folder whose answer to a successful create is lost; the retry hears that the key is taken."""

    def create(self, key: str, data: bytes) -> bool:
        super().create(key, data)
        return super().create(key, data)


class WatchedFolder(LocalFolder):
    """A folder that remembers the order of what was done."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.done: list[tuple[str, str]] = []

    def create(self, key: str, data: bytes) -> bool:
        self.done.append(("create", key))
        return super().create(key, data)

    def upload(self, key: str, path: Path) -> None:
        self.done.append(("upload", key))
        super().upload(key, path)

    def delete(self, key: str) -> None:
        self.done.append(("delete", key))
        super().delete(key)


# Commit, find, open


def test_what_is_committed_is_found_and_opened_by_every_ledger_of_the_store(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    recipe = {"texts": ["a", "b"], "rate": 5e-4, "deep": {"none": None, "ü": [1, 2.5]}}
    made = ledger.commit(MODEL, recipe, files(tmp_path, {"w": b"weights", "c": b""}), {"tokens": 7}, {"seconds": 1.5})
    found = Ledger.open(str(store)).find(MODEL)
    assert found == made
    assert found is not None
    assert (found.ref, found.recipe, found.facts, found.note["seconds"]) == (MODEL, recipe, {"tokens": 7}, 1.5)
    assert {blob.name: ledger.open_file(found, blob.name).read_bytes() for blob in found.blobs} == {
        "w": b"weights",
        "c": b"",
    }
    assert found.has("w")
    assert not found.has("x")


def test_what_was_never_committed_is_none_or_missing(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.find(MODEL) is None
    with pytest.raises(MissingError):
        ledger.get(MODEL)
    made = commit(ledger, tmp_path, {"w": b"weights"})
    with pytest.raises(MissingError) as missing:
        ledger.open_file(made, "x")
    assert "w" in missing.value.found


def test_artifacts_are_listed_by_kind(ledger: Ledger, tmp_path: Path) -> None:
    refs = [Ref("model", "b"), Ref("model", "a"), Ref("models", "c"), Ref("scores", "a")]
    for ref in refs:
        commit(ledger, tmp_path, {"w": ref.identity.encode()}, ref)
    assert [artifact.ref for artifact in ledger.list_artifacts("model")] == [Ref("model", "a"), Ref("model", "b")]
    assert list(ledger.list_artifacts("tokens")) == []


def test_a_file_is_described_by_its_hash_and_those_of_its_chunks(tmp_path: Path) -> None:
    data = bytes(range(256)) * (CHUNK_BYTES // 256) + b"and five"
    (tmp_path / "f").write_bytes(data)
    blob = describe_file("f", tmp_path / "f")
    assert (blob.name, blob.size_bytes, blob.sha256) == ("f", len(data), hashlib.sha256(data).hexdigest())
    chunks = [data[:CHUNK_BYTES], data[CHUNK_BYTES:]]
    assert blob.chunks == tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks)


# Write once


def test_a_second_commit_changes_nothing_and_gets_the_first_ones_artifact(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    first = commit(ledger, tmp_path, {"w": b"first"}, who="first")
    before = manifest_of(store).read_bytes()
    second = commit(ledger, tmp_path, {"w": b"second"}, who="second")
    assert second == first
    assert second.facts == {"who": "first"}
    assert manifest_of(store).read_bytes() == before
    assert ledger.open_file(second, "w").read_bytes() == b"first"


def test_all_who_race_to_commit_one_artifact_get_the_winners(store: Path, tmp_path: Path) -> None:
    together = threading.Barrier(6)

    def race(number: int) -> Artifact:
        mine = Ledger.open(str(store))
        paths = files(tmp_path, {"w": b"made by %d" % number})
        together.wait()
        return mine.commit(MODEL, {}, paths, {"by": number})

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(race, range(6)))
    assert len({outcome.manifest_hash for outcome in outcomes}) == 1
    winner = outcomes[0].facts["by"]
    for outcome in outcomes:
        assert Ledger.open(str(store)).open_file(outcome, "w").read_bytes() == b"made by %d" % winner


def test_a_create_whose_success_went_unheard_is_still_a_success(store: Path, tmp_path: Path) -> None:
    forgetful = Ledger(ForgetfulFolder(str(store)))
    assert commit(forgetful, tmp_path, {"w": b"weights"}, who="me").facts == {"who": "me"}
    assert forgetful.log.append(PLANTED)
    assert not forgetful.log.append(PLANTED)


# Half-written


def test_an_artifact_whose_manifest_was_not_written_does_not_exist(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        commit(Ledger(FailingFolder(str(store), "artifacts/")), tmp_path, {"w": b"weights"})
    assert any(key.startswith("blobs/") for key in everything_below(store)), "the bytes were there already"
    ledger = Ledger.open(str(store))
    assert ledger.find(MODEL) is None
    assert list(ledger.list_artifacts("model")) == []
    again = commit(ledger, tmp_path, {"w": b"weights"})
    assert ledger.open_file(again, "w").read_bytes() == b"weights"


def test_a_manifest_is_written_after_everything_that_it_names(store: Path, tmp_path: Path) -> None:
    watched = WatchedFolder(str(store))
    commit(Ledger(watched), tmp_path, {"a": b"1", "b": b"2"})
    assert [verb for verb, _ in watched.done] == ["upload", "upload", "create"]


# Damage


@pytest.mark.parametrize(
    "damage", [b"", b"weightz", b"weights and more", b"w"], ids=["emptied", "changed", "longer", "cut"]
)
def test_a_damaged_blob_is_refused_with_what_was_found_and_expected(
    ledger: Ledger, store: Path, tmp_path: Path, damage: bytes
) -> None:
    made = commit(ledger, tmp_path, {"w": b"weights"})
    sha256 = hashlib.sha256(b"weights").hexdigest()
    (store / "blobs" / sha256).write_bytes(damage)
    with pytest.raises(IntegrityError) as refused:
        ledger.open_file(made, "w")
    assert hashlib.sha256(damage).hexdigest() in refused.value.found
    assert sha256 in refused.value.expected
    assert refused.value.remedy


def test_a_blob_that_is_gone_is_missing_and_named(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    made = commit(ledger, tmp_path, {"w": b"weights"})
    (store / "blobs" / made.blob("w").sha256).unlink()
    with pytest.raises(MissingError) as missing:
        ledger.open_file(made, "w")
    assert made.blob("w").sha256 in str(missing.value)


def test_a_blob_that_was_misread_once_is_read_again(store: Path, tmp_path: Path) -> None:
    class Misreading(LocalFolder):
        read_before = False

        def download(self, key: str, anew: bool = False) -> Path:
            if self.read_before:
                assert anew
                return super().download(key, anew)
            self.read_before = True
            (tmp_path / "misread").write_bytes(b"weightz")
            return tmp_path / "misread"

    ledger = Ledger(Misreading(str(store)))
    made = commit(ledger, tmp_path, {"w": b"weights"})
    assert ledger.open_file(made, "w").read_bytes() == b"weights"


def test_committing_again_mends_a_damaged_blob(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    made = commit(ledger, tmp_path, {"w": b"weights"})
    (store / "blobs" / made.blob("w").sha256).write_bytes(b"weightz")
    commit(ledger, tmp_path, {"w": b"weights"})
    assert ledger.open_file(made, "w").read_bytes() == b"weights"


def test_a_manifest_with_any_single_bit_flipped_is_refused_or_means_the_same(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    made = commit(ledger, tmp_path, {"w": b"weights"}, loss=1.5)
    path = manifest_of(store)
    whole = path.read_bytes()
    refused: list[IntegrityError] = []
    for position in range(len(whole)):
        flipped = bytes([whole[position] ^ (1 << position % 7)])
        path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        try:
            assert ledger.find(MODEL) == made, f"byte {position} became {flipped!r} unnoticed"
        except IntegrityError as exc:
            refused.append(exc)
    assert all(exc.found and exc.expected for exc in refused)
    assert len(refused) > 0.8 * len(whole)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"hash": "0"}'])
def test_what_is_no_manifest_is_refused_by_its_key(ledger: Ledger, store: Path, tmp_path: Path, damage: bytes) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    manifest_of(store).write_bytes(damage)
    with pytest.raises(IntegrityError) as refused:
        ledger.find(MODEL)
    assert MODEL.identity in refused.value.what


def test_a_manifest_in_anothers_place_is_not_taken_for_it(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    other = Ref("model", "fedcba9876543210")
    manifest_of(store, other).write_bytes(manifest_of(store).read_bytes())
    with pytest.raises(IntegrityError) as refused:
        ledger.find(other)
    assert MODEL.identity in refused.value.found
    assert other.identity in refused.value.expected


# The forest log


def expert(domain: str) -> Expert:
    return Expert(domain, f"expert-{domain}", "weights", f"text-{domain}", (Parent("seed", 0.25), Parent("x", 0.75)))


def test_versions_are_appended_and_read_back_as_they_were(ledger: Ledger, store: Path) -> None:
    assert ledger.log.newest() is None
    assert ledger.log.versions() == []
    versions = [PLANTED]
    for domain in "bcadefghijkl":
        versions.append(merge_into(versions[-1], [expert(domain)], {f"expert-{domain}": "hash"}, f"added {domain}"))
    for version in versions:
        assert ledger.log.append(version)
    again = Ledger.open(str(store))
    assert again.log.versions() == list(range(13))
    newest = again.log.newest()
    assert newest is not None
    assert newest.version == 12
    for number, version in enumerate(versions):
        read = again.log.version(number)
        assert read is not None
        assert replace(read, parent=None) == version
    assert again.log.version(13) is None
    history = again.log.history()
    assert [replace(forest, parent=None) for forest, _ in history] == versions
    assert all(note["by"] for _, note in history)


def test_each_version_names_the_one_before_by_its_hash(ledger: Ledger, store: Path) -> None:
    ledger.log.append(PLANTED)
    ledger.log.append(merge_into(PLANTED, [expert("law")], {}, ""))
    first, second = ledger.log.version(0), ledger.log.version(1)
    assert first is not None
    assert second is not None
    assert first.parent is None
    assert second.parent == json.loads((store / "forest" / "000000.json").read_text())["hash"]


def test_of_all_who_append_one_version_exactly_one_succeeds_and_stays(store: Path) -> None:
    Ledger.open(str(store)).log.append(PLANTED)
    together = threading.Barrier(6)

    def race(number: int) -> bool:
        mine = Ledger.open(str(store))
        forest = mine.log.newest()
        assert forest is not None
        version = merge_into(forest, [expert(f"d{number}")], {}, f"by {number}")
        together.wait()
        return mine.log.append(version)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(race, range(6)))
    assert won.count(True) == 1
    newest = Ledger.open(str(store)).log.newest()
    assert newest is not None
    assert newest.version == 1
    assert newest.domains == (f"d{won.index(True)}",)


def test_a_damaged_version_is_refused_and_the_others_are_read(ledger: Ledger, store: Path) -> None:
    ledger.log.append(PLANTED)
    ledger.log.append(merge_into(PLANTED, [expert("law")], {}, ""))
    path = store / "forest" / "000001.json"
    path.write_text(path.read_text().replace("text-law", "text-lay"))
    with pytest.raises(IntegrityError) as refused:
        ledger.log.newest()
    assert "forest/000001.json" in refused.value.what
    assert refused.value.found != refused.value.expected
    assert ledger.log.version(0) is not None


# Training checkpoints


def save(ledger: Ledger, folder: Path, update: int, identity: str = MODEL.identity, **contents: bytes) -> None:
    contents = contents or {"w": b"weights at %d" % update, "o": b"moments at %d" % update}
    ledger.save_training(identity, update, files(folder, contents), {"at": update})


def below_training(store: Path) -> list[str]:
    return sorted(key for key in everything_below(store) if key.startswith("training/")) if store.exists() else []


def test_the_latest_training_checkpoint_is_the_one_with_the_most_updates(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.latest_training(MODEL.identity) is None
    for update in (9, 10, 100_000, 99_999):
        save(ledger, tmp_path, update)
    latest = ledger.latest_training(MODEL.identity)
    assert latest is not None
    assert latest.recipe["update"] == 100_000
    assert ledger.open_file(latest, "o").read_bytes() == b"moments at 100000"
    assert ledger.find(Ref("model", MODEL.identity)) is None
    assert ledger.latest_training("another") is None


def test_a_newer_checkpoint_is_committed_before_an_older_one_is_dropped(store: Path, tmp_path: Path) -> None:
    watched = WatchedFolder(str(store))
    ledger = Ledger(watched)
    save(ledger, tmp_path, 1)
    save(ledger, tmp_path, 2)
    verbs = [verb for verb, _ in watched.done]
    assert verbs == ["upload", "upload", "create"] * 2 + ["delete"] * 3
    assert watched.done[6][1].endswith("000000001.json"), "the manifest goes before the bytes that it names"
    assert len(below_training(store)) == 3


def test_a_checkpoint_that_could_not_be_written_leaves_the_older_one_whole(store: Path, tmp_path: Path) -> None:
    save(Ledger.open(str(store)), tmp_path, 1)
    with pytest.raises(StoreError):
        save(Ledger(FailingFolder(str(store), "000000002.json")), tmp_path, 2)
    ledger = Ledger.open(str(store))
    latest = ledger.latest_training(MODEL.identity)
    assert latest is not None
    assert latest.recipe["update"] == 1
    assert {name: ledger.open_file(latest, name).read_bytes() for name in "wo"} == {
        "w": b"weights at 1", "o": b"moments at 1",
    }  # fmt: skip


def test_bytes_that_two_checkpoints_share_stay_with_the_newer_one(ledger: Ledger, tmp_path: Path) -> None:
    save(ledger, tmp_path, 1, w=b"frozen", o=b"moments at 1")
    save(ledger, tmp_path, 2, w=b"frozen", o=b"moments at 2")
    latest = ledger.latest_training(MODEL.identity)
    assert latest is not None
    assert ledger.open_file(latest, "w").read_bytes() == b"frozen"


def test_dropping_checkpoints_takes_no_byte_from_what_is_committed_nor_from_another_training(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    # A checkpoint saved before the first update of a branch has the very bytes of its parent, and so has its sibling's.
    seed = commit(ledger, tmp_path, {"w": b"weights", "o": b"moments"}, Ref("model", "seed"))
    for identity in ("law", "code"):
        save(ledger, tmp_path, 0, identity, w=b"weights", o=b"moments")
    save(ledger, tmp_path, 1, "law", w=b"weights", o=b"other moments")
    model = commit(ledger, tmp_path, {"w": b"weights"}, Ref("model", "law"))
    ledger.clear_training("law")
    assert ledger.latest_training("law") is None
    assert not [key for key in below_training(store) if "law" in key]
    sibling = ledger.latest_training("code")
    assert sibling is not None
    for artifact in (seed, sibling, model):
        for blob in artifact.blobs:
            ledger.open_file(artifact, blob.name)


def test_clearing_a_training_leaves_nothing_of_it_not_even_what_was_never_finished(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        save(Ledger(FailingFolder(str(store), ".json")), tmp_path, 3)
    assert below_training(store)
    ledger = Ledger.open(str(store))
    assert ledger.latest_training(MODEL.identity) is None
    save(ledger, tmp_path, 4)
    ledger.clear_training(MODEL.identity)
    assert below_training(store) == []
    ledger.clear_training(MODEL.identity)


def test_a_training_saved_twice_at_one_update_stays_as_it_was_first(ledger: Ledger, tmp_path: Path) -> None:
    save(ledger, tmp_path, 5)
    save(ledger, tmp_path, 5, w=b"weights of a retry", o=b"moments at 5")
    latest = ledger.latest_training(MODEL.identity)
    assert latest is not None
    assert ledger.open_file(latest, "w").read_bytes() == b"weights at 5"
