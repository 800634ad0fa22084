"""Scores of blocks under one model, each block on its own: the log-probability of
every token, and the entropy of its prediction."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from btm_cluster.data.blocks import Blocks
from btm_cluster.errors import DivergedError
from btm_cluster.language_model.activations import quicken_gelu
from btm_cluster.language_model.attention_kernels import Kernels, kernels_for
from btm_cluster.language_model.compute import autocast, device_of, free_memory
from btm_cluster.language_model.head import pieces_of, plain_head, run_with
from btm_cluster.language_model.layers import compile_layers
from btm_cluster.language_model.loss import read_after
from btm_cluster.language_model.on_host import OnHost
from btm_cluster.language_model.training_size import size_of
from btm_cluster.requests import Resources

LOGITS_AT_ONCE = {"cuda": 2**26, "cpu": 2**20}
"""Logits in float32 held at once beside the model's own, twice: 0.5 GB on a GPU. On a CPU, pieces that malloc
keeps for the next: 73 ms instead of 106 for 16 blocks of 128 tokens and a vocabulary of 2,048 (once, on 29
November 2026, one core)."""

TOKENS_AT_ONCE = 2**15
"""Most tokens of one forward pass on a GPU, which are enough to keep it busy."""

WORTH_COMPILING = 10**14
"""Tokens times parameters from which passes are compiled on a GPU: about a million tokens of a model of 124M
parameters, which take about two seconds uncompiled, as long as a layer that was compiled before takes to be found."""

MOST_COMPUTED = 1.25
"""Most blocks that compiled passes compute for each that is scored: where texts are of very different lengths, those
that fill short ones up cost more than compiling gains. An assumption, not measured."""

MODELS_LOGITS_AT_ONCE = {"cuda": 2**31, "cpu": 2**28}
"""Logits of one forward pass, 8.6 GB in float32 on a GPU: fewer blocks are taken together then. Of one block that
has more, the head is applied a few tokens at a time."""


def set_up_scoring(how: Resources) -> None:
    """Sets this process's threads and arithmetic, whatever it has done before: on a CPU the same scores in any process.

    On a GPU they differ by rounding: a pass has as many blocks as fit the memory that is free, and whether passes are
    compiled depends on the texts that are scored together.
    """
    torch.set_float32_matmul_precision("highest")
    if not how.gpus_per_worker:
        torch.set_num_threads(how.cpus_per_worker)


def score_blocks(
    model: PreTrainedModel,
    blocks: Blocks,
    first_token: int,
    how: Resources,
    folder: Path,
    count: Callable[[int], None] = lambda _: None,
) -> dict[str, Path]:
    """As `ScorePasses.write`, of one text."""
    return ScorePasses(model, how, blocks.block_tokens, [len(blocks)]).write(
        blocks, first_token, folder, count
    )


class ScorePasses:
    """The forward passes by which one model scores texts, on its device.

    On a GPU the next pass is computed while the scores of one are copied and written. Where there is enough to score,
    they are compiled, all of them of one shape.
    """

    def __init__(
        self, model: PreTrainedModel, how: Resources, block_tokens: int, texts: Sequence[int]
    ) -> None:
        """For texts of so many blocks each."""
        self._device = device_of(how.gpus_per_worker)
        self._model, self._how = model.to(self._device).eval(), how
        fitting = MODELS_LOGITS_AT_ONCE[self._device.type] // (block_tokens * _vocabulary(model))
        self._head = None if fitting else plain_head(model)
        most = max(1, min(fitting, _blocks_by_memory(model, how, block_tokens)))
        even = _blocks_of_even_passes(texts, most)
        self.is_compiled = self._head is None and _is_worth_compiling(model, how, block_tokens, texts, even)
        self.at_once = even if self.is_compiled else most
        self._kernels: Kernels = nullcontext
        if self.is_compiled:
            quicken_gelu(model)
            compile_layers(model)
            self._kernels = kernels_for(model, block_tokens, how.precision, self._device)

    def write(
        self,
        blocks: Blocks,
        first_token: int,
        folder: Path,
        count: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Path]:
        """Writes log p(x_t | x_<t) of every token, and the entropy in nats of p(· | x_<t), as float32
        [blocks, tokens] files.

        The log-softmax is taken in float32 whatever the arithmetic of the forward pass. `count` is told how many
        blocks were scored. Returns the files below `folder` by name.

        Raises:
            DivergedError: the model gives log-probabilities that are not finite.
        """
        files = {name: folder / name for name in ("logp.npy", "entropy.npy")}
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(blocks), blocks.block_tokens)}
        total = 0.0
        with ExitStack() as stack:  # not memory maps: on a full disk, writing to one kills the process
            opened = [stack.enter_context(file.open("wb")) for file in files.values()]
            for out in opened:
                np.lib.format.write_array_header_1_0(out, header)
            for scored_2BT in self._scored(blocks, first_token):
                for out, values_BT in zip(opened, scored_2BT, strict=True):
                    out.write(values_BT.astype("<f4", copy=False).tobytes())
                total += float(scored_2BT[0].sum(dtype=np.float64))
                count(scored_2BT.shape[1])
        if not math.isfinite(total):
            raise DivergedError(
                "the model gives log-probabilities that are not finite",
                found=f"a sum of {total} over {len(blocks)} blocks",
                remedy="its training diverged: lower training.learning_rate or gradient_clip",
            )
        return files

    def _scored(self, blocks: Blocks, first_token: int) -> Iterator[np.ndarray]:
        """Scores of a pass after the other, float32 [2, B, T]; each is handed out once the next one is under way."""
        under_way: OnHost | None = None
        for start in range(0, len(blocks), self.at_once):
            rows = np.arange(start, min(start + self.at_once, len(blocks)))
            begun = OnHost(self._pass(torch.from_numpy(blocks.take(rows)), first_token)[:, : len(rows)])
            if under_way is not None:
                yield under_way.read().numpy()
            under_way = begun
        if under_way is not None:
            yield under_way.read().numpy()

    def _pass(self, blocks_BT: torch.Tensor, first_token: int) -> torch.Tensor:
        """Scores of blocks [2, B, T]; compiled, of as many as fill a pass."""
        if self.is_compiled:
            lacking = self.at_once - len(blocks_BT)
            blocks_BT = torch.cat([blocks_BT, blocks_BT[:1].expand(lacking, -1)])
        if self._device.type == "cuda":
            blocks_BT = blocks_BT.pin_memory().to(self._device, non_blocking=True)
        said = fused_said() if self.is_compiled else said_of
        with self._kernels():
            return torch.stack(score_tokens(self._model, blocks_BT, first_token, self._how, self._head, said))


def _vocabulary(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _blocks_by_memory(model: PreTrainedModel, how: Resources, block_tokens: int) -> int:
    """Blocks of a pass: on a CPU those of a training, on a GPU as many as keep it busy and fit its free memory, of
    which half is taken: others may be there."""
    if not how.gpus_per_worker:
        return how.blocks_at_once
    whole = torch.cuda.mem_get_info()[1]
    usable = 0.5 * min(free_memory(torch.device("cuda")), how.gpus_per_worker * whole)
    value = 2 if how.precision == "bfloat16" else 4
    size = size_of(model)
    layer = 4 * (4 * size.width + size.queries + 2 * size.keys) + 3 * value * size.inner
    layer += 2 * 4 * size.eager_heads * block_tokens  # scores before and after the softmax
    by_memory = int(usable / (value * size.vocabulary + layer))
    return min(by_memory, TOKENS_AT_ONCE) // block_tokens


def _blocks_of_even_passes(texts: Sequence[int], most: int) -> int:
    """Blocks of a pass, at most so many, by which the longest text is cut into the fewest passes of one shape."""
    longest = max([1, *texts])
    return math.ceil(longest / math.ceil(longest / most))


def _is_worth_compiling(
    model: PreTrainedModel, how: Resources, block_tokens: int, texts: Sequence[int], at_once: int
) -> bool:
    """Whether there is enough to score, and little to fill up in passes of `at_once` blocks."""
    parameters, blocks = sum(parameter.numel() for parameter in model.parameters()), sum(texts)
    computed = sum(math.ceil(text / at_once) for text in texts) * at_once
    is_enough = blocks * block_tokens * parameters >= WORTH_COMPILING
    return bool(how.gpus_per_worker) and how.compile and is_enough and computed <= MOST_COMPUTED * blocks


@torch.inference_mode()
def score_tokens(
    model: PreTrainedModel,
    blocks_BT: torch.Tensor,
    first_token: int,
    how: Resources,
    head: torch.nn.Linear | None = None,
    said: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(x_t | x_<t) of each token of blocks [B, T], and the entropy of the
    prediction it was: both float32 [B, T].

    With the model's plain `head`, that is applied a few tokens at a time. `said` is `said_of`, or the same fused.
    """
    read_BT, tokens_N = read_after(blocks_BT, first_token), blocks_BT.flatten()
    with autocast(device_of(how.gpus_per_worker), how.precision):
        if head is None:
            logits = model(input_ids=read_BT, use_cache=False).logits
        else:
            said_N2 = run_with(model, head, read_BT, lambda hidden: _said_in_pieces(hidden, head, tokens_N))
    logp_N, entropy_N = (said or said_of)(logits.flatten(0, 1), tokens_N) if head is None else said_N2.T
    return logp_N.view_as(blocks_BT), entropy_N.view_as(blocks_BT)


