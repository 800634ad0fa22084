"""A forest of chat data: experts learn what the assistant says, and are measured by it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from btm_cluster.curve import development_size
from btm_cluster.data.blocks import MARKS_FILE
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.preparation import read
from btm_cluster.driver.prepared_plan import PreparedText
from btm_cluster.evaluation.scoring import stack_of
from btm_cluster.forest import Forest
from btm_cluster.ledger import Ref
from btm_cluster.ledger.curves import read_curve
from btm_cluster.operations.export import Export, export
from btm_cluster.operations.model_folder import write_chat_template
from btm_cluster.operations.plan import preview
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import ChatTemplate, Plan
from btm_cluster.steps.stored import open_held_out, open_model, whole_documents_of
from btm_cluster.workers.dry_walk import DONE
from tests.chatting import MARKED, conversations, write_conversations, write_tokenizer
from tests.conftest import in_process, made_up_documents, write_jsonl

BLOCK = 128


@pytest.fixture(scope="module")
def chat_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two domains of messages and one of plain text, for models of the Llama shape.

    The plan names another template than its tokenizer has.
    """
    folder = tmp_path_factory.mktemp("chat")
    template = folder / "own.jinja"
    template.write_text(MARKED)
    domains: list[dict[str, Any]] = [
        {
            "name": name,
            "text": str(write_conversations(folder / f"{name}.jsonl", name, 80)),
            "messages": "messages",
        }
        for name in ("kitchen", "harbour")
    ]
    domains.append(
        {"name": "garden", "text": str(write_jsonl(folder / "g.jsonl", made_up_documents("garden", 60)))}
    )
    model = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return Plan.model_validate(
        {
            "name": "chat",
            "store": str(folder / "store"),
            "domains": domains,
            "reading": {"development_share": 0.1, "test_share": 0.1, "chat_template": str(template)},
            "tokenizer": {"pretrained": str(write_tokenizer(folder / "tokenizer", "{{ 'another' }}"))},
            "model": {"config": model | {"num_attention_heads": 2}},
            "training": {
                "updates": 12,
                "seed_share": 0.5,
                "block_tokens": BLOCK,
                "blocks_per_domain_update": 4,
            },
            "cluster": {"micro_batch_blocks": 4},
        }
    )


@pytest.fixture(scope="module")
def driver(chat_plan: Plan) -> Driver:
    """With the forest grown and measured."""
    driver = in_process(chat_plan)
    run_plan(chat_plan, driver)
    return driver


def text_of(name: str, plan: Plan, driver: Driver) -> PreparedText:
    return next(text for text in read(plan, driver).texts if text.name == name)


def read_by_transformers(model: Any, ids: list[int], first_token: int) -> list[float]:
    """log p of each token, block by block."""
    found: list[float] = []
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        with torch.no_grad():
            logp = model(torch.tensor([[first_token, *block[:-1]]])).logits[0].log_softmax(-1)
        found += [float(logp[t, token]) for t, token in enumerate(block)]
    return found


def test_perplexity_and_bits_per_byte_are_of_what_the_assistant_says(chat_plan: Plan, driver: Driver) -> None:
    """By transformers' own template, tokens and mask of it."""
    ledger, text = driver.ledger, text_of("kitchen", chat_plan, driver)
    seed = Ref("model", forest_of(driver).foundation.seed)
    auto = AutoTokenizer.from_pretrained(chat_plan.tokenizer.pretrained)
    ids, said = list[int](), list[bool]()
    bytes_ = 0
    for document in whole_documents_of(ledger, text.identity, "test"):
        assert document.conversation is not None
        messages = document.conversation.messages
        chat = auto.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        ids += [*chat["input_ids"], auto.eos_token_id]
        said += [*map(bool, chat["assistant_masks"]), False]
        bytes_ += sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
    logp = np.array(read_by_transformers(open_model(ledger, seed), ids, auto.eos_token_id))
    is_said = np.array(said)
    is_text = is_said & (np.array(ids) != auto.convert_tokens_to_ids("<|im_end|>"))

    stack = stack_of(ledger, [seed], text, "test")
    sums_UD, sizes_UD = stack.sums()[0], stack.sizes()
    assert sizes_UD.sum(1).tolist() == [is_said.sum(), bytes_]
    assert sums_UD.sum(1).tolist() == pytest.approx([logp[is_said].sum(), logp[is_text].sum()], rel=1e-5)
    shown = run_plan(chat_plan, driver).verdict.rows["test"][0].cells["kitchen"]
    assert shown.perplexity == pytest.approx(math.exp(-logp[is_said].mean()), rel=1e-5)
    assert shown.bits_per_byte == pytest.approx(-logp[is_text].sum() / bytes_ / math.log(2), rel=1e-5)


