"""Whether a model reads a block of tokens: tried with random ones, without dropout."""

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from btm_cluster.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAUSAL_TOKENS = 8
"""Enough to see whether a model reads from left to right."""
_IMPORT_PRODUCT = 15 * 10**10
"""Parameters times tokens of a model that is imported, which takes seconds: 1,024 tokens of 125M parameters."""
_CHEAP_PRODUCT = 2 * 10**10
"""Parameters times tokens that a CPU multiplies in a fraction of a second."""


def check_reads(model: "PreTrainedModel", block_tokens: int, name: str) -> None:
    """Refuses a model that cannot read a whole block, or whose first tokens see the last one, such as BERT.

    The second would read what it is asked to predict. The block is made up.

    Raises:
        UserError: naming the model.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tokens_1T = random_block(vocabulary, block_tokens)
    changed_1T = tokens_1T.clone()
    changed_1T[0, -1] = (changed_1T[0, -1] + 1) % vocabulary
    one, other = (logits_of(model, ids_1T, name)[0, :-1] for ids_1T in (tokens_1T, changed_1T))
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-5):
        raise UserError(
            f"{name} is no causal language model",
            found="predictions that depend on later tokens",
            expected="a model that reads from left to right",
            remedy="give a decoder, such as gpt2 or llama",
        )


def check_reads_if_small(config: PretrainedConfig, block_tokens: int, name: str) -> None:
    """`check_reads` with made-up weights, where that takes no second.

    A larger model is checked once its weights are there.
    """
    with torch.device("meta"):
        parameters = sum(
            p.numel() for p in AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters()
        )
    if parameters * block_tokens <= _CHEAP_PRODUCT:
        check_reads(AutoModelForCausalLM.from_config(config, trust_remote_code=False), block_tokens, name)


def imported_block_tokens(model: "PreTrainedModel", block_tokens: int) -> int:
    """How many of a block's tokens a model reads on a CPU in seconds: all of them, but for a large model.

    What a configuration says of the longest block is checked by `check_fits`, without reading any.
    """
    parameters: int = sum(parameter.numel() for parameter in model.parameters())
    return min(block_tokens, max(CAUSAL_TOKENS, _IMPORT_PRODUCT // parameters))


def random_block(vocabulary: int, block_tokens: int) -> torch.Tensor:
    """A block of tokens drawn at random, always the same: int64 [1, block_tokens]."""
    return torch.randint(vocabulary, (1, block_tokens), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits_of(model: "PreTrainedModel", tokens_1T: torch.Tensor, name: str) -> torch.Tensor:
    """A model's logits for a block, without dropout: [1, T, V].

    Raises:
        UserError: it cannot read a block of this length, or its logits are not finite.
    """
    was_training = model.training
    try:
        logits: torch.Tensor = model.eval()(input_ids=tokens_1T, use_cache=False).logits
    except Exception as exc:  # whatever an architecture fails on
        raise UserError(
            f"{name} cannot read a block",
            found=f"a block of {tokens_1T.shape[1]} tokens: {one_line(exc)}",
            expected="a model that reads training.block_tokens tokens at once",
            remedy="shorten the blocks or lengthen what the model can read, in its configuration",
        ) from exc
    finally:
        model.train(was_training)
    if logits.device.type != "meta" and not logits.isfinite().all():
        raise UserError(
            f"{name} predicts values that are not finite",
            found="NaN or infinite logits",
            expected="finite weights, and numbers that float32 holds",
            remedy="take another checkpoint: a half-precision overflow or a broken merge leaves such weights",
        )
    return logits
