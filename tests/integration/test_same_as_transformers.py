"""A pretrained model is the same model here as in transformers: over architectures,
imported, scored and asked to write.

The reference is transformers alone, with a loop over blocks: each is read after the token that the tokenizer
puts before a text, or after its end-of-text token where it puts none.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from btm_cluster.data.blocks import Blocks
from btm_cluster.data.tokenizer import TextTokenizer, open_pretrained_tokenizer
from btm_cluster.driver.prepared_plan import model_config
from btm_cluster.equations.posterior import Posterior
from btm_cluster.errors import PlanError, UserError
from btm_cluster.language_model.configuration import config_from
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.engine_opening import EngineSettings
from btm_cluster.language_model.model import fresh_without_values, load_model
from btm_cluster.language_model.model_import import import_model
from btm_cluster.language_model.pretrained import pretrained_config, pretrained_model
from btm_cluster.language_model.prompts import Prompt
from btm_cluster.language_model.scoring import score_blocks
from btm_cluster.language_model.stored_weights import TensorFiles
from btm_cluster.ledger import Ref
from btm_cluster.mixing.fitting import Mixing
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import ModelPlan, Plan, TrainingPlan
from btm_cluster.requests import Resources, TrainRequest
from tests.conftest import DOMAINS, in_process, made_up_documents
from tests.integration.test_averaging import write_average
from tests.reading import packed

BLOCK_TOKENS = 40
HOW = Resources(1, 0, 1, 4, "float32", False)
DOCUMENTS = [document for name in DOMAINS for document in made_up_documents(name, 40)]
WINDOW = 8
"""Of sliding-window attention: shorter than a block, so that it matters."""


def shape(*without: str, **fields: Any) -> dict[str, Any]:
    """The fields that most architectures share."""
    usual = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    usual |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    return {name: value for name, value in usual.items() if name not in without} | fields


GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
DEEPSEEK |= {
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
}
DEEPSEEK |= {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": shape(),
    "qwen2": shape(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": shape(head_dim=8),
    "mistral": shape(sliding_window=WINDOW),
    "gemma2": shape(head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3_text": shape(head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "phi3": shape(sliding_window=WINDOW),
    "gpt_neox": shape("num_key_value_heads"),
    "olmo2": shape(),
    "opt": shape("num_key_value_heads", "intermediate_size", word_embed_proj_dim=32, ffn_dim=48),
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
    },
    "deepseek_v3": shape(**DEEPSEEK),
    "gpt2": GPT2,
    "apertus": shape(),
    "mixtral": shape(num_local_experts=4),
    "jamba": shape(
        attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8, use_mamba_kernels=False
    ),
    "bamba": shape(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8),
    "phi3 longrope": shape(
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 16,
        },
    ),
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
}

NOT_BY_ROWS = ("mamba", "mamba2", "jamba", "rwkv", "bamba", "phi3 longrope")
"""They remember by more than attention, or predict by the length of what is read at once."""


def save_tokenizer(folder: Path, begins: bool) -> None:
    """A byte-level tokenizer of 320 tokens, as anybody would save it; one that
    begins puts <bos> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_model(folder: Path, kind: str, auto: Any = AutoModelForCausalLM, **fields: Any) -> PreTrainedModel:
    """A small model whose every tensor was moved from where it started, its buffers too."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    model: PreTrainedModel = auto.from_config(
        AutoConfig.for_model(kind, vocab_size=320, **ends, **fields)
    ).eval()
    with torch.no_grad():
        for tensor in (t for t in model.state_dict().values() if t.is_floating_point()):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder)
    return model


def import_request(folder: Path, tokenizer: TextTokenizer, **how: Any) -> TrainRequest:
    """The request that makes a pretrained model the seed."""
    pretrained = pretrained_model(str(folder))
    config = pretrained_config(pretrained, tokenizer.vocabulary, BLOCK_TOKENS)
    assert json.loads(json.dumps(config, allow_nan=False)) == config, "a request is stored as JSON"
    training = TrainingPlan(block_tokens=BLOCK_TOKENS, **how)
    return TrainRequest(
        "seed", "seed", config, Ref("tokenizer", ""), (), training, 0, 0, None, pretrained, False, HOW, 900.0
    )


def brought_in(folder: Path, into: Path) -> tuple[PreTrainedModel, TextTokenizer]:
    """The model in a folder as it is once it was imported and opened again, and its tokenizer."""
    tokenizer = open_pretrained_tokenizer(folder)
    request = import_request(folder, tokenizer)
    into.mkdir(exist_ok=True)
    files = import_model(request, tokenizer, into)[0]
    return load_model(request.model, TensorFiles([files["model.safetensors"]])).eval(), tokenizer


def by_transformers(model: Any, blocks: np.ndarray, first: int) -> np.ndarray:
    """log p of every token, each block alone."""
    rows = []
    with torch.inference_mode():
        for block in blocks.astype(np.int64):
            logits = model(input_ids=torch.tensor([[first, *block[:-1]]])).logits[0]
            said = torch.log_softmax(logits.double(), -1)
            rows.append(said.gather(1, torch.from_numpy(block)[:, None])[:, 0].numpy())
    return np.stack(rows)


def some_blocks(tokenizer: TextTokenizer) -> np.ndarray:
    return packed(DOCUMENTS[:6], tokenizer, BLOCK_TOKENS, keep_rest=True)[0]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_scores_and_writes_here_as_in_transformers(kind: str, tmp_path: Path) -> None:
    begins = kind in ("gemma2", "gemma3_text", "llama", "opt")
    save_tokenizer(tmp_path / "model", begins)
    save_model(tmp_path / "model", kind.split()[0], **ARCHITECTURES[kind])
    ours, tokenizer = brought_in(tmp_path / "model", tmp_path / "imported")
    assert tokenizer.first_token == int(begins)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    blocks = some_blocks(tokenizer)
    np.save(tmp_path / "tokens.npy", blocks)
    files = score_blocks(ours, Blocks([tmp_path / "tokens.npy"]), tokenizer.first_token, HOW, tmp_path)
    scores = np.load(files["logp.npy"])
    np.testing.assert_allclose(scores, by_transformers(theirs, blocks, tokenizer.first_token), atol=1e-4)
    # And what it writes has the probability that it scores, wherever the prompt ends, whatever is written
    # beside it.
    alone, block = Mixing(torch.zeros(1, dtype=torch.float64), Posterior("full")), blocks[0].tolist()
    settings = EngineSettings(tokenizer.first_token, 320, BLOCK_TOKENS, rows=3)
    engine = EnsembleEngine([ours], alone, settings)
    assert (engine.way == "rows") == (kind not in NOT_BY_ROWS)
    prompts = (0, 1, 2 * WINDOW + 3)
    rows = engine.admit([Prompt(block[:prompt], BLOCK_TOKENS) for prompt in prompts])
    written: dict[int, list[float]] = {row: [] for row in rows}
    for n in range(BLOCK_TOKENS):
        forced = {
            row: block[prompt + n]
            for row, prompt in zip(rows, prompts, strict=True)
            if prompt + n < BLOCK_TOKENS
        }
        for row, token in forced.items():
            written[row].append(float(engine.log_probs(row)[token]))
        assert engine.step(forced).keys() == forced.keys()
    for row, prompt in zip(rows, prompts, strict=True):
        np.testing.assert_allclose(written[row], scores[0, prompt:], atol=1e-4)
    for found in (*engine.score([block]), *engine.score([block[:5], block[:-1], block])[2:]):
        np.testing.assert_allclose(found.logp_T, scores[0], atol=1e-4)


def test_a_model_in_bfloat16_is_stored_as_it_was_where_the_plan_says_so(folder: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    theirs.save_pretrained(folder)
    tokenizer = open_pretrained_tokenizer(folder)
    request = import_request(folder, tokenizer, weights="bfloat16")
    found = load_file(import_model(request, tokenizer, tmp_path)[0]["model.safetensors"])
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_buffers_that_are_computed_have_their_values_before_a_model_has_weights(kind: str) -> None:
    config = {"model_type": kind.split()[0], "vocab_size": 320, "pad_token_id": 0, **ARCHITECTURES[kind]}
    found = fresh_without_values(config)
    built = AutoModelForCausalLM.from_config(config_from(config))
    assert all(parameter.is_meta for parameter in found.parameters())
    expected = {name: b for name, b in built.named_buffers() if name not in built.state_dict()}
    buffers = dict(found.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected.items())


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def spoil(folder: Path, **tensors: torch.Tensor) -> None:
    """Writes tensors into a model's file; `__` stands for a dot."""
    file = folder / "model.safetensors"
    stored = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(stored, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama with a head of its own, and its tokenizer."""
    save_tokenizer(tmp_path / "llama", begins=False)
    save_model(tmp_path / "llama", "llama", **ARCHITECTURES["llama"])
    return tmp_path / "llama"


def assert_scores_alike(folder: Path, into: Path) -> PreTrainedModel:
    """Imports a folder and compares it with transformers'."""
    ours, tokenizer = brought_in(folder, into)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = some_blocks(tokenizer)[:2]
    np.testing.assert_allclose(
        by_transformers(ours, blocks, 0), by_transformers(theirs, blocks, 0), atol=1e-4
    )
    return ours


def test_a_head_of_its_own_stays_whatever_the_configuration_says_of_tied_embeddings(
    folder: Path, tmp_path: Path
) -> None:
    change(folder, tie_word_embeddings=True)
    ours = assert_scores_alike(folder, tmp_path / "own")
    assert ours.config.tie_word_embeddings is False
    same = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    spoil(folder, lm_head__weight=same.clone())
    assert assert_scores_alike(folder, tmp_path / "tied").config.tie_word_embeddings is True


def test_embeddings_may_be_stored_under_the_name_of_the_head_that_is_tied_to_them(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tied", begins=False)
    save_model(tmp_path / "tied", "llama", **ARCHITECTURES["llama"], tie_word_embeddings=True)
    stored = load_file(tmp_path / "tied" / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    assert_scores_alike(tmp_path / "tied", tmp_path / "imported")


MASK = torch.tril(torch.ones(64, 64))[None, None]
CONSTANTS = {
    "gpt2": {
        "transformer__h__0__attn__masked_bias": torch.tensor(-1e4),
        "transformer__h__1__attn__bias": MASK,
    },
    "llama": {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.rand(4)},
    "opt": {"model__decoder__version": torch.tensor([3.0]), "model__position_ids": torch.arange(64)[None]},
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_that_older_transformers_stored_are_passed_over(kind: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "old", begins=False)
    save_model(tmp_path / "old", kind, **ARCHITECTURES[kind])
    spoil(tmp_path / "old", **CONSTANTS[kind])
    assert_scores_alike(tmp_path / "old", tmp_path / "imported")


def refusal(folder: Path) -> UserError:
    """The error with which an import ends, or what comes before it."""
    with pytest.raises(UserError) as caught:
        brought_in(folder, folder / "imported")
    assert caught.value.found
    assert caught.value.remedy
    return caught.value


def test_tensors_that_matter_are_never_passed_over(folder: Path) -> None:
    spoil(folder, model__layers__0__self_attn__q_norm__weight=torch.ones(8))
    assert "q_norm" in refusal(folder).found
    spoil(folder, model__layers__0__mlp__bias=torch.rand(1, 1, 4, 4))
    assert "mlp.bias" in refusal(folder).found


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    for value in (float("inf"), float("nan")):
        spoil(folder, model__layers__1__mlp__up_proj__weight=torch.full((48, 32), value))
        error = refusal(folder)
        assert "not finite" in error.what
        assert "model.layers.1.mlp.up_proj.weight" in error.found


def test_quantised_tensors_are_refused_though_no_configuration_says_so(folder: Path) -> None:
    spoil(folder, model__layers__0__mlp__up_proj__weight=torch.ones(48, 32, dtype=torch.int8))
    with pytest.raises(UserError, match="is quantised") as caught:
        pretrained_config(pretrained_model(str(folder)), 320, BLOCK_TOKENS)
    assert "I8" in caught.value.found


def test_what_needs_no_weights_is_checked_before_they_are_read(folder: Path) -> None:
    change(folder, quantization_config={"quant_method": "fp8"})
    assert "is quantised" in refusal(folder).what
    change(folder, quantization_config=None, intermediate_size=64)
    with pytest.raises(UserError, match="mismatched"):
        pretrained_config(pretrained_model(str(folder)), 320, BLOCK_TOKENS)
    change(folder, intermediate_size=48)
    for layers, part in ((1, "unexpected: model.layers.1"), (3, "missing: model.layers.2")):
        change(folder, num_hidden_layers=layers)
        with pytest.raises(UserError, match=part):
            pretrained_config(pretrained_model(str(folder)), 320, BLOCK_TOKENS)
    change(folder, num_hidden_layers=2)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="cannot read the weights"):
        pretrained_config(pretrained_model(str(folder)), 320, BLOCK_TOKENS)


def test_a_model_in_several_files_needs_all_of_them(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_scores_alike(folder, tmp_path / "imported")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    assert "model-00002-of" in refusal(folder).found


LONGEST = {
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 32},
    "gpt2": GPT2 | {"n_positions": 32},
    "opt": ARCHITECTURES["opt"] | {"max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", LONGEST)
def test_a_block_longer_than_a_model_reads_is_refused_whatever_its_limit_is_called(
    kind: str, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path / "short", begins=False)
    save_model(tmp_path / "short", kind, **LONGEST[kind])
    with pytest.raises(PlanError, match="at most 32"):
        pretrained_config(pretrained_model(str(tmp_path / "short")), 320, 33)
    with pytest.raises(PlanError, match="at most 32"):
        model_config(_with_model({"model_type": kind, **LONGEST[kind]}, 33), 320)


def _with_model(config: dict[str, Any], block_tokens: int) -> Plan:
    return Plan.model_construct(
        model=ModelPlan(config=config), training=TrainingPlan.model_construct(block_tokens=block_tokens)
    )


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def test_the_text_part_of_a_model_that_also_sees_pictures_is_a_language_model(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "whole", begins=True)
    text = ARCHITECTURES["gemma3_text"] | {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 0}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION, image_token_index=5)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    ours, tokenizer = brought_in(tmp_path / "whole", tmp_path / "imported")
    assert ours.config.model_type == "gemma3_text"
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    blocks = some_blocks(tokenizer)[:2]
    np.testing.assert_allclose(
        by_transformers(ours, blocks, 1), by_transformers(theirs, blocks, 1), atol=1e-4
    )


def test_a_text_part_that_transformers_opens_alone_leaves_the_other_parts_behind(tmp_path: Path) -> None:
    """Of Llama 4, transformers' causal model takes the tensors of the text
    part, and reports those of the rest."""
    save_tokenizer(tmp_path / "whole", begins=False)
    text = shape(head_dim=8, intermediate_size_mlp=48, num_local_experts=2, vocab_size=320, pad_token_id=0)
    vision = VISION | {"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16}
    config = AutoConfig.for_model("llama4", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    assert assert_scores_alike(tmp_path / "whole", tmp_path / "imported").config.model_type == "llama4_text"
    spoil(tmp_path / "whole", language_model__model__layers__0__self_attn__q_norm__weight=torch.ones(8))
    assert "q_norm" in refusal(tmp_path / "whole").found


def test_values_in_buffers_are_imported_trained_on_and_averaged(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    """A router's corrections are no parameters: they were dropped, and no
    expert could start from the seed."""
    source = tmp_path / "deepseek"
    save_tokenizer(source, begins=False)
    save_model(source, "deepseek_v3", **ARCHITECTURES["deepseek_v3"])
    pretrained = {"pretrained": str(source)}
    plan = Plan.model_validate(
        fields | {"model": pretrained, "tokenizer": pretrained, "domains": fields["domains"][:2]}
    )
    driver = in_process(plan)
    forest = run_plan(plan, driver).forest
    original = load_file(source / "model.safetensors")
    buffer = next(name for name in original if "e_score_correction_bias" in name)
    stored = {"kind": "model"}
    for model in driver.ledger.list_artifacts("model"):
        tensors = load_file(driver.ledger.open_file(model, "model.safetensors"))
        torch.testing.assert_close(tensors[buffer], original[buffer])
        stored[model.identity] = str(model.facts["role"])
    assert {forest.foundation.seed, *(expert.identity for expert in forest.experts)} <= stored.keys()
    assert "average" in stored.values()


def test_buffers_that_differ_are_averaged_and_whole_numbers_must_be_the_same(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "other"]
    for n, file in enumerate(files):
        save_file({"bias": torch.full((4,), float(n)), "count": torch.tensor(3)}, file)
    write_average(files, [0.25, 0.75], tmp_path / "average")
    average = load_file(tmp_path / "average")
    torch.testing.assert_close(average["bias"], torch.full((4,), 0.75))
    assert average["count"] == 3
    save_file({"bias": torch.zeros(4), "count": torch.tensor(5)}, files[1])
    with pytest.raises(UserError, match="count: whole numbers that differ"):
        write_average(files, [0.25, 0.75], tmp_path / "average")