def test_what_is_asked_is_evidence_for_whose_domain_it_is(chat_plan: Plan, driver: Driver) -> None:
    text = text_of("harbour", chat_plan, driver)
    experts = [Ref("model", expert.identity) for expert in forest_of(driver).experts]
    stack = stack_of(driver.ledger, experts, text, "test")
    logp_EBT, mask_BT = stack.take(0, len(stack))
    is_read_alone_BT = ~mask_BT & (stack.documents_BT >= 0)
    assert is_read_alone_BT.any()
    assert (logp_EBT[:, is_read_alone_BT] < 0).all()


def test_training_and_development_loss_are_of_the_predicted_tokens_alone(
    chat_plan: Plan, driver: Driver
) -> None:
    ledger, text = driver.ledger, text_of("kitchen", chat_plan, driver)
    (expert,) = [expert for expert in forest_of(driver).experts if expert.domain == "kitchen"]
    curve = read_curve(ledger, ledger.get(Ref("model", expert.identity)))
    assert curve is not None
    blocks_NT, is_predicted_NT = open_held_out(ledger, text.tokens["development"], 10**6)
    logp = np.stack(
        [
            read_by_transformers(open_model(ledger, Ref("model", expert.identity)), block, 0)
            for block in blocks_NT.tolist()
        ]
    )
    _, most = development_size(12, 4)
    expected = -logp[:most][is_predicted_NT[:most]].mean()
    assert curve.development.loss[-1] == pytest.approx(expected, rel=1e-4)


def test_running_again_makes_nothing_and_a_plan_says_so(chat_plan: Plan, driver: Driver) -> None:
    assert not run_plan(chat_plan, in_process(chat_plan)).made
    assert {step.state for step in preview(chat_plan, driver.ledger).steps} == {DONE}


def test_plain_text_of_the_same_forest_has_no_marks(chat_plan: Plan, driver: Driver) -> None:
    """It is stored as it was before there were any."""
    marked = {
        name: {
            driver.ledger.get(ref).has(MARKS_FILE)
            for refs in text_of(name, chat_plan, driver).tokens.values()
            for ref in refs
        }
        for name in ("kitchen", "garden")
    }
    assert marked == {"kitchen": {True}, "garden": {False}}


def test_an_export_has_the_template_that_its_experts_learned_by(
    chat_plan: Plan, driver: Driver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(Export(tmp_path / "expert", expert="kitchen"), chat_plan, driver)
    auto = AutoTokenizer.from_pretrained(tmp_path / "expert")
    ((_, asked, *_), *_) = conversations("kitchen", 1)
    prompt = auto.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    assert prompt == f"<|im_start|>user\n{asked['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert not caplog.messages
    export(Export(tmp_path / "by-store", expert="kitchen"), None, driver)
    assert "name the plan instead of --store" in caplog.text


def test_a_template_in_the_tokenizers_settings_gives_way_to_the_one_that_is_exported(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "exported", None)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "another"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "another"}))
    write_chat_template(ChatTemplate(MARKED), folder)
    assert AutoTokenizer.from_pretrained(folder).get_chat_template() == MARKED
    assert "another" not in "".join(file.read_text() for file in folder.glob("*_*.json*"))


def forest_of(driver: Driver) -> Forest:
    forest = driver.ledger.log.newest()
    assert forest is not None
    return forest
