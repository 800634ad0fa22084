"""Which kernel computes attention: what can be seen without a GPU."""

from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch.compiler import config as compiler
from transformers import AutoConfig, AutoModelForCausalLM

from btm_cluster.language_model.attention_kernels import cudnn_first, kernels_for, plain_shape
from btm_cluster.language_model.model import fresh_on_meta

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"model_type": "gpt2", **SMALL}, (4, 4, 8, 16)),
        ({"model_type": "llama", **LLAMA}, (4, 2, 8, 16)),
        ({"model_type": "llama", **LLAMA, "head_dim": 16}, (4, 2, 16, 16)),
        ({"model_type": "mistral", **LLAMA, "sliding_window": 17}, (4, 2, 8, 16)),
        ({"model_type": "mistral", **LLAMA, "sliding_window": 16}, None),
        ({"model_type": "qwen2", **LLAMA, "sliding_window": 8, "use_sliding_window": False}, (4, 2, 8, 16)),
        ({"model_type": "gemma2", **LLAMA, "head_dim": 8, "attn_logit_softcapping": 50.0}, None),
    ],
)
def test_attention_is_plain_where_no_window_cuts_a_block(
    config: dict[str, Any], shape: tuple[int, ...] | None
) -> None:
    found = plain_shape(fresh_on_meta(config), block_tokens=16)
    assert (None if found is None else astuple(found)) == shape


def test_a_preferred_kernel_changes_no_value_and_is_preferred_no_longer_afterwards() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SMALL)).eval()
    tokens, before = torch.arange(16)[None], torch._C._get_sdp_priority_order()
    expected = model(input_ids=tokens).logits
    with cudnn_first():
        assert torch._C._get_sdp_priority_order() != before
        assert compiler.cache_key_tag == "cudnn-first", "code compiled by other kernels is not taken"
        assert torch.equal(model(input_ids=tokens).logits, expected)
    assert torch._C._get_sdp_priority_order() == before
    assert not compiler.cache_key_tag
    chosen = kernels_for(model, 16, "bfloat16", torch.device("cpu"))
    with chosen():
        assert torch._C._get_sdp_priority_order() == before
