"""Identities, merging as set insertion, and what a forest refuses."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btm_cluster.errors import UserError
from btm_cluster.forest import Expert, Forest, Foundation, Parent, describe_forest, merge_into
from btm_cluster.identity import canonical_json, identity_of

FOUNDATION = Foundation("seed", "tokenizer", "model", 1024, (("code", "text-code"), ("law", "text-law")))
FOUNDED = Forest(0, FOUNDATION, (), {"seed": "hash-seed"}, "founded")


def expert(domain: str, text: str = "", identity: str = "") -> Expert:
    """A domain's expert that branched from the seed."""
    text = text or f"text-{domain}"
    return Expert(domain, identity or f"expert of {text}", f"weights of {text}", text, (Parent("seed", 1.0),))


def manifests(*experts: Expert) -> dict[str, str]:
    return {e.identity: f"hash of {e.identity}" for e in experts}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=12)
    ),
    max_leaves=12,
)


@given(JSON)
def test_a_value_has_one_identity_before_and_after_it_was_stored(value: Any) -> None:
    recipe = {"value": value}
    assert canonical_json(recipe) == canonical_json(json.loads(json.dumps(recipe)))


def test_keys_that_are_numbers_sort_as_they_do_once_they_were_stored() -> None:
    # A pretrained model with more than ten labels has them in its configuration, id2label, by number. Sorted
    # as numbers when written and as strings when read, its seed's manifest never matched its own hash again.
    labels = {"id2label": {number: f"LABEL_{number}" for number in range(12)}}
    assert identity_of(labels) == identity_of(json.loads(json.dumps(labels)))


def test_an_identity_does_not_hang_on_the_order_of_keys_and_changes_with_every_value() -> None:
    recipe = {"text": "a", "training": {"updates": 10, "learning_rate": 5e-4}, "parents": ["x", "y"]}
    backwards = {"parents": ["x", "y"], "training": {"learning_rate": 5e-4, "updates": 10}, "text": "a"}
    assert identity_of(recipe) == identity_of(backwards)
    changed = [
        recipe | {"text": "b"},
        recipe | {"training": {"updates": 11, "learning_rate": 5e-4}},
        recipe | {"training": {"updates": 10, "learning_rate": 5.0000000000000001e-3}},
        recipe | {"parents": ["y", "x"]},
        recipe | {"more": None},
    ]
    assert len({identity_of(other) for other in (recipe, *changed)}) == 6
    assert len(identity_of(recipe)) == 64


def test_what_is_no_number_cannot_be_part_of_an_identity() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            identity_of({"loss": value})


def test_merging_inserts_experts_into_a_set() -> None:
    merged = merge_into(
        FOUNDED, [expert("law"), expert("code")], manifests(expert("law"), expert("code")), "added"
    )
    assert merged.version == 1
    assert merged.domains == ("code", "law")
    assert merged.foundation == FOUNDED.foundation
    assert merged.manifests == {"seed": "hash-seed"} | manifests(expert("law"), expert("code"))
    assert FOUNDED.experts == ()
    later = merge_into(merged, [expert("beer")], manifests(expert("beer")), "added beer")
    assert later.experts == (expert("beer"), *merged.experts)
    assert later.reason == "added beer"


def test_the_order_in_which_experts_are_merged_does_not_matter() -> None:
    names = ["law", "code", "beer"]
    at_once = merge_into(FOUNDED, [expert(name) for name in names], {}, "")
    for order in (names, names[::-1]):
        forest = FOUNDED
        for name in order:
            forest = merge_into(forest, [expert(name)], {}, "")
        assert forest.experts == at_once.experts


def test_merging_an_expert_that_is_there_changes_no_expert() -> None:
    forest = merge_into(FOUNDED, [expert("law")], {}, "")
    assert merge_into(forest, [expert("law")], {}, "").experts == forest.experts


def test_the_same_name_with_another_text_is_refused_and_both_texts_are_named() -> None:
    forest = merge_into(FOUNDED, [expert("law", text="old-text")], {}, "")
    with pytest.raises(UserError) as refused:
        merge_into(forest, [expert("code"), expert("law", text="new-text")], {}, "")
    assert "'law'" in refused.value.what
    assert "new-text" in refused.value.found
    assert "old-text" in refused.value.expected
    assert refused.value.remedy


def test_two_experts_of_one_domain_cannot_be_merged_together_either() -> None:
    with pytest.raises(UserError):
        merge_into(FOUNDED, [expert("law", text="old-text"), expert("law", text="new-text")], {}, "")


def test_another_expert_on_the_same_text_is_refused_by_naming_the_experts() -> None:
    # Two drivers may branch one new domain from two versions of the forest. That the text is the same must
    # not be reported as "found this text, expected this text".
    forest = merge_into(FOUNDED, [expert("law", identity="the first")], {}, "")
    with pytest.raises(UserError) as refused:
        merge_into(forest, [expert("law", identity="the second")], {}, "")
    assert "the second" in refused.value.found
    assert "the first" in refused.value.expected


def test_an_expert_is_found_by_its_domain_and_a_wrong_name_is_told_the_right_ones() -> None:
    forest = merge_into(FOUNDED, [expert("law"), expert("code")], {}, "")
    assert forest.expert("law") == expert("law")
    with pytest.raises(UserError) as unknown:
        forest.expert("lore")
    assert "code, law" in unknown.value.expected


def test_a_forest_is_described_by_what_equal_runs_share() -> None:
    forest = merge_into(FOUNDED, [expert("law")], manifests(expert("law")), "added law")
    described = json.dumps(describe_forest(forest), sort_keys=True)
    for other in ({"law": "made an hour later"}, {}):
        again = merge_into(FOUNDED, [expert("law")], other, "added law")
        assert json.dumps(describe_forest(again), sort_keys=True) == described
