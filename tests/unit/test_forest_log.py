"""Versions of large forests: written as what they change of an earlier one, and read back as they were."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btm_cluster.errors import IntegrityError, MissingError, StoreError
from btm_cluster.forest import Expert, Forest, Foundation, Parent, merge_into, roll_back, take_out
from btm_cluster.ledger import Ledger, version_bodies, version_key
from btm_cluster.ledger.version_bodies import STRIDE, WHOLE_BELOW, base_of
from btm_cluster.operations.diff import diff
from btm_cluster.operations.log import log
from btm_cluster.operations.verify import verify
from tests.memory_store import InMemory

FOUNDATION = Foundation("seed", "tokenizer", "model", 1024, (("code", "text-code"), ("law", "text-law")))
FOUNDED = Forest(0, FOUNDATION, (), {"seed": "hash"}, "founded")
FEW = 8


@pytest.fixture
def storage(tmp_path: Path) -> InMemory:
    return InMemory(tmp_path)


@pytest.fixture
def ledger(storage: InMemory) -> Ledger:
    return Ledger(storage)


def with_more(forest: Forest, names: list[str]) -> Forest:
    experts = [Expert(f"d-{n}", n * 8, n * 4, f"text {n}", (Parent("seed", 1.0),)) for n in names]
    return merge_into(forest, experts, {one.identity: f"hash of {one.domain}" for one in experts}, "added")


def grown_by_few(experts: int, few: int = FEW) -> Iterator[Forest]:
    """The versions of a forest whose experts came a few at a time."""
    forest = FOUNDED
    yield forest
    for first in range(0, experts, few):
        forest = with_more(forest, [f"{number:04d}" for number in range(first, first + few)])
        yield forest


def append_all(ledger: Ledger, versions: Iterator[Forest]) -> list[Forest]:
    appended = list(versions)
    for version in appended:
        assert ledger.log.append(version)
    return appended


def body_of(storage: InMemory, version: int) -> dict[str, Any]:
    return dict(json.loads(storage.objects[version_key(version)][0])["body"])


def log_bytes(storage: InMemory) -> int:
    return sum(len(data) for key, (data, _) in storage.objects.items() if key.startswith("forest/"))


def assert_holds(ledger: Ledger, versions: list[Forest]) -> None:
    """The log has these versions, each naming the one before, however they are read."""
    parents = [None, *(ledger.log.version_hash(version.version) for version in versions[:-1])]
    wanted = [replace(version, parent=parent) for version, parent in zip(versions, parents, strict=True)]
    assert [forest for forest, _ in ledger.log.history()] == wanted
    assert [ledger.log.version(version.version) for version in versions] == wanted
    assert ledger.log.newest() == wanted[-1]


def test_a_log_of_whole_versions_as_older_releases_wrote_it_is_read_and_goes_on(
    ledger: Ledger, storage: InMemory
) -> None:
    versions, parent = list(grown_by_few(160)), None
    for version in versions:
        body = dataclasses.asdict(version) | {"parent": parent}
        if version.version == 0:
            del body["withdrawn"]  # the oldest had no such field
        ledger.documents.create(version_key(version.version), body)
        parent = ledger.log.version_hash(version.version)
    assert_holds(ledger, versions)
    for names in (["new"], ["newer", "newest"]):
        versions.append(with_more(versions[-1], names))
        assert ledger.log.append(versions[-1])
    assert body_of(storage, len(versions) - 1)["bases"] == [21, 20]
    assert_holds(ledger, versions)
    assert diff(ledger, 20, 22).added == ("d-new", "d-newer", "d-newest")


def test_a_version_of_few_experts_is_whole_as_older_releases_read_it(
    ledger: Ledger, storage: InMemory
) -> None:
    append_all(ledger, grown_by_few(WHOLE_BELOW - FEW))
    newest = ledger.log.newest()
    assert newest is not None
    assert body_of(storage, newest.version) == json.loads(json.dumps(dataclasses.asdict(newest)))


def test_the_log_grows_with_the_changes_and_few_documents_are_read_for_any_version(
    ledger: Ledger, storage: InMemory
) -> None:
    sizes = {}
    for version in grown_by_few(1024):
        ledger.log.append(version)
        sizes[len(version.experts)] = log_bytes(storage)
    entry = len(json.dumps(dataclasses.asdict(version.experts[0]), indent=1))
    assert sizes[1024] < 2.5 * sizes[512] < 6.25 * sizes[256]
    assert sizes[1024] < 1024 * 6 * entry
    for number in (*ledger.log.versions()[::15], 127):
        before = storage.operations
        ledger.log.version(number)
        assert storage.operations - before <= 1 + (STRIDE - 1) * 3


def test_the_whole_log_is_read_once(ledger: Ledger, storage: InMemory) -> None:
    versions = append_all(ledger, grown_by_few(512))
    for look in (lambda: log(ledger), ledger.log.history):
        before = storage.operations
        assert len(look()) == len(versions)
        assert storage.operations - before == 1 + len(versions)


@pytest.mark.parametrize("version", [1, 7, 8, 9, 64, 72, 511, 512, 520, 4096, 4097])
def test_a_base_is_found_from_any_version_by_few_steps(version: int) -> None:
    steps = 0
    while version:
        assert 0 <= base_of(version) < version
        version, steps = base_of(version), steps + 1
    assert steps <= (STRIDE - 1) * 5


CHANGES = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "roll back"]), st.integers(0, 10**6)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(changes=CHANGES, stride=st.integers(2, 4))
def test_whatever_is_added_removed_and_rolled_back_is_read_back(
    changes: list[tuple[str, int]], stride: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(version_bodies, "WHOLE_BELOW", 4)
        patch.setattr(version_bodies, "STRIDE", stride)
        ledger = Ledger(InMemory(Path()))
        versions = append_all(ledger, grown_by_few(24))
        for what, chosen in changes:
            newest = versions[-1]
            if what == "remove" and newest.experts:
                after = take_out(newest, newest.domains[chosen % len(newest.domains)], "removed")
            elif what == "roll back":
                after = roll_back(newest, versions[chosen % len(versions)], "rolled back")
            else:
                after = with_more(newest, [f"new {chosen} {newest.version}"])
            assert ledger.log.append(after)
            versions.append(after)
        assert_holds(ledger, versions)


def test_what_a_difference_cannot_say_is_written_whole(ledger: Ledger, storage: InMemory) -> None:
    (*_, last) = append_all(ledger, grown_by_few(80))
    reversed_order = replace(last, version=last.version + 1, experts=last.experts[::-1])
    another_base = replace(last, version=last.version + 2, foundation=replace(FOUNDATION, seed="another"))
    for version in (reversed_order, another_base):
        assert ledger.log.append(version)
        assert "bases" not in body_of(storage, version.version)
    assert ledger.log.newest() == replace(another_base, parent=ledger.log.version_hash(last.version + 1))


def test_of_all_who_append_to_a_large_forest_exactly_one_succeeds(ledger: Ledger, storage: InMemory) -> None:
    (*_, last) = append_all(ledger, grown_by_few(104))
    wanted = [with_more(last, [f"of {number}"]) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(lambda forest: Ledger(storage).log.append(forest), wanted))
    assert won.count(True) == 1
    assert ledger.log.newest() == replace(
        wanted[won.index(True)], parent=ledger.log.version_hash(last.version)
    )


def lose(storage: InMemory, key: str) -> None:
    del storage.objects[key]


def damage(storage: InMemory, key: str) -> None:
    data, when = storage.objects[key]
    storage.objects[key] = (data.replace(b"text", b"tent", 1), when)


def replace_by_another(storage: InMemory, key: str) -> None:
    data = storage.objects.pop(key)[0]
    Ledger(storage).documents.create(key, json.loads(data)["body"] | {"reason": "another one"})


@pytest.mark.parametrize(
    ("trouble", "error"),
    [(lose, MissingError), (damage, IntegrityError), (replace_by_another, IntegrityError)],
)
def test_a_version_whose_base_is_lost_damaged_or_another_is_refused_and_names_it(
    ledger: Ledger, storage: InMemory, trouble: Callable[[InMemory, str], None], error: type[StoreError]
) -> None:
    versions = append_all(ledger, grown_by_few(200))
    assert body_of(storage, 25)["bases"] == [24, 16, 8]
    trouble(storage, version_key(16))
    for look in (ledger.log.newest, lambda: ledger.log.version(25), ledger.log.history):
        with pytest.raises(error, match=version_key(16)) as refused:
            look()
        assert refused.value.remedy
    with pytest.raises(error, match=version_key(16)):
        ledger.log.append(with_more(versions[-1], ["more"]))
    assert ledger.log.version(15) == replace(versions[15], parent=ledger.log.version_hash(14))
    problems = verify(ledger).problems
    assert any(version_key(16) in problem and version_key(25) in problem for problem in problems) or any(
        problem.startswith(version_key(16)) for problem in problems
    )


@pytest.mark.parametrize(
    "change",
    [
        {"bases": [25]},
        {"bases": [8, 24]},
        {"bases": []},
        {"bases": None},
        {"experts": [{"domain": "x"}]},
        {"without": {"experts": ["nobody"], "manifests": [], "withdrawn": []}},
        {"without": {"experts": []}},
        {"more": 1},
    ],
)
def test_a_difference_of_another_form_is_one_clear_error(
    ledger: Ledger, storage: InMemory, change: dict[str, Any]
) -> None:
    append_all(ledger, grown_by_few(200))
    body = body_of(storage, 25)
    lose(storage, version_key(25))
    ledger.documents.create(version_key(25), body | change)
    with pytest.raises(StoreError, match=version_key(25)) as refused:
        ledger.log.newest()
    assert not isinstance(refused.value, IntegrityError | MissingError), (
        "what is not damaged may not be dropped"
    )
    assert "newer" in refused.value.remedy
