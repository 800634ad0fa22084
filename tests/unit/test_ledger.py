"""Artifacts and the forest log on a real folder: write-once, races, damage,
half-written work, training checkpoints."""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.errors import IntegrityError, MissingError, StoreError, UserError
from btm_cluster.forest import Expert, Forest, Foundation, Parent, merge_into
from btm_cluster.identity import canonical_json
from btm_cluster.ledger import CHUNK_BYTES, Artifact, Ledger, Ref, describe_file
from btm_cluster.ledger.documents import Documents
from btm_cluster.storage import Entry
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.storage.node_cache import node_cache
from tests.made import origin, text

RECIPE = {"made": "of this"}
MODEL = origin("model", RECIPE).ref
FOUNDATION = Foundation("seed", "tokenizer", "model", 1024, (("code", "text-code"), ("law", "text-law")))
FOUNDED = Forest(0, FOUNDATION, (), {"seed": "hash"}, "founded")


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


def commit(
    ledger: Ledger,
    folder: Path,
    contents: Mapping[str, bytes],
    made: str = "of this",
    kind: str = "model",
    **facts: Any,
) -> Artifact:
    return ledger.commit(origin(kind, {"made": made}), files(folder, contents), facts)


def ref_of(made: str, kind: str = "model") -> Ref:
    """What `commit` names an artifact."""
    return origin(kind, {"made": made}).ref


def everything_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


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

    def upload(self, key: str, path: Path, keep: bool = True) -> None:
        self.done.append(("upload", key))
        super().upload(key, path, keep)

    def delete(self, key: str) -> None:
        self.done.append(("delete", key))
        super().delete(key)


# Commit, find, open


def test_what_is_committed_is_found_and_opened_by_every_ledger_of_the_store(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    recipe = {"texts": ["a", "b"], "rate": 5e-4, "deep": {"none": None, "ü": [1, 2.5]}}
    inputs = {
        "texts": (Ref("text", "a"), Ref("text", "b")),
        "start": (),
        "tokenizer": (Ref("tokenizer", "t"),),
    }
    asked, parts = origin("model", recipe, inputs), [Ref("model", "a-part")]
    contents = files(tmp_path, {"w": b"weights", "c": b""})
    made = ledger.commit(asked, contents, {"tokens": 7}, {"seconds": 1.5}, parts)
    found = Ledger.open(str(store)).find(asked.ref)
    assert found == made
    assert found is not None
    assert (found.ref, found.recipe, found.facts, found.note["seconds"]) == (
        asked.ref,
        recipe,
        {"tokens": 7},
        1.5,
    )
    assert (found.inputs, found.parts) == (inputs, tuple(parts))
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
    for made, kind in [("b", "model"), ("a", "model"), ("c", "models"), ("a", "scores")]:
        commit(ledger, tmp_path, {"w": made.encode()}, made, kind)
    expected = sorted([ref_of("a"), ref_of("b")], key=lambda ref: ref.identity)
    assert [artifact.ref for artifact in ledger.list_artifacts("model")] == expected
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
        return mine.commit(origin("model", RECIPE), paths, {"by": number})

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(race, range(6)))
    assert len({outcome.manifest_hash for outcome in outcomes}) == 1
    winner = outcomes[0].facts["by"]
    for outcome in outcomes:
        assert Ledger.open(str(store)).open_file(outcome, "w").read_bytes() == b"made by %d" % winner


