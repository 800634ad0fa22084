"""A plan that changes what its forest was founded on: the fields that differ
are named, old and new, and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from btm_cluster.algorithm import grow
from btm_cluster.data.tokenizer_training import train_tokenizer
from btm_cluster.driver.preparation import prepare
from btm_cluster.errors import FoundationError, UserError
from btm_cluster.ledger import Ledger, Ref, artifact_key
from btm_cluster.operations.plan import preview
from btm_cluster.plan import Plan
from tests.conftest import in_process, made_up_documents, plan_fields, write_jsonl
from tests.integration.conftest import train_seed


@pytest.fixture(scope="module")
def founded(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan's fields whose store has a seed, and no expert yet."""
    fields = plan_fields(texts, tmp_path_factory.mktemp("founded") / "store")
    plan = Plan.model_validate(fields)
    driver = in_process(plan)
    train_seed(prepare(plan, driver), driver)
    return fields


def refusal(fields: dict[str, Any]) -> FoundationError:
    """Of `btm plan`; a run says the same."""
    plan = Plan.model_validate(fields)
    with pytest.raises(FoundationError) as refused:
        preview(plan, Ledger.open(plan.store))
    with pytest.raises(FoundationError) as of_a_run:
        prepare(plan, driver := in_process(plan))
    assert str(of_a_run.value) == str(refused.value)
    assert not driver.made, "not even read"
    return refused.value


SHAPE = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}


@pytest.mark.parametrize(
    ("section", "change", "found"),
    [
        # 320 and 340 tokens are 320 and 384 rows of embeddings, which nobody wrote.
        ("tokenizer", {"train": {"vocabulary": 340}}, "tokenizer.train.vocabulary: 320 → 340"),
        (
            "tokenizer",
            {"train": {"vocabulary": 320, "characters_per_domain": 5}},
            "tokenizer.train.characters_per_domain: 20000000 → 5",
        ),
        ("training", {"learning_rate": 0.002}, "training.learning_rate: 0.003 → 0.002"),
        ("training", {"betas": [0.9, 0.99]}, "training.betas: [0.9, 0.95] → [0.9, 0.99]"),
        ("training", {"block_tokens": 16}, "training.block_tokens: 32 → 16"),
        ("training", {"updates": 16}, "training.updates: 12 → 16"),
        ("training", {"seed_share": 0.25}, "training.seed_share: 0.5 → 0.25"),
        ("model", {"config": SHAPE | {"n_embd": 64}}, "model.config.n_embd: 32 → 64"),
        ("model", {"config": SHAPE | {"n_positions": 48}}, "model.config.n_positions: 32 → 48"),
        ("model", {"config": SHAPE | {"n_inner": 99}}, "model.config.n_inner: not given → 99"),
        ("model", {"config": {"model_type": "llama"}}, 'model.config.model_type: "gpt2" → "llama"'),
        (
            "model",
            {"preset": "gpt3-125m"},
            "model.n_embd: 32 → 768; model.n_head: 2 → 12; model.n_layer: 1 → 12",
        ),
    ],
)
def test_a_changed_field_is_named_with_both_values_and_what_follows_from_it_is_not(
    section: str, change: dict[str, Any], found: str, founded: dict[str, Any]
) -> None:
    kept = founded[section] if section == "training" else {}
    refused = refusal(founded | {section: kept | change})
    assert refused.found == found
    assert refused.expected == "what version 0 was founded on, left of each arrow"


def test_all_changed_fields_are_named_at_once(founded: dict[str, Any]) -> None:
    changes = {
        "training": founded["training"] | {"block_tokens": 16, "epsilon": 1e-6},
        "tokenizer": {"train": {"vocabulary": 400}},
        "model": {"config": SHAPE | {"n_head": 4}},
    }
    assert refusal(founded | changes).found == (
        "tokenizer.train.vocabulary: 320 → 400; training.block_tokens: 32 → 16; training.epsilon: 1e-07 → "
        "1e-06; "
        "model.config.n_head: 2 → 4"
    )


