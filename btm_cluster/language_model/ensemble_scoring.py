"""Log-probabilities of texts' tokens under experts and their ensemble, in padded passes.

The mixture is weighed by the same functions as everywhere in evaluation. A pass asks the host nothing until
all experts have read it, so that a GPU computes while the host launches the next expert.

B texts of one pass, N their tokens one after the other, K alternatives, beside the letters of the package.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from btm_cluster.equations.gates import Gate
from btm_cluster.language_model.compute import free_memory
from btm_cluster.language_model.engine_opening import EngineSettings
from btm_cluster.language_model.row_cache import READ_AT_ONCE
from btm_cluster.language_model.scoring import LOGITS_AT_ONCE, said_of

MOST_PADDING = {"cuda": 4096, "cpu": 256}
"""Tokens of padding in a pass: about what one more pass would cost.

On a GPU that is the time to launch its kernels.
"""
MOST_LOGIT_BYTES = {"cuda": 2**33, "cpu": 2**29}
"""Bytes of all experts' logits for one pass, where the mixture's likeliest tokens are wanted;
at most a quarter of a GPU's free memory."""


@dataclass(frozen=True)
class TextScores:
    """Scores of one text, on the host."""

    logp_ET: torch.Tensor
    """log p_j of each token: float64, of float32 values."""
    log_weights_ET: torch.Tensor
    """log p(D=j | x_<t): float64."""
    log_weights_after_E: torch.Tensor
    """The same once the whole text is read."""
    logp_T: torch.Tensor
    """log p of each token under the mixture: float64."""
    alternatives_TK: torch.Tensor
    """At each token, the mixture's likeliest ones, the likeliest first: int64.

    None are given unless they are asked for.
    """
    alternative_logp_TK: torch.Tensor
    """Their log-probabilities under the mixture: float32."""


@dataclass(frozen=True)
class _Weighed:
    """A pass under a gate, on the host: float64, padded to T tokens."""

    logp_EBT: torch.Tensor
    log_weights_EBT: torch.Tensor
    """One place more than tokens: those after the last one too."""
    logp_BT: torch.Tensor