def said_of(logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each token under its logits, and the entropy of the
    prediction it was: both float32 [N]."""
    logp_N, entropy_N = (torch.empty(len(tokens_N), device=logits_NV.device) for _ in range(2))
    at_once = max(1, LOGITS_AT_ONCE[logits_NV.device.type] // logits_NV.shape[-1])
    for start in range(0, len(tokens_N), at_once):
        part = slice(start, start + at_once)
        logp_NV = torch.log_softmax(logits_NV[part].float(), dim=-1)
        logp_N[part] = logp_NV.gather(1, tokens_N[part, None])[:, 0]
        entropy_N[part] = _entropy(logp_NV)
    return logp_N, entropy_N


@cache
def fused_said() -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """`said_of` in one compiled kernel, which holds no logits in float32 beside the model's own."""
    compiled: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    compiled = torch.compile(_said_of_all, dynamic=False)
    return compiled


def _said_of_all(logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With x the logits less their largest and Z = Σ exp(x): log p = x - log Z, and the entropy is log Z - Σ x exp(x) / Z.
    The logits are read twice, and one exponential is taken of each."""
    largest_N1 = logits_NV.amax(dim=-1, keepdim=True).float()
    x_NV = logits_NV.float() - largest_N1
    exp_NV = x_NV.exp()
    sum_N = exp_NV.sum(dim=-1)
    # The clamp makes a token that a model rules out add 0.
    mean_N = (exp_NV * x_NV.clamp(min=torch.finfo(x_NV.dtype).min)).sum(dim=-1) / sum_N
    said_N = logits_NV.gather(1, tokens_N[:, None]).float() - largest_N1
    return said_N[:, 0] - sum_N.log(), sum_N.log() - mean_N


def _said_in_pieces(hidden_BTD: torch.Tensor, head: torch.nn.Linear, tokens_N: torch.Tensor) -> torch.Tensor:
    """As `said_of`, of the head's logits for hidden states: float32 [N, 2]."""
    hidden_ND = hidden_BTD.flatten(0, 1)
    said = [
        torch.stack(
            said_of(functional.linear(hidden_ND[piece], head.weight, head.bias), tokens_N[piece]), dim=1
        )
        for piece in pieces_of(hidden_ND, head)
    ]
    return torch.cat(said)


def _entropy(logp_NV: torch.Tensor) -> torch.Tensor:
    """Entropies in nats: [N]. A product of rows is faster than `entr`; the clamp makes a token that a model
    rules out add 0, and asks a GPU nothing."""
    entropy_N: torch.Tensor = -torch.linalg.vecdot(
        logp_NV.exp(), logp_NV.clamp(min=torch.finfo(logp_NV.dtype).min)
    )
    return entropy_N