def test_where_the_seeds_manifest_is_gone_the_parts_are_named(
    founded: dict[str, Any], tmp_path: Path
) -> None:
    fields = founded | {"store": shutil.copytree(founded["store"], tmp_path / "store").as_posix()}
    ledger = Ledger.open(fields["store"])
    forest = ledger.log.newest()
    assert forest is not None
    ledger.storage.delete(artifact_key(Ref("model", forest.foundation.seed)))
    refused = refusal(fields | {"tokenizer": {"train": {"vocabulary": 400}}})
    assert refused.found == "another tokenizer, model, seed"
    assert refused.expected == "what version 0 was founded on"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Two models of one shape, each with its tokenizer."""
    sources = []
    for name in ("one", "other"):
        folder = tmp_path_factory.mktemp(name)
        small = {
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 1,
            "n_head": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        torch.manual_seed(len(sources))
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt2", vocab_size=320, **small)
        ).save_pretrained(folder)
        train_tokenizer(made_up_documents(name, 100), 320, folder)
        sources.append({"pretrained": str(folder)})
    return sources


def test_experts_of_a_pretrained_seed_that_took_the_half_are_not_joined_by_others(
    fields: dict[str, Any], pretrained: list[dict[str, str]]
) -> None:
    # Before, half of the updates were kept back for a seed that took none of them. A store grown so stays
    # what it is: with whole experts beside halved ones, and a Transformer-LM of all updates, the verdict
    # would compare unlike trainings.
    source = pretrained[0]
    fields = fields | {"model": source, "tokenizer": source, "domains": fields["domains"][:1]}
    halved = Plan.model_validate(fields)
    grow(halved, in_process(halved))
    training = {name: value for name, value in fields["training"].items() if name != "seed_share"}
    refused = refusal(fields | {"training": training})
    assert refused.found.startswith("training.seed_share: 0.5 → 0 (where the model is pretrained")
    grow(halved, again := in_process(halved))
    assert not again.made


def test_another_pretrained_model_or_none_is_named(
    fields: dict[str, Any], pretrained: list[dict[str, str]], founded: dict[str, Any]
) -> None:
    one, other = pretrained
    plan = Plan.model_validate(fields | {"model": one, "tokenizer": one})
    driver = in_process(plan)
    train_seed(prepare(plan, driver), driver)
    found = refusal(fields | {"model": other, "tokenizer": one}).found
    assert found == f"model.pretrained: {one['pretrained']} → {other['pretrained']}"
    found = refusal(fields | {"model": one, "tokenizer": other}).found
    assert found == "tokenizer.pretrained: other files than those of version 0"
    found = refusal(fields | {"model": one, "tokenizer": one | {"first_token": "a"}}).found
    assert found.startswith("tokenizer.first_token: ")
    assert found.endswith(' → "a"')
    found = refusal(fields).found
    assert found.startswith("tokenizer: `pretrained` → `train`; model: `pretrained: ")
    assert found.endswith("→ a model trained from the start")
    found = refusal(founded | {"model": one, "tokenizer": one}).found
    assert (
        found == f"tokenizer: `train` → `pretrained`; model: a model trained from the start → `pretrained: "
        f"{one['pretrained']}`"
    )


@pytest.mark.parametrize("what", ["reading", "files", "documents"])
@pytest.mark.parametrize("name", ["kitchen", "meadow"])
def test_a_text_of_the_forest_that_is_another_now_is_refused_with_what_changed(
    what: str, name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    texts = {
        one: write_jsonl(tmp_path / f"{one}.jsonl", made_up_documents(one, 200))
        for one in ("kitchen", "meadow")
    }
    fields |= {"domains": [{"name": one, "text": str(text)} for one, text in texts.items()], "targets": []}
    first, second = fields["domains"]
    for domains in ([first], [first, second]):
        plan = Plan.model_validate(fields | {"domains": domains, "branching": {"start": "seed"}})
        grow(plan, in_process(plan))
    if what == "reading":
        fields["reading"] = {"development_share": 0.1, "test_share": 0.2}
        found = "reading.test_share: 0.1 → 0.2; documents: "
    elif what == "files":
        other = write_jsonl(tmp_path / "other.jsonl", made_up_documents(name, 210))
        found = f'its source.text: ["{texts[name]}"] → ["{other}"]; documents: '
        texts[name] = other
    else:
        write_jsonl(texts[name], made_up_documents(name, 210))
        found = "other documents in its files; documents: "
    plan = Plan.model_validate(fields | {"domains": [{"name": name, "text": str(texts[name])}]})
    with pytest.raises(UserError) as refused:
        prepare(plan, in_process(plan))
    assert isinstance(refused.value, FoundationError) == (name == "kitchen")
    assert repr(name) in refused.value.what
    assert refused.value.found.startswith(found)
    with pytest.raises(UserError) as of_preview:
        preview(plan, Ledger.open(plan.store))
    assert str(of_preview.value) == str(refused.value)