def test_a_create_whose_success_went_unheard_is_still_a_success(store: Path, tmp_path: Path) -> None:
    forgetful = Ledger(ForgetfulFolder(str(store)))
    assert commit(forgetful, tmp_path, {"w": b"weights"}, who="me").facts == {"who": "me"}
    assert forgetful.log.append(FOUNDED)
    assert not forgetful.log.append(FOUNDED)


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
def test_what_is_no_manifest_is_refused_by_its_key(
    ledger: Ledger, store: Path, tmp_path: Path, damage: bytes
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    manifest_of(store).write_bytes(damage)
    with pytest.raises(IntegrityError) as refused:
        ledger.find(MODEL)
    assert MODEL.identity in refused.value.what


def test_a_manifest_in_anothers_place_is_not_taken_for_it(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    other = ref_of("something else")
    manifest_of(store, other).write_bytes(manifest_of(store).read_bytes())
    with pytest.raises(IntegrityError) as refused:
        ledger.find(other)
    assert MODEL.identity in refused.value.found
    assert other.identity in refused.value.expected


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any], to: Path | None = None) -> None:
    """Changes a document and gives it the hash of what it says now: what a
    newer version, or a hand, would write."""
    whole = json.loads(path.read_text())
    change(whole)
    whole.pop("hash")
    whole["hash"] = hashlib.sha256(canonical_json(whole)).hexdigest()
    data = json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False).encode()
    (to or path).write_bytes(data)


@pytest.mark.parametrize("added", ["0", "abc", "-"])
def test_an_identity_that_is_a_part_of_the_keys_is_not_taken_for_it(
    ledger: Ledger, store: Path, tmp_path: Path, added: str
) -> None:
    # The identity was looked for anywhere in the key.
    commit(ledger, tmp_path, {"w": b"weights"})
    for other in (Ref("model", MODEL.identity + added), Ref("a-model", MODEL.identity)):
        manifest_of(store, other).parent.mkdir(exist_ok=True)
        manifest_of(store, other).write_bytes(manifest_of(store).read_bytes())
        with pytest.raises(IntegrityError, match="another artifact's manifest"):
            ledger.find(other)