class EnsembleScorer:
    """Models on one device, read without a cache."""

    def __init__(
        self, models: Sequence[PreTrainedModel], settings: EngineSettings, vocabulary: int, anew: bool
    ) -> None:
        """With `anew`, every pass is a block long, for models whose predictions depend on that."""
        self._models, self._settings, self._vocabulary, self._anew = models, settings, vocabulary, anew
        self._device = models[0].device

    def score(self, texts: Sequence[Sequence[int]], gate: Gate, alternatives: int) -> list[TextScores]:
        """The longest first, in as few passes as there is room for."""
        at_once = min(READ_AT_ONCE, self._tokens_mixed_at_once()) if alternatives else READ_AT_ONCE
        lengths = [self._length(len(text)) for text in texts]
        found: dict[int, TextScores] = {}
        for taken in passes(lengths, at_once, MOST_PADDING[self._device.type]):
            scores = self._score([texts[i] for i in taken], lengths[taken[0]], gate, alternatives)
            found |= dict(zip(taken, scores, strict=True))
        return [found[i] for i in range(len(texts))]

    def _length(self, tokens: int) -> int:
        """Tokens read of a text: the tokenizer's first token and the text, its last
        token too where a block has a place for it."""
        block_tokens = self._settings.block_tokens
        return block_tokens if self._anew else min(tokens + 1, block_tokens)

    def _tokens_mixed_at_once(self) -> int:
        room = MOST_LOGIT_BYTES[self._device.type]
        if self._device.type == "cuda":
            room = min(room, free_memory(self._device) // 4)
        return int(room // (len(self._models) * self._vocabulary * self._models[0].dtype.itemsize))

    def _score(
        self, texts: Sequence[Sequence[int]], length: int, gate: Gate, alternatives: int
    ) -> Iterator[TextScores]:
        targets_BT = torch.tensor([[*text, *[0] * (length - len(text))][:length] for text in texts]).to(
            self._device
        )
        read_BT = torch.cat(
            [torch.full_like(targets_BT[:, :1], self._settings.first_token), targets_BT[:, :-1]], dim=1
        )
        said: list[tuple[torch.Tensor, torch.Tensor]] = []
        kept: list[torch.Tensor] = []
        for model in self._models:
            logits_NV = model(input_ids=read_BT, use_cache=False).logits.flatten(0, 1)
            said.append(said_of(logits_NV, targets_BT.flatten()))
            if alternatives:
                kept.append(logits_NV)
        said_EBT = (torch.stack(values).view(-1, *targets_BT.shape) for values in zip(*said, strict=True))
        weighed = _weigh(gate, *(values_EBT.double().cpu() for values_EBT in said_EBT))
        is_token_BT = torch.arange(length) < torch.tensor([[len(text)] for text in texts])
        likeliest = self._likeliest(kept, weighed.log_weights_EBT[..., :-1], is_token_BT, alternatives)
        counts = [len(text) for text in texts]
        by_text = zip(*(torch.split(values_NK, counts) for values_NK in likeliest), strict=True)
        return (_scores_of(weighed, b, counts[b], *values) for b, values in enumerate(by_text))

    def _likeliest(
        self,
        logits: Sequence[torch.Tensor],
        log_weights_EBT: torch.Tensor,
        is_token_BT: torch.Tensor,
        count: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixture's likeliest tokens at each real token, and their
        log-probabilities: [N, K], on the host."""
        places_N = is_token_BT.flatten().nonzero()[:, 0]
        drawable = min(self._settings.vocabulary, self._vocabulary)
        count = min(count, drawable)
        if not count or not len(places_N):
            return places_N.new_zeros(len(places_N), count), torch.zeros(len(places_N), count)
        log_weights_EN = log_weights_EBT.flatten(1)[:, places_N].float().to(self._device)
        places_N = places_N.to(self._device)
        at_once = max(1, LOGITS_AT_ONCE[self._device.type] // (len(logits) * self._vocabulary))
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, len(places_N), at_once):
            part = slice(start, start + at_once)
            logp_ENV = torch.log_softmax(
                torch.stack([one_NV[places_N[part]] for one_NV in logits]).float(), dim=-1
            )
            mixed_NV = torch.logsumexp(logp_ENV + log_weights_EN[:, part, None], dim=0)
            best = mixed_NV[:, :drawable].topk(count, dim=1)
            found.append((best.indices, best.values))
        tokens_NK, logp_NK = (torch.cat(values).cpu() for values in zip(*found, strict=True))
        return tokens_NK, logp_NK


def passes(lengths: Sequence[int], at_once: int, most_padding: int) -> list[list[int]]:
    """Texts of which lengths are read together, by number, the longest first.

    A pass holds at most `at_once` tokens, padding included, or one text, and no more padding than
    `most_padding`.
    """
    found: list[list[int]] = []
    padding = 0
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if found:
            longest = lengths[found[-1][0]]
            padding += longest - lengths[number]
            if (len(found[-1]) + 1) * longest <= at_once and padding <= most_padding:
                found[-1].append(number)
                continue
        found.append([number])
        padding = 0
    return found


def _weigh(gate: Gate, logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor) -> _Weighed:
    """Weights for every token of a pass and after the last.

    No weight depends on what comes later, padding neither.

    Of a text that fills its block, the entropy of the prediction after it is not known, and the last known
    stands for it.
    """
    nothing_EB1 = torch.zeros_like(logp_EBT[..., :1])
    log_weights_EBT = gate.log_weights(
        torch.cat([logp_EBT, nothing_EB1], dim=2), torch.cat([entropy_EBT, entropy_EBT[..., -1:]], dim=2)
    )
    return _Weighed(logp_EBT, log_weights_EBT, torch.logsumexp(log_weights_EBT[..., :-1] + logp_EBT, dim=0))


def _scores_of(
    weighed: _Weighed, b: int, count: int, tokens_TK: torch.Tensor, logp_TK: torch.Tensor
) -> TextScores:
    """One text's own part of a pass."""
    return TextScores(
        weighed.logp_EBT[:, b, :count],
        weighed.log_weights_EBT[:, b, :count],
        weighed.log_weights_EBT[:, b, count],
        weighed.logp_BT[b, :count],
        tokens_TK,
        logp_TK,
    )
