"""Models from elsewhere as the seed, and models of other architectures:
small ones, through the real pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
)

from btm_cluster.data.tokenizer_training import train_tokenizer
from btm_cluster.driver.text_requests import tokenizer_request
from btm_cluster.errors import PlanError, UserError
from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.model import has_dropout
from btm_cluster.language_model.pretrained import pretrained_config, pretrained_model, resolve
from btm_cluster.ledger import Ref
from btm_cluster.operations.averages import Average
from btm_cluster.operations.merge import write_merged_model
from btm_cluster.operations.plan import preview
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import ModelPlan, Plan
from btm_cluster.requests import ImportTokenizer
from btm_cluster.steps.stored import open_model
from tests.conftest import DOMAINS, in_process, made_up_documents, run_all

SMALL = {
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
    },
}


def build(kind: str, auto: Any = AutoModelForCausalLM, **fields: Any) -> PreTrainedModel:
    """A small model of 320 tokens."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model: PreTrainedModel = auto.from_config(AutoConfig.for_model(kind, vocab_size=320, **ends, **fields))
    return model


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small GPT-2 and its tokenizer, as anybody would save them."""
    folder = tmp_path_factory.mktemp("pretrained")
    build("gpt2", **SMALL["gpt2"]).save_pretrained(folder)
    train_tokenizer([d for name in DOMAINS for d in made_up_documents(name, 100)], 320, folder)
    return folder


@pytest.fixture
def copy(pretrained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(pretrained, tmp_path / "copy"))


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def on(folder: Path, fields: dict[str, Any]) -> Plan:
    """The tiny plan with a pretrained model and its tokenizer."""
    source = {"pretrained": str(folder)}
    return Plan.model_validate(fields | {"model": source, "tokenizer": source})


def test_a_whole_plan_runs_from_a_pretrained_model(pretrained: Path, fields: dict[str, Any]) -> None:
    plan = on(pretrained, fields | {"domains": fields["domains"][:2]})
    driver = in_process(plan)
    run = run_plan(plan, driver)
    assert run.forest.domains == tuple(sorted(DOMAINS[:2]))
    seed = driver.ledger.get(Ref("model", run.forest.foundation.seed))
    stored = load_file(driver.ledger.open_file(seed, "model.safetensors"))
    original = load_file(pretrained / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in original)
    assert not run_plan(plan, in_process(plan)).made


def test_a_pretrained_model_is_the_same_wherever_it_lies(pretrained: Path, copy: Path) -> None:
    assert pretrained_model(str(copy)).sha256 == pretrained_model(str(pretrained)).sha256
    edit(copy, resid_pdrop=0.5)
    assert pretrained_model(str(copy)).sha256 != pretrained_model(str(pretrained)).sha256


def test_a_source_that_is_another_on_a_second_machine_is_refused(copy: Path, fields: dict[str, Any]) -> None:
    plan = on(copy, fields)
    driver = in_process(plan)
    request = tokenizer_request(plan, ())
    assert isinstance(request, ImportTokenizer)
    vocabulary = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(vocabulary, indent=3))
    with pytest.raises(UserError, match="another one on this machine"):
        run_all(driver.workers, [request])


def test_dropout_is_known_whether_the_plan_names_it_or_the_architecture_has_it_by_default() -> None:
    assert not has_dropout(build("gpt2", **SMALL["gpt2"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    assert has_dropout(build("gpt2", **SMALL["gpt2"], embd_pdrop=0.0, attn_pdrop=0.0))
    assert not has_dropout(build("llama", **SMALL["llama"]))
    assert has_dropout(build("llama", **SMALL["llama"], attention_dropout=0.1))
    assert has_dropout(build("opt", **SMALL["opt"]))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "opt", "mamba2"])
def test_a_model_of_another_architecture_goes_through_the_pipeline(kind: str, fields: dict[str, Any]) -> None:
    """Configurations like Mamba2's hold infinity, which JSON does not: no
    such model could be opened again."""
    model = {"config": {"model_type": kind, **SMALL[kind]}}
    plan = Plan.model_validate(fields | {"model": model, "domains": fields["domains"][:1], "targets": []})
    driver = in_process(plan)
    run = run_plan(plan, driver)
    assert len(run.forest.experts) == 1
    expert = driver.ledger.get(Ref("model", run.forest.experts[0].identity))
    assert json.loads(driver.ledger.open_file(expert, "config.json").read_text())["model_type"] == kind


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_a_model_type_that_predicts_no_next_token_is_refused_as_that(kind: str) -> None:
    """A t5 was told that `bos_token_id`, which its plan did not have, is no field of it."""
    with pytest.raises(PlanError, match=f"a {kind} is no causal language model"):
        full_config(ModelPlan(config={"model_type": kind}), 320, 32)


def test_an_unknown_configuration_field_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(PlanError, match=r"model\.config\.n_layers") as caught:
        full_config(ModelPlan(config={"model_type": "gpt2", "n_layers": 2}), 320, 32)
    assert "`n_layer`" in caught.value.remedy
    with pytest.raises(PlanError, match=r"model\.config\.hidden_sise") as caught:
        full_config(ModelPlan(config={"model_type": "llama", "hidden_sise": 32}), 320, 32)
    assert "`hidden_size`" in caught.value.remedy


def refusal(folder: Path, vocabulary: int = 320, block_tokens: int = 32) -> UserError:
    """The error with which a model folder is refused before anything runs."""
    with pytest.raises(UserError) as caught:
        pretrained_config(pretrained_model(str(folder)), vocabulary, block_tokens)
    assert caught.value.found
    assert caught.value.expected
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    "content", ["nope", "{}", "[1]", '{"model_type": "unknown"}', '{"model_type": "t5"}']
)
def test_a_configuration_that_is_none_of_a_causal_model_is_refused(content: str, copy: Path) -> None:
    (copy / "config.json").write_text(content)
    assert "is no causal language model" in str(refusal(copy))


def test_a_folder_without_model_files_is_refused_with_what_is_there(pretrained: Path, tmp_path: Path) -> None:
    assert "nothing in it" in str(refusal(tmp_path))
    shutil.copy(pretrained / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "config.json, pytorch_model.bin" in str(refusal(tmp_path))


def test_a_model_that_fits_neither_tokenizer_nor_blocks_is_refused(pretrained: Path) -> None:
    assert "at least 321" in str(refusal(pretrained, vocabulary=321))
    assert "at most 64" in str(refusal(pretrained, block_tokens=65))


def test_what_is_no_folder_is_looked_for_on_the_hub_and_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "../none", "no such/name"):
        with pytest.raises(UserError, match="cannot find the pretrained") as caught:
            resolve(name)
        assert "from the hub" in caught.value.found


def test_code_that_comes_with_a_model_is_not_run(copy: Path, tmp_path: Path) -> None:
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit(copy, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    assert "custom code" in str(refusal(copy))
    assert not (tmp_path / "ran").exists()


def test_code_that_comes_with_a_model_is_not_run_even_if_somebody_says_yes(
    copy: Path, tmp_path: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers asks, where it is not told: `yes | btm plan` ran the model's code."""
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit(copy, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError):
        preview(on(copy, fields), in_process(on(copy, fields)).ledger)
    assert not (tmp_path / "ran").exists()


