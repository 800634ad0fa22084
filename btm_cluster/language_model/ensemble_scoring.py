"""What experts and their ensemble say of texts: log-probabilities of every token, in padded batches.

The mixture is weighed by the same functions as everywhere in evaluation. B texts of one pass, K alternatives, beside the
letters of the package.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from btm_cluster.equations.gates import Gate
from btm_cluster.language_model.engine_opening import EngineSettings
from btm_cluster.language_model.prompts import check_ids, check_length
from btm_cluster.language_model.row_cache import READ_AT_ONCE
from btm_cluster.language_model.scoring import said_of

MIXED_AT_ONCE = 2**27
"""Logits of all experts held at once, where the mixture's likeliest tokens are wanted: 0.5 GB in float32, a few times over."""


@dataclass(frozen=True)
class TextScores:
    """Of one text, on the host."""

    logp_ET: torch.Tensor
    """log p_j of each token: float64, of float32 values."""
    log_weights_ET: torch.Tensor
    """log p(D=j | x_<t): float64."""
    log_weights_after_E: torch.Tensor
    """The same once the whole text is read."""
    logp_T: torch.Tensor
    """log p of each token under the mixture: float64."""
    alternatives: Sequence[Sequence[tuple[int, float]]] = ()
    """At each token, the mixture's likeliest ones with their log-probabilities, the likeliest first."""


class EnsembleScorer:
    """Models on one device, read without a cache."""

    def __init__(
        self, models: Sequence[PreTrainedModel], settings: EngineSettings, vocabulary: int, anew: bool
    ) -> None:
        """With `anew`, every pass is a block long, for models whose predictions depend on that."""
        self._models, self._settings, self._vocabulary, self._anew = models, settings, vocabulary, anew

    def score(self, texts: Sequence[Sequence[int]], gate: Gate, alternatives: int) -> list[TextScores]:
        """The longest first, in as few passes as there is room for.

        Raises:
            UserError: a text longer than a block, or with unknown token ids.
        """
        for text in texts:
            check_length(text, self._settings.block_tokens, self._settings.block_tokens)
            check_ids(text, self._vocabulary)
        at_once = READ_AT_ONCE
        if alternatives:
            at_once = min(at_once, MIXED_AT_ONCE // (len(self._models) * self._vocabulary))
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found: dict[int, TextScores] = {}
        while order:
            count = max(1, at_once // self._length(len(texts[order[0]])))
            taken, order = order[:count], order[count:]
            found |= dict(zip(taken, self._score([texts[i] for i in taken], gate, alternatives), strict=True))
        return [found[i] for i in range(len(texts))]

    def _length(self, tokens: int) -> int:
        """What is read of a text: the tokenizer's first token and the text, its last token too where a block has a place for it."""
        block_tokens = self._settings.block_tokens
        return block_tokens if self._anew else min(tokens + 1, block_tokens)

    def _score(self, texts: Sequence[Sequence[int]], gate: Gate, alternatives: int) -> list[TextScores]:
        length, device = self._length(len(texts[0])), self._models[0].device
        targets_BT = torch.tensor([[*text, *[0] * (length - len(text))][:length] for text in texts]).to(device)
        read_BT = torch.cat([torch.full_like(targets_BT[:, :1], self._settings.first_token), targets_BT[:, :-1]], dim=1)
        said: list[tuple[torch.Tensor, torch.Tensor]] = []
        kept: list[torch.Tensor] = []
        for model in self._models:
            logits_BTV = model(input_ids=read_BT, use_cache=False).logits
            said.append(said_of(logits_BTV.flatten(0, 1), targets_BT.flatten()))
            if alternatives:
                kept.append(logits_BTV)
        logp_EBT, entropy_EBT = (
            torch.stack(values).view(-1, *targets_BT.shape).double().cpu() for values in zip(*said, strict=True)
        )
        found = [_weigh(gate, logp_EBT[:, b], entropy_EBT[:, b], len(text)) for b, text in enumerate(texts)]
        if not alternatives:
            return found
        return [self._with_alternatives(one, b, kept, alternatives) for b, one in enumerate(found)]

    def _with_alternatives(
        self, scores: TextScores, b: int, logits: Sequence[torch.Tensor], alternatives: int
    ) -> TextScores:
        count = len(scores.logp_T)
        logits_ETV = torch.stack([logits_BTV[b, :count] for logits_BTV in logits])
        log_weights_ET = scores.log_weights_ET.float().to(logits_ETV.device)
        mixed_TV = torch.logsumexp(torch.log_softmax(logits_ETV.float(), -1) + log_weights_ET[..., None], dim=0)
        drawable = min(self._settings.vocabulary, self._vocabulary)
        likeliest = mixed_TV[:, :drawable].topk(min(alternatives, drawable), dim=1)
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        return replace(scores, alternatives=[list(zip(ids, logps, strict=True)) for ids, logps in pairs])


def _weigh(gate: Gate, logp_ET: torch.Tensor, entropy_ET: torch.Tensor, count: int) -> TextScores:
    """Weights for each of a text's tokens and after them. Of a text that fills its block, the entropy of the prediction after it
    is not known, and the last known stands for it."""
    logp_ET = logp_ET[:, :count]
    places = [min(t, entropy_ET.shape[1] - 1) for t in range(count + 1)]
    behind_EBT = torch.cat([logp_ET, torch.zeros_like(entropy_ET[:, :1])], dim=1)[:, None]
    log_weights_ET = gate.log_weights(behind_EBT, entropy_ET[:, places][:, None])[:, 0]
    before_ET, after_E = log_weights_ET[:, :-1], log_weights_ET[:, -1]
    return TextScores(logp_ET, before_ET, after_E, torch.logsumexp(before_ET + logp_ET, dim=0))
