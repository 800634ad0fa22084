"""DEMix against dense models built by hand, trained, killed, cut into its parts, and run beside a forest."""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from btm_cluster.driver.recipes import demix_request, seed_request, transformer_lm_request
from btm_cluster.errors import PlanError, UserError
from btm_cluster.evaluation.evaluate import evaluate
from btm_cluster.language_model.demix import (
    DensePart,
    check_splits,
    count_demix_parameters,
    split_feed_forwards,
)
from btm_cluster.language_model.loss import NextTokenLoss, read_after
from btm_cluster.language_model.model import load_model, save_weights
from btm_cluster.language_model.scoring import score_tokens
from btm_cluster.language_model.stored_weights import TensorFiles
from btm_cluster.ledger import Artifact, Ledger, Named
from btm_cluster.operations.evaluate import find_grown
from btm_cluster.operations.gc import find_garbage
from btm_cluster.operations.plan import DONE, preview
from btm_cluster.operations.run import run_plan
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan, read_plan
from btm_cluster.requests import TrainRequest
from btm_cluster.steps.stored import open_blocks, open_model
from btm_cluster.steps.train import train
from btm_cluster.steps.training_run import run_training
from btm_cluster.study.controls import seeded_demix_request
from tests.conftest import DOMAINS, in_process
from tests.integration.conftest import PreparedStore
from tests.integration.test_housekeeping import let_all_be_old
from tests.integration.test_training import (
    AT_EVERY_UPDATE,
    LINE,
    Interrupting,
    MachineDied,
    PlainAdam,
    Undisturbed,
    end_of_text,
    last_saved,
    plain_loss,
    run,
    shuffled,
    training_blocks,
    weights_of,
)

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 64}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
LLAMA |= {"num_attention_heads": 2, "vocab_size": 64, "bos_token_id": None, "eos_token_id": None}
CONFIGS = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def fresh(config: Mapping[str, Any]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def is_feed_forward(name: str) -> bool:
    return ".mlp." in name


def dense_models(config: Mapping[str, Any], domains: int) -> list[PreTrainedModel]:
    """Models that share the very tensors of everything but their feed-forwards, which differ."""
    torch.manual_seed(3)
    first = fresh(config)
    shared = {id(p): p for name, p in first.named_parameters() if not is_feed_forward(name)}
    models = [copy.deepcopy(first, dict(shared)) for _ in range(domains)]
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                if is_feed_forward(name):
                    parameter += 0.1 * torch.randn_like(parameter)
    return models


def demix_of(config: Mapping[str, Any], models: list[PreTrainedModel]) -> PreTrainedModel:
    """The DEMix that consists of dense models."""
    demix = fresh(config)
    split_feed_forwards(demix, range(len(models)))
    parts = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, parameter in demix.named_parameters():
            dense = name.replace(".experts", "")
            stacked = torch.stack([part[dense] for part in parts])
            parameter.copy_(stacked if is_feed_forward(name) else stacked[0])
    return demix


def random_blocks(domains: int) -> torch.Tensor:
    """Three blocks for each domain, domain after domain."""
    return torch.randint(64, (3 * domains, 8), generator=torch.Generator().manual_seed(4))


def loss_of(model: PreTrainedModel, blocks: torch.Tensor) -> torch.Tensor:
    """Summed loss of blocks, each read after token 0."""
    loss: torch.Tensor = NextTokenLoss(model)(read_after(blocks, 0), blocks)
    return loss


@CONFIGS
def test_a_feed_forward_learns_from_its_domain_alone_and_all_else_from_every_domain(
    config: dict[str, Any],
) -> None:
    models, blocks = dense_models(config, 2), random_blocks(2)
    demix = demix_of(config, models)
    whole = loss_of(demix, blocks)
    whole.backward()
    losses = [loss_of(model, blocks[3 * d : 3 * d + 3]) for d, model in enumerate(models)]
    sum(losses, torch.tensor(0.0)).backward()
    torch.testing.assert_close(whole, losses[0] + losses[1])
    parts = [dict(model.named_parameters()) for model in models]
    for name, parameter in demix.named_parameters():
        dense = name.replace(".experts", "")
        expected = [part[dense].grad for part in parts]
        assert all(gradient.abs().max() > 0 for gradient in expected), name
        found = list(parameter.grad) if is_feed_forward(name) else [parameter.grad] * 2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_demix_has_what_is_shared_once_and_its_feed_forwards_once_per_domain() -> None:
    embeddings, attention, norms = 64 * 16 + 8 * 16, 4 * 16 * 16 + 4 * 16, 2 * 2 * 16
    feed_forward = 2 * 4 * 16 * 16 + 5 * 16
    non_embedding = 2 * (attention + norms + 2 * feed_forward) + 2 * 16
    assert count_demix_parameters(GPT2, 2) == (embeddings + non_embedding, non_embedding)


@CONFIGS
def test_counted_parameters_are_those_that_are_there(config: dict[str, Any]) -> None:
    built = demix_of(config, dense_models(config, 5))
    assert count_demix_parameters(config, 5)[0] == sum(p.numel() for p in built.parameters())


@CONFIGS
def test_a_part_is_an_ordinary_model_that_says_what_the_demix_says_of_its_domain(
    config: dict[str, Any], tmp_path: Path
) -> None:
    models, blocks = dense_models(config, 3), random_blocks(3)
    demix = demix_of(config, models)
    routed = demix(input_ids=blocks).logits
    save_weights(dict(demix.named_parameters()), tmp_path / "demix.safetensors")
    stored = TensorFiles([tmp_path / "demix.safetensors"])
    for domain in range(3):
        part = load_model(config, DensePart(stored, domain))
        here = slice(3 * domain, 3 * domain + 3)
        torch.testing.assert_close(part(input_ids=blocks[here]).logits, routed[here])


def test_a_demix_starts_as_equal_copies_of_the_dense_model() -> None:
    demix, dense = fresh(GPT2), fresh(GPT2)
    dense.load_state_dict(demix.state_dict())
    split_feed_forwards(demix, range(4))
    blocks = random_blocks(4)
    torch.testing.assert_close(demix(input_ids=blocks).logits, dense(input_ids=blocks).logits)


def test_a_demix_compiles_in_one_graph_under_bfloat16() -> None:
    config, blocks = GPT2 | {"n_layer": 1}, random_blocks(2)
    found = []
    for compiles in (False, True):
        loss = NextTokenLoss(demix_of(config, dense_models(config, 2)))
        if compiles:
            loss.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(read_after(blocks, 0), blocks)
        value.backward()
        found.append((value, {name: p.grad for name, p in loss.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


def test_each_domains_dropout_is_drawn_by_itself() -> None:
    demix = fresh(GPT2 | {"resid_pdrop": 0.5})
    split_feed_forwards(demix, range(2))
    feed_forward = demix.get_submodule("transformer.h.0.mlp").train()
    one, other = feed_forward(torch.ones(2, 8, 16))
    assert ((one == 0) != (other == 0)).any()


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            {"model_type": "opt", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
            "no submodule",
        ),
        (
            {"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
            "already",
        ),
        ({"model_type": "bloom", "n_layer": 1, "hidden_size": 16, "n_head": 2}, "more than hidden states"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_an_architecture_of_which_no_demix_can_be_made_is_refused(config: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match="no DEMix can be made") as refused:
        check_splits(config | {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None}, 2)
    assert found in str(refused.value)


def test_a_demix_beside_a_pretrained_model_is_refused(
    fields: dict[str, Any], write_plan: Callable[[dict[str, Any]], Path]
) -> None:
    fields |= {"model": {"pretrained": "x"}, "tokenizer": {"pretrained": "x"}, "baselines": ["demix"]}
    with pytest.raises(PlanError, match="only where the model is trained from the start"):
        read_plan(write_plan(fields))


# Trained


@pytest.fixture
def request_(prepared_store: PreparedStore) -> TrainRequest:
    return demix_request(prepared_store.prepared)


def stored_parts(ledger: Ledger, request: TrainRequest) -> list[Artifact]:
    demix = ledger.get(request.ref)
    parts = [ledger.get(part.ref) for part in request.parts]
    assert list(demix.parts) == [part.ref for part in parts]
    return parts


@pytest.mark.parametrize("at_once", [1, 8, 100])
def test_a_trained_demix_is_a_plain_loop_over_dense_models_that_share_all_but_their_feed_forwards(
    prepared_store: PreparedStore, request_: TrainRequest, at_once: int
) -> None:
    how = replace(request_.how, micro_batch_blocks=at_once)
    # It shows whether a bias decays.
    strong_decay = request_.training.model_copy(update={"weight_decay": 10.0})
    request = replace(request_, how=how, training=strong_decay)
    ledger, end = prepared_store.driver.ledger, end_of_text(prepared_store)
    run(prepared_store, request)
    torch.manual_seed(0)
    first = fresh(request.model)
    shared = {id(p): p for name, p in first.named_parameters() if not is_feed_forward(name)}
    models = [copy.deepcopy(first, dict(shared)) for _ in request.texts]
    once = {
        id(p): (f"{d} {name}", p) for d, model in enumerate(models) for name, p in model.named_parameters()
    }
    adam = PlainAdam(dict(once.values()))
    for update in range(12):
        for text, blocks, model in zip(request.texts, training_blocks(ledger, request), models, strict=True):
            rows = blocks[shuffled(0, text.name, len(blocks), range(4 * update, 4 * update + 4))]
            (plain_loss(model, rows, end) / len(models)).backward()
        adam.step(LINE[update], request)
    for part, model in zip(stored_parts(ledger, request), models, strict=True):
        found = open_model(ledger, part)
        for (name, tensor), (_, expected) in zip(
            found.named_parameters(), model.named_parameters(), strict=True
        ):
            torch.testing.assert_close(
                tensor, expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_parts_of_a_trained_demix_say_of_a_block_what_it_says_when_it_routes_the_block(
    prepared_store: PreparedStore, request_: TrainRequest
) -> None:
    ledger, end = prepared_store.driver.ledger, end_of_text(prepared_store)
    texts = [open_blocks(ledger, text) for text in request_.texts]
    trained = run_training(request_, ledger, Undisturbed(), texts, end, lambda *_: None)
    run(prepared_store, request_)
    block = torch.from_numpy(texts[0].take(np.zeros(1, dtype=np.int64)))
    routed = score_tokens(trained.state.model.eval(), block.expand(3, -1), end, request_.how)[0]
    for part, logp in zip(stored_parts(ledger, request_), routed, strict=True):
        model = open_model(ledger, part)
        torch.testing.assert_close(score_tokens(model, block, end, request_.how)[0][0], logp)
    assert (routed[0] - routed[1]).abs().max() > 0.01


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_demix_that_dies_at_every_update_ends_in_the_same_weights(
    prepared_store: PreparedStore, request_: TrainRequest, optimizer: str, tmp_path: Path
) -> None:
    request_ = replace(request_, training=request_.training.model_copy(update={"optimizer": optimizer}))
    shutil.copytree(prepared_store.driver.ledger.storage.location, tmp_path / "copy")
    undisturbed = Ledger.open(str(tmp_path / "copy"))
    train(request_, undisturbed, Undisturbed())
    expected = [weights_of(part) for part in stored_parts(undisturbed, request_)]
    request = replace(request_, checkpoint_seconds=AT_EVERY_UPDATE)
    for update in range(1, 12):
        with pytest.raises(MachineDied):
            run(prepared_store, request, Interrupting(1, dies=True))
        assert last_saved(prepared_store, request) == update
    run(prepared_store, request)
    assert [weights_of(part) for part in stored_parts(prepared_store.driver.ledger, request)] == expected
    assert last_saved(prepared_store, request) is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_demix_of_one_domain_that_branches_from_the_seed_is_the_transformer_lm_that_passes_it(
    prepared_store: PreparedStore, optimizer: str
) -> None:
    one, ledger = prepared_store.prepared, prepared_store.driver.ledger
    training = one.plan.training.model_copy(update={"optimizer": optimizer})
    plan = one.plan.model_copy(update={"training": training})
    prepared = replace(one, plan=plan, founding_texts=one.founding_texts[:1])
    seed = seed_request(prepared).ref
    dense = run(prepared_store, transformer_lm_request(prepared, seed))
    request = seeded_demix_request(prepared, seed)
    run(prepared_store, request)
    (part,) = stored_parts(ledger, request)
    whole, found = (open_model(ledger, one) for one in (dense, part))
    for (name, tensor), expected in zip(found.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_every_part_of_a_demix_that_branches_from_the_seed_starts_as_the_seed(
    prepared_store: PreparedStore,
) -> None:
    prepared_store.train_seed()
    ledger, seed = prepared_store.driver.ledger, prepared_store.seed.ref
    request = seeded_demix_request(prepared_store.prepared, seed)
    request = replace(request, last_update=request.first_update)
    run(prepared_store, request)
    for part in stored_parts(ledger, request):
        assert part.blob("model.safetensors").sha256 == ledger.get(seed).blob("model.safetensors").sha256


class DyingLedger(Ledger):
    """Commits one model, and dies at the second."""

    commits = 0

    def commit(self, made: Named, *rest: Any) -> Artifact:
        self.commits += 1
        if self.commits > 1:
            raise MachineDied
        return super().commit(made, *rest)


def test_parts_whose_storing_was_cut_short_are_all_of_one_training(
    prepared_store: PreparedStore, request_: TrainRequest
) -> None:
    ledger = prepared_store.driver.ledger
    with pytest.raises(MachineDied):
        train(request_, DyingLedger(ledger.storage), Undisturbed())
    assert [ledger.find(part.ref) is not None for part in request_.parts] == [True, False, False]
    assert ledger.find(request_.ref) is None
    assert last_saved(prepared_store, request_) == 12
    run(prepared_store, request_, Interrupting(0, dies=True))  # no update is left to do
    assert len(stored_parts(ledger, request_)) == 3


# Beside a forest


def test_a_run_sets_demix_beside_the_forest_and_collection_keeps_it(fields: dict[str, Any]) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    fields["model"] = {"config": {"model_type": "llama"} | sizes}
    fields["cluster"]["micro_batch_blocks"] = 64
    plan = Plan.model_validate(
        fields | {"baselines": ["transformer-lm", "demix"], "merging": {"development_blocks": 4}}
    )
    assert [step.name for step in preview(plan, Ledger.open(plan.store)).steps][-3:-1] == [
        "transformer-lm",
        "demix",
    ]
    driver = in_process(plan)
    seen = run_plan(plan, driver)
    assert not seen.failures
    rows = {row.system: row for row in seen.verdict.rows["test"]}
    for system in ("DEMix, paper's posterior", "DEMix, calibrated"):
        assert rows[system].cells.keys() == {*DOMAINS, "market"}
        assert rows[system].means["all"].perplexity < 320
    steps = {step.name: step for step in preview(plan, driver.ledger).steps}
    assert steps["demix"].state == steps["scores"].state == DONE
    assert steps["demix"].tokens == 12 * 3 * 4 * 32
    assert steps["demix"].stored_bytes == steps["transformer-lm"].stored_bytes, (
        "three parts, and three milestones"
    )
    again = in_process(plan)
    found = find_grown(plan, again)
    evaluate(found.prepared, found.forest, found.baseline, again, found.demix)
    assert len(found.demix) == 3
    assert not again.made
    assert verify(driver.ledger).problems == ()
    let_all_be_old(plan.store)
    going = [driver.ledger.read_manifest(key) for key in find_garbage(driver.ledger, 1, 86_400.0).manifests]
    roles = {artifact.facts.get("role") for artifact in going if artifact and artifact.kind == "model"}
    assert roles == {"average"}