def test_an_unusable_model_is_refused_before_a_text_is_read(copy: Path, fields: dict[str, Any]) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.bias"][3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    plan = on(copy, fields)
    driver = in_process(plan)
    with pytest.raises(UserError, match="not finite"):
        run_plan(plan, driver)
    assert not list(driver.ledger.list_artifacts("source"))


def test_a_merged_folder_keeps_what_came_with_the_model(
    copy: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    edit(copy, eos_token_id=[0, 5], bos_token_id=3)
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.6}))
    (copy / "LICENSE").write_text("as you like")
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5}))
    plan = on(copy, fields | {"domains": fields["domains"][:2]})
    driver = in_process(plan)
    run_plan(plan, driver)
    write_merged_model(plan, Average("uniform"), tmp_path / "merged", driver)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["n_positions"]) == ([0, 5], 3, 64)
    for name in ("chat_template.jinja", "generation_config.json", "LICENSE", "preprocessor_config.json"):
        assert (tmp_path / "merged" / name).read_text() == (copy / name).read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "blocks of 32 tokens" in card
    assert "license_link: LICENSE" in card
    assert "Its seed is the pretrained model copy." in card
    assert str(copy) not in card, "where it lies is nobody's business"


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_merged_folder_claims_the_block_length_that_it_was_trained_on(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """A Llama trained on blocks of 128 claimed 2,048 positions, and a harness that
    believed it measured a worse model."""
    model = {"config": {"model_type": kind, **SMALL[kind]}}
    plan = Plan.model_validate(fields | {"model": model, "domains": fields["domains"][:1], "targets": []})
    driver = in_process(plan)
    run_plan(plan, driver)
    write_merged_model(plan, Average("uniform"), tmp_path / "merged", driver)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (
        config["max_position_embeddings"]
        == 32
        == AutoTokenizer.from_pretrained(tmp_path / "merged").model_max_length
    )
    ours, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    average = next(m for m in driver.ledger.list_artifacts("model") if m.facts["role"] == "average")
    stored = open_model(driver.ledger, average)
    block = torch.arange(32)[None]
    torch.testing.assert_close(ours.eval()(input_ids=block).logits, stored.eval()(input_ids=block).logits)


def running(folder: Path, fields: dict[str, Any]) -> UserError:
    """The error with which a run from a model folder ends; nothing of it is in the store."""
    plan = on(folder, fields)
    driver = in_process(plan)
    with pytest.raises(UserError) as caught:
        run_plan(plan, driver)
    assert not list(driver.ledger.list_artifacts("model"))
    assert not driver.ledger.log.versions()
    assert caught.value.found
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"n_layer": 3}, "missing: transformer.h.2"),
        ({"n_layer": 1}, "unexpected: transformer.h.1"),
        ({"n_embd": 64}, "mismatched: transformer.h.0"),
    ],
)
def test_weights_that_do_not_match_their_configuration_are_refused(
    change: dict[str, int], part: str, copy: Path, fields: dict[str, Any]
) -> None:
    """Transformers only warns: it starts missing layers at random and drops those that are too many."""
    edit(copy, **change)
    assert part in running(copy, fields).found


def test_weights_that_are_not_whole_are_refused(copy: Path, fields: dict[str, Any]) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot read the weights" in str(running(copy, fields))


def test_a_model_that_sees_later_tokens_is_refused(copy: Path, fields: dict[str, Any]) -> None:
    """BERT opens as a causal model and reads what it is asked to predict: a perplexity of nearly 1."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    build("bert", AutoModelForMaskedLM, **sizes).save_pretrained(copy)
    assert "later tokens" in str(running(copy, fields))
