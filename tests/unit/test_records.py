"""The small records of a living forest: each is what its key says, and what is none of them is left alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.errors import IntegrityError, StoreError
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.ledger.records import (
    BranchPoint,
    Held,
    find_branch_point,
    find_refusals,
    hold,
    list_branch_points,
    list_refusals,
    newest_held,
    quarantine,
    settle_branch_point,
)
from btm_cluster.requests import Start
from tests.unit.test_ledger import STRAYS, rewritten

POINT = BranchPoint("law", "1" * 64, "2" * 64, 3, "3" * 64, Start(Ref("model", "4" * 64), True), "")
OTHER = "a" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A store with a record of each kind."""
    ledger = Ledger.open(str(tmp_path / "store"))
    settle_branch_point(ledger, POINT)
    hold(ledger, Held(POINT.identity, "6" * 64, 3, 0.5, "worse"))
    quarantine(ledger, "bad", "7" * 64, "a link")
    tombstone = {"domain": "gone", "kind": "model", "identity": "8" * 64, "parents": ["9" * 64]}
    ledger.documents.create(f"tombstones/model/{'8' * 64}.json", tombstone)
    ledger.documents.create("pins/000003.json", {"version": 3})
    return ledger


def keys_of(ledger: Ledger) -> dict[str, str]:
    return {entry.key.partition("/")[0]: entry.key for entry in ledger.storage.list("")}


LOOKS: dict[str, tuple[str, Callable[[Ledger], Any]]] = {
    "expansions": (f"expansions/{OTHER}.json", lambda ledger: find_branch_point(ledger, OTHER)),
    "held": (f"held/{POINT.identity}-000009.json", newest_held),
    "quarantine": (f"quarantine/{OTHER}.json", lambda ledger: find_refusals(ledger, [OTHER])),
    "tombstones": (
        f"tombstones/model/{OTHER}.json",
        lambda ledger: ledger.tombstones.find(Ref("model", OTHER)),
    ),
    "pins": ("pins/000009.json", lambda ledger: ledger.log.pinned()),
}


@pytest.mark.parametrize("folder", LOOKS)
def test_a_record_that_was_copied_to_another_key_is_not_taken_for_it(ledger: Ledger, folder: str) -> None:
    (key, look), own = LOOKS[folder], keys_of(ledger)[folder]
    shutil.copy(ledger.storage.address(own), ledger.storage.address(key))
    with pytest.raises(IntegrityError) as refused:
        look(ledger)
    assert key in refused.value.what
    assert refused.value.found == own
    assert refused.value.remedy


@pytest.mark.parametrize("folder", LOOKS)
@pytest.mark.parametrize("change", [lambda body: body.update(field_of_later=1), lambda body: body.clear()])
def test_a_record_of_a_newer_version_is_one_clear_error(
    ledger: Ledger, folder: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    key = keys_of(ledger)[folder]
    looks: dict[str, Callable[[], Any]] = {
        "expansions": lambda: list(list_branch_points(ledger)),
        "held": lambda: newest_held(ledger),
        "quarantine": lambda: list_refusals(ledger),
        "tombstones": lambda: ledger.tombstones.find(Ref("model", "8" * 64)),
        "pins": lambda: ledger.log.pinned(),
    }
    rewritten(Path(ledger.storage.address(key)), lambda whole: change(whole["body"]))
    with pytest.raises(StoreError) as refused:
        looks[folder]()
    assert key in refused.value.what
    assert "newer" in refused.value.remedy


@pytest.mark.parametrize("folder", [*LOOKS, "tombstones/model"])
def test_what_is_no_record_is_left_alone(ledger: Ledger, folder: str) -> None:
    store = Path(ledger.storage.location)
    before = (
        list(list_branch_points(ledger)),
        newest_held(ledger),
        list_refusals(ledger),
        ledger.log.pinned(),
    )
    for name in filter(None, STRAYS):
        (store / folder / name).parent.mkdir(exist_ok=True)
        (store / folder / name).write_bytes(b"what an editor left")
    after = (
        list(list_branch_points(ledger)),
        newest_held(ledger),
        list_refusals(ledger),
        ledger.log.pinned(),
    )
    assert after == before
    assert len(before[0]) == len(before[1]) == len(before[2]) == len(before[3]) == 1


def test_a_refusal_of_an_older_store_has_its_identity_in_its_key_alone(ledger: Ledger) -> None:
    ledger.documents.create(f"quarantine/{OTHER}.json", {"folder": "old", "reason": "no text files"})
    assert find_refusals(ledger, [OTHER])[OTHER].reason == "no text files"
    assert list_refusals(ledger).keys() == {OTHER, "7" * 64}


def test_of_many_refusals_only_those_that_are_asked_for_are_read(ledger: Ledger) -> None:
    for number in range(20):
        quarantine(ledger, f"old-{number}", f"{number:064x}", "a link")
        Path(ledger.storage.address(f"quarantine/{number:064x}.json")).write_bytes(b"damaged")
    assert find_refusals(ledger, ["7" * 64, "f" * 64]).keys() == {"7" * 64}