def test_a_manifest_whose_recipe_is_not_the_one_that_its_identity_is_the_hash_of_is_refused(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    rewritten(manifest_of(store), lambda whole: whole["body"]["recipe"].update(made="of that"))
    with pytest.raises(IntegrityError) as refused:
        ledger.find(MODEL)
    assert (refused.value.found, refused.value.expected) == (ref_of("of that").identity, MODEL.identity)
    assert refused.value.remedy


def test_a_manifest_of_an_earlier_version_is_refused_in_one_sentence_with_what_to_do(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    rewritten(manifest_of(store), lambda whole: [whole["body"].pop(field) for field in ("inputs", "parts")])
    with pytest.raises(StoreError, match="an earlier version of btm_cluster") as refused:
        ledger.find(MODEL)
    assert not isinstance(refused.value, IntegrityError), "nobody may drop it as damaged"
    assert "another `store`" in refused.value.remedy


def test_a_manifest_with_other_inputs_than_its_identity_is_the_hash_of_is_refused(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    rewritten(manifest_of(store), lambda whole: whole["body"]["inputs"].update(texts=["text/another"]))
    with pytest.raises(IntegrityError, match="recipe and inputs"):
        ledger.find(MODEL)


def test_an_identity_hangs_on_kind_recipe_and_inputs_in_their_parts() -> None:
    one, other = Ref("text", "1"), Ref("text", "2")
    names = [
        origin("model", RECIPE).ref.identity,
        origin("tokenizer", RECIPE).ref.identity,
        origin("model", {"made": "of that"}).ref.identity,
        *(
            origin("model", RECIPE, inputs).ref.identity
            for inputs in (
                {"texts": (one,)},
                {"texts": (one, other)},
                {"texts": (other, one)},
                {"tests": (one,)},
                {"texts": (one,), "tests": (other,)},
                {"texts": (Ref("tokens", "1"),)},
            )
        ),
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", ["text", "training"])
def test_a_text_and_a_training_checkpoint_have_their_own_rule_for_what_their_identity_is_of(
    ledger: Ledger, store: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "text":
        ref = ledger.commit(text("0123456789abcdef" * 4), {}, {}).ref
        path, change = (
            manifest_of(store, ref),
            lambda whole: whole["body"]["recipe"].update(documents="f" * 64),
        )
    else:
        save(ledger, tmp_path, 3)
        path = store / "training" / MODEL.identity / "000000003.json"
        change = lambda whole: whole["body"]["recipe"]["model"].update(made="of that")  # noqa: E731
    key = path.relative_to(store).as_posix()
    assert ledger.read_manifest(key) is not None
    rewritten(path, change)
    with pytest.raises(IntegrityError, match=re.escape(key)):
        ledger.read_manifest(key)


def test_a_training_checkpoint_under_the_number_of_another_update_is_passed_over(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    save(ledger, tmp_path, 3)
    folder = store / "training" / MODEL.identity
    shutil.copy(folder / "000000003.json", folder / "000000009.json")
    latest = ledger.latest_training(MODEL.identity)
    assert latest is not None
    assert latest.recipe["update"] == 3


SHA = hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": []},
        {"chunks": [SHA, SHA]},
        {"chunks": ["0" * 64]},
        {"size_bytes": CHUNK_BYTES + 1},
        {"size_bytes": -7},
        {"sha256": "../../etc/passwd"},
        {"sha256": SHA.upper()},
        {"name": "../outside"},
        {"name": ".."},
        {"name": ""},
    ],
    ids=str,
)
def test_a_manifest_that_names_a_file_which_cannot_be_is_refused(
    ledger: Ledger, store: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    rewritten(manifest_of(store), lambda whole: whole["body"]["blobs"][0].update(change))
    with pytest.raises(IntegrityError, match=MODEL.identity):
        ledger.find(MODEL)


def test_a_manifest_that_names_a_file_twice_is_refused(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    rewritten(manifest_of(store), lambda whole: whole["body"].update(blobs=2 * whole["body"]["blobs"]))
    with pytest.raises(IntegrityError, match="twice"):
        ledger.find(MODEL)


NEWER: list[Callable[[dict[str, Any]], Any]] = [
    lambda whole: whole.update(format=2),
    lambda whole: whole["body"].update(shards=3),
    lambda whole: whole.update(body=[1, 2]),
    lambda whole: whole.update(note=7),
    lambda whole: whole.pop("note"),
    lambda whole: whole["body"].clear(),
]


@pytest.mark.parametrize("change", NEWER)
def test_what_a_newer_version_wrote_is_one_clear_error_and_stays(
    ledger: Ledger, store: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    save(ledger, tmp_path, 3)
    ledger.log.append(FOUNDED)
    looks: dict[str, Callable[[], Any]] = {
        f"artifacts/model/{MODEL.identity}.json": lambda: ledger.find(MODEL),
        f"training/{MODEL.identity}/000000003.json": lambda: ledger.latest_training(MODEL.identity),
        "forest/000000.json": lambda: ledger.log.newest(),
    }
    for key, look in looks.items():
        rewritten(store / key, change)
        with pytest.raises(StoreError) as refused:
            look()
        assert not isinstance(refused.value, IntegrityError | MissingError), (
            "what is not damaged may not be dropped"
        )
        assert key in refused.value.what
        assert "newer" in refused.value.remedy
    with pytest.raises(StoreError):
        save(ledger, tmp_path, 4)
    assert (store / "training" / MODEL.identity / "000000003.json").exists()


@pytest.mark.parametrize("blobs", [[{"name": "w"}], [7], "text", None, [{"name": "w", "chunks": None}]])
def test_a_manifest_whose_files_are_of_another_form_is_one_clear_error(
    ledger: Ledger, store: Path, tmp_path: Path, blobs: Any
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    rewritten(manifest_of(store), lambda whole: whole["body"].update(blobs=blobs))
    with pytest.raises(StoreError, match=MODEL.identity):
        ledger.find(MODEL)


def test_deeply_nested_json_in_place_of_a_manifest_is_damage(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    for data in (b"[" * 200_000 + b"]" * 200_000, b'{"a":' * 200_000 + b"0" + b"}" * 200_000):
        manifest_of(store).write_bytes(data)
        with pytest.raises(IntegrityError, match=MODEL.identity):
            ledger.find(MODEL)


def test_a_monstrous_file_in_place_of_a_manifest_is_not_read_into_memory(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    commit(ledger, tmp_path, {"w": b"weights"})
    with manifest_of(store).open("wb") as file:
        file.truncate(10**12)  # of holes: it takes no disk
    with pytest.raises(IntegrityError, match="damaged"):
        ledger.find(MODEL)


@pytest.mark.parametrize("stands", ["folder", "pipe", "device", "loop"])
def test_what_is_no_file_in_the_place_of_a_manifest_a_blob_or_a_version_is_one_clear_error(
    ledger: Ledger, store: Path, tmp_path: Path, stands: str
) -> None:
    made = commit(ledger, tmp_path, {"w": b"weights"})
    ledger.log.append(FOUNDED)
    put = {
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path),
    }[stands]
    looks: dict[Path, Callable[[], Any]] = {
        store / "blobs" / made.blob("w").sha256: lambda: ledger.open_file(made, "w"),
        manifest_of(store): lambda: ledger.find(MODEL),
        store / "forest/000000.json": lambda: ledger.log.version(0),
    }
    for path, look in looks.items():
        path.unlink()
        put(path)
        with pytest.raises(StoreError, match=path.name) as refused:
            look()
        assert "move it" in refused.value.remedy
    with pytest.raises(StoreError):
        ledger.log.append(FOUNDED)
    with pytest.raises(StoreError):
        commit(ledger, tmp_path, {"w": b"weights"})


def test_a_broken_link_in_the_place_of_a_version_is_no_forest_less_and_no_endless_race(
    ledger: Ledger, store: Path
) -> None:
    ledger.log.append(FOUNDED)
    (store / "forest/000001.json").symlink_to("nowhere")
    with pytest.raises(MissingError, match="000001"):
        ledger.log.newest()
    with pytest.raises(StoreError, match="cannot create forest/000001"):
        ledger.log.append(merge_into(FOUNDED, [expert("law")], {}, ""))


def test_a_lost_blob_is_named_with_its_artifact_and_what_to_do(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    made = commit(ledger, tmp_path, {"w": b"weights"})
    (store / "blobs" / made.blob("w").sha256).unlink()
    for use in (
        lambda: ledger.open_file(made, "w"),
        lambda: list(ledger.read_chunks(made, "w")),
        lambda: ledger.check_standing(MODEL, made.manifest_hash),
    ):
        with pytest.raises(MissingError, match="has lost its file w") as missing:
            use()
        assert f"artifacts/model/{MODEL.identity}.json" in missing.value.remedy


def test_a_commit_of_what_stands_without_its_files_is_no_success(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    # The manifest that stands names other bytes than those that were just stored.
    made = commit(ledger, tmp_path, {"w": b"weights"})
    (store / "blobs" / made.blob("w").sha256).unlink()
    with pytest.raises(MissingError, match="has lost its file w"):
        commit(ledger, tmp_path, {"w": b"other weights"})
    assert commit(ledger, tmp_path, {"w": b"weights"}) == made


# What is none of the store's


STRAYS = [
    ".DS_Store",
    "._000001.json",
    ".nfs000000000001",
    "000001.json~",
    ".000001.json.swp",
    "#000001.json#",
    "000001 (copy).json",
    "0000001.json",
    "000001.json.part",
    "٠٠٠٠٠٧.json",
    "README",
    "a\nnew line.json",
    "deeper/000001.json",
    "",
]


@pytest.mark.parametrize(
    "folder", ["forest", "pins", f"training/{MODEL.identity}", "artifacts/model", "blobs"]
)
def test_objects_that_are_none_of_the_stores_are_left_alone_and_told_of_once(
    ledger: Ledger, store: Path, tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.log.append(FOUNDED)
    made = commit(ledger, tmp_path, {"w": b"weights"})
    ledger.log.append(merge_into(FOUNDED, [expert("law")], {}, ""))
    ledger.documents.create("pins/000001.json", {"version": 1})
    save(ledger, tmp_path, 3)
    (store / folder / "deeper").mkdir()
    (store / folder / os.fsdecode(b"caf\xe9.json")).write_bytes(b"not UTF-8")
    for name in filter(None, STRAYS):
        (store / folder / name).write_bytes(b"what an editor left")
    before = everything_below(store)
    for _ in range(2):
        assert ledger.log.versions() == [0, 1]
        assert [forest.version for forest, _ in ledger.log.history()] == [0, 1]
        assert ledger.log.pinned() == [1]
        assert list(ledger.list_artifacts("model")) == [made]
        latest = ledger.latest_training(MODEL.identity)
        assert latest is not None
        assert latest.recipe["update"] == 3
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (folder != "blobs"), "blobs are never listed but by gc and verify"
    assert all(str(len(STRAYS)) in line and ".DS_Store" in line for line in told)
    ledger.clear_training(MODEL.identity)
    left = set(before) - set(everything_below(store))
    assert left == {key for key in before if key.startswith("training/") and not set(key.split("/")) & {*STRAYS, "deeper"}
                    and "caf" not in key}  # fmt: skip


def test_folder_markers_of_object_storage_are_no_objects_of_ours(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    class WithMarkers(LocalFolder):
        """As an S3 console makes folders: an object of no bytes whose key ends in a slash."""

        def list(self, prefix: str) -> Iterator[Entry]:
            yield Entry(f"{prefix.partition('/')[0]}/", 0, 0.0)
            yield from super().list(prefix)

    ledger.log.append(FOUNDED)
    commit(ledger, tmp_path, {"w": b"weights"})
    marked = Ledger(WithMarkers(str(store)))
    assert marked.log.versions() == [0]
    assert marked.log.pinned() == []
    assert [artifact.ref for artifact in marked.list_artifacts("model")] == [MODEL]


# A text that was read, and lost


def test_a_source_whose_text_is_lost_counts_as_unread(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    of_files = origin("source", {"of": "files"})
    source, documents = of_files.ref, text("0123456789abcdef" * 4)

    def read() -> None:
        ledger.commit(documents, files(tmp_path, {"shard": b"documents"}), {})
        ledger.commit(of_files, {}, {}, parts=[documents.ref])

    read()
    for lost in (
        manifest_of(store, documents.ref),
        store / "blobs" / ledger.get(documents.ref).blob("shard").sha256,
    ):
        assert ledger.find_all([source, MODEL]) == [ledger.get(source), None]
        lost.unlink()
        assert ledger.find_all([source]) == [None]
        read()
    assert ledger.find_all([source]) == [ledger.get(source)]


# The forest log


def expert(domain: str) -> Expert:
    return Expert(
        domain, f"expert-{domain}", "weights", f"text-{domain}", (Parent("seed", 0.25), Parent("x", 0.75))
    )


def test_versions_are_appended_and_read_back_as_they_were(ledger: Ledger, store: Path) -> None:
    assert ledger.log.newest() is None
    assert ledger.log.versions() == []
    versions = [FOUNDED]
    for domain in "bcadefghijkl":
        versions.append(
            merge_into(versions[-1], [expert(domain)], {f"expert-{domain}": "hash"}, f"added {domain}")
        )
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
    ledger.log.append(FOUNDED)
    ledger.log.append(merge_into(FOUNDED, [expert("law")], {}, ""))
    first, second = ledger.log.version(0), ledger.log.version(1)
    assert first is not None
    assert second is not None
    assert first.parent is None
    assert second.parent == json.loads((store / "forest" / "000000.json").read_text())["hash"]


def test_of_all_who_append_one_version_exactly_one_succeeds_and_stays(store: Path) -> None:
    Ledger.open(str(store)).log.append(FOUNDED)
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


def test_a_version_that_was_copied_to_another_number_is_not_taken_for_it(ledger: Ledger, store: Path) -> None:
    ledger.log.append(FOUNDED)
    ledger.log.append(merge_into(FOUNDED, [expert("law")], {}, ""))
    shutil.copy(store / "forest/000000.json", store / "forest/000005.json")
    for look in (ledger.log.newest, lambda: ledger.log.version(5), ledger.log.history):
        with pytest.raises(IntegrityError, match="forest/000005") as refused:
            look()
        assert "000000" in refused.value.found
        assert refused.value.remedy
    assert ledger.log.version(1) is not None


def test_a_damaged_version_is_refused_and_the_others_are_read(ledger: Ledger, store: Path) -> None:
    ledger.log.append(FOUNDED)
    ledger.log.append(merge_into(FOUNDED, [expert("law")], {}, ""))
    path = store / "forest" / "000001.json"
    path.write_text(path.read_text().replace("text-law", "text-lay"))
    with pytest.raises(IntegrityError) as refused:
        ledger.log.newest()
    assert "forest/000001.json" in refused.value.what
    assert refused.value.found != refused.value.expected
    assert ledger.log.version(0) is not None


# Training checkpoints


def save(ledger: Ledger, folder: Path, update: int, made: str = "of this", **contents: bytes) -> None:
    contents = contents or {"w": b"weights at %d" % update, "o": b"moments at %d" % update}
    ledger.save_training(origin("model", {"made": made}), update, files(folder, contents), {"at": update})


def below_training(store: Path) -> list[str]:
    return (
        sorted(key for key in everything_below(store) if key.startswith("training/"))
        if store.exists()
        else []
    )


def test_the_latest_training_checkpoint_is_the_one_with_the_most_updates(
    ledger: Ledger, tmp_path: Path
) -> None:
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


def test_a_checkpoint_that_could_not_be_written_leaves_the_older_one_whole(
    store: Path, tmp_path: Path
) -> None:
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
    # A checkpoint saved before the first update of a branch has the very bytes of its parent, and so has its
    # sibling's.
    seed = commit(ledger, tmp_path, {"w": b"weights", "o": b"moments"}, "seed")
    for made in ("law", "code"):
        save(ledger, tmp_path, 0, made, w=b"weights", o=b"moments")
    save(ledger, tmp_path, 1, "law", w=b"weights", o=b"other moments")
    model = commit(ledger, tmp_path, {"w": b"weights"}, "law")
    ledger.clear_training(model.identity)
    assert ledger.latest_training(model.identity) is None
    assert not [key for key in below_training(store) if model.identity in key]
    sibling = ledger.latest_training(ref_of("code").identity)
    assert sibling is not None
    for artifact in (seed, sibling, model):
        for blob in artifact.blobs:
            ledger.open_file(artifact, blob.name)


def test_clearing_a_training_leaves_nothing_of_it_not_even_what_was_never_finished(
    store: Path, tmp_path: Path
) -> None:
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


def test_a_record_is_written_under_an_account_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under any number: Python has no name for it,
    and none is in the environment."""

    def no_entry(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    documents = Documents(LocalFolder(str(tmp_path)))
    assert documents.create("pins/000001.json", {"version": 1})
    found = documents.read("pins/000001.json")
    assert found is not None
    assert found.note["by"].startswith(f"{os.getuid()}@")
    monkeypatch.delenv("BTM_CACHE_FOLDER", raising=False)
    assert node_cache().folder.name == f"btm-cluster-cache-{os.getuid()}"


def test_a_store_in_a_home_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(UserError, match="set HOME"):
        LocalFolder("~/forest")
