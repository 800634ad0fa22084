"""A gate that is trained: a small network looks at what each expert has shown so
far and gives it a weight for the next token.

The network is the same for every expert, so that a gate fitted on some texts ("one for all") serves other
texts and other forests; a bias for each expert is fitted where a text has development blocks of its own, from
scratch or from a gate for all, and then all weights.

F features of an expert (gate_features.py), H hidden units, N tokens of all blocks, beside the letters of the
package.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from btm_cluster.equations.calibration import minimise
from btm_cluster.equations.gate_features import features, stretches_of_features
from btm_cluster.equations.gates import FIT_TOKENS, take_evenly
from btm_cluster.equations.running import RunningGate
from btm_cluster.equations.running_network import RunningNetwork

HIDDEN = 16
BATCH_TOKENS = 2048
STEPS_BETWEEN_LOOKS = 25
LOOKS = 60
"""Times the held-out loss is looked at, at most: 1,500 steps."""
PATIENCE = 8
"""Looks without a gain after which a fit stops."""
LEARNING_RATE = 0.01
AVERAGING_RATE = 0.05
"""Decay of the running mean of the weights, in which a fit ends: single steps are noisy."""
WEIGHT_DECAY = 0.01
SCALE_RIDGE = 10.0
"""Nats by which a change of all scores by a factor of 1 ± √2 is held against the likelihood of all tokens."""
BIAS_RIDGE = 5.0
"""The same for an expert's bias of √2."""
HELD_OUT_SHARE = 0.2
"""The last share of each text's blocks is held out: mostly other documents,
which every fifth block would not be."""
FEWEST_HELD_OUT_TOKENS = 500
"""Fewer do not say whether it helps to tune all weights."""


@dataclass(frozen=True)
class TextScores:
    """Scores that a gate is fitted on: a text's development blocks under all experts."""

    logp_EBT: torch.Tensor
    entropy_EBT: torch.Tensor
    mask_BT: torch.Tensor

    def without(self, expert: int) -> "TextScores":
        """The same text as a forest without that expert sees it."""
        kept = [j for j in range(len(self.logp_EBT)) if j != expert]
        return TextScores(self.logp_EBT[kept], self.entropy_EBT[kept], self.mask_BT)

    def best_expert(self) -> int:
        """The expert with the highest likelihood: on a domain's own text, that domain's."""
        return int(self.logp_EBT.sum((1, 2)).argmax())


@dataclass(frozen=True)
class LearnedGate:
    """The network's weights and how features are scaled; `bias_E`, where it
    belongs to one text and one forest."""

    center_F: torch.Tensor
    scale_F: torch.Tensor
    linear_F: torch.Tensor
    """From an expert's features straight to its score: several discounts at
    once, and their like for entropies."""
    inner_FH: torch.Tensor
    inner_H: torch.Tensor
    outer_H: torch.Tensor
    bias_E: torch.Tensor | None = None

    def log_weights(self, logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor) -> torch.Tensor:
        """log softmax over experts of their scores: [E, B, T]."""
        everything_BT = torch.ones(logp_EBT.shape[1:], dtype=torch.bool)
        scores_EN = self.scores(features(logp_EBT, entropy_EBT, everything_BT))
        return torch.log_softmax(scores_EN.to(logp_EBT.dtype), dim=0).view_as(logp_EBT)

    def running(self) -> RunningGate:
        """The same weights, token by token."""
        return RunningNetwork(**vars(self))

    def scores(self, features_F: torch.Tensor) -> torch.Tensor:
        """A number for each expert, from features [E, …, F]: [E, …]."""
        scores_E = self.without_bias(self.scaled(features_F))
        if self.bias_E is not None:
            scores_E = scores_E + self.bias_E.view(-1, *[1] * (scores_E.dim() - 1))
        return scores_E

    def scaled(self, features_F: torch.Tensor) -> torch.Tensor:
        """Features as the network takes them: […, F]."""
        return (features_F - self.center_F) / self.scale_F

    def without_bias(self, scaled_F: torch.Tensor) -> torch.Tensor:
        """The network's number for each expert and token, from scaled features […, F]: […]."""
        hidden_H = functional.gelu(scaled_F @ self.inner_FH + self.inner_H)
        return scaled_F @ self.linear_F + hidden_H @ self.outer_H


@dataclass(frozen=True)
class _Examples:
    """Tokens to learn from.

    `logp_NE` is relative to the best expert; absent experts are masked. Features are scaled as the gate that is
    fitted takes them, once for all steps.
    """

    features_NEF: torch.Tensor
    logp_NE: torch.Tensor
    absent_NE: torch.Tensor
    held_out_N: torch.Tensor

    def scaled_for(self, gate: LearnedGate) -> "_Examples":
        """These examples themselves, with their features scaled in place."""
        self.features_NEF.sub_(gate.center_F).div_(gate.scale_F)
        return self

    def loss(self, gate: LearnedGate, rows: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of the mixture on some tokens, above
        that of the best expert at each."""
        scores_NE = gate.without_bias(self.features_NEF.index_select(0, rows))
        if gate.bias_E is not None:
            scores_NE = scores_NE + gate.bias_E
        scores_NE = scores_NE.masked_fill(self.absent_NE.index_select(0, rows), -math.inf)
        return _loss(scores_NE.T.contiguous(), self.logp_NE.index_select(0, rows).T)

    def held_out_loss(self, gate: LearnedGate, rows: torch.Tensor) -> float:
        """The same over many tokens, a batch at a time."""
        batches = torch.split(rows, BATCH_TOKENS)
        return math.fsum(float(self.loss(gate, some)) * len(some) for some in batches) / len(rows)


def _loss(scores_EN: torch.Tensor, logp_EN: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of a mixture whose log-weights are these scores but for a constant.

    Over the first dimension: over a last one of few experts, torch takes twice as long.
    """
    return (torch.logsumexp(scores_EN, dim=0) - torch.logsumexp(scores_EN + logp_EN, dim=0)).mean()


def fit_gate(texts: Sequence[TextScores], fits_bias: bool = False, random_seed: int = 0) -> LearnedGate:
    """Trains a gate on development blocks, by maximum likelihood of the mixture.

    The last fifth of a text's blocks says when to stop; then it is trained as long again on all of them.
    Texts may differ in their experts unless `fits_bias`. The same texts and random seed give the same gate on
    a CPU. Without a token it weighs all alike.
    """
    examples = _examples(texts)
    gate = _fresh(examples, random_seed)
    if fits_bias:
        gate = replace(gate, bias_E=torch.zeros(examples.logp_NE.shape[1]))
    if not len(examples.logp_NE):
        return gate
    return _train(gate, examples.scaled_for(gate), random_seed)


def fit_gate_for_all(texts: Sequence[TextScores], random_seed: int = 0) -> LearnedGate:
    """A gate for texts and forests to come, fitted on the training domains' development text alone.

    Each domain is shown twice: as it is, and as a forest without its best expert sees it, which is how a text
    looks that no expert was trained on.
    """
    unseen = [text.without(text.best_expert()) for text in texts if len(text.logp_EBT) > 2]
    return fit_gate([*texts, *unseen], random_seed=random_seed)


def tune_gate(text: TextScores, start: LearnedGate, random_seed: int = 0) -> LearnedGate:
    """A gate for one text, from one for all: first few numbers of it are fitted,
    then all, for as long as that helps.

    The few, a bias for each expert and a scale of all scores, are held by a ridge and fitted on all blocks.
    The held-out ones then say how long to go on with every weight. They took part in the first fit, which is
    thus hard to beat, and stands where they are few.
    """
    if not text.mask_BT.any():
        return start
    examples = _examples([text]).scaled_for(start)
    gate = _fit_bias_and_scale(start, examples)
    return (
        _train(gate, examples, random_seed) if examples.held_out_N.sum() >= FEWEST_HELD_OUT_TOKENS else gate
    )


def _train(gate: LearnedGate, examples: _Examples, random_seed: int) -> LearnedGate:
    """Trains every weight until the held-out blocks' loss is lowest, and as long again on all blocks."""
    everything = torch.arange(len(examples.logp_NE))
    held_out, rest = everything[examples.held_out_N], everything[~examples.held_out_N]
    looks = 1  # without anything to hold out, a gate moves a little only
    if len(held_out) and len(rest):
        looks = _descend(gate, examples, rest, held_out, LOOKS, random_seed)[1]
    return _descend(gate, examples, everything, None, looks, random_seed)[0]


def _fit_bias_and_scale(start: LearnedGate, examples: _Examples) -> LearnedGate:
    pieces = [start.without_bias(some_NEF).T for some_NEF in torch.split(examples.features_NEF, BATCH_TOKENS)]
    scores_EN, logp_EN = torch.cat(pieces, dim=1), examples.logp_NE.T.contiguous()
    if start.bias_E is not None:
        scores_EN += start.bias_E[:, None]
    scores_EN -= scores_EN.mean(0)
    change = torch.zeros(1, requires_grad=True)
    bias_E = torch.zeros(len(scores_EN), requires_grad=True)

    def loss() -> torch.Tensor:
        held = SCALE_RIDGE * change.pow(2).sum() + BIAS_RIDGE * (bias_E - bias_E.mean()).pow(2).sum()
        return held / 2 / logp_EN.shape[1] + _loss(scores_EN * (1 + change) + bias_E[:, None], logp_EN)

    minimise(loss, [change, bias_E])
    scale = 1 + change.detach()
    return replace(
        start, linear_F=start.linear_F * scale, outer_H=start.outer_H * scale, bias_E=bias_E.detach()
    )


def _examples(texts: Sequence[TextScores]) -> _Examples:
    experts = max(len(text.logp_EBT) for text in texts)
    features_SNEF, parts = [], []
    for text in texts:
        taken_BT = take_evenly(text.mask_BT, FIT_TOKENS // len(texts))
        missing = (0, experts - len(text.logp_EBT))
        features_SNEF += [
            functional.pad(some_ENF.transpose(0, 1), (0, 0, *missing))
            for some_ENF in stretches_of_features(text.logp_EBT, text.entropy_EBT, taken_BT)
        ]
        logp_NE = text.logp_EBT[:, taken_BT].T
        logp_NE = (logp_NE - logp_NE.max(1, keepdim=True).values).float()
        blocks = len(text.mask_BT)
        held_B = torch.arange(blocks) >= blocks - max(1, round(HELD_OUT_SHARE * blocks))
        held_BT = (held_B & (blocks > 1))[:, None].expand_as(taken_BT)
        parts.append(
            (
                functional.pad(logp_NE, missing),
                functional.pad(torch.zeros_like(logp_NE, dtype=torch.bool), missing, value=True),
                held_BT[taken_BT],
            )
        )
    return _Examples(torch.cat(features_SNEF), *(torch.cat(column) for column in zip(*parts, strict=True)))


def _fresh(examples: _Examples, random_seed: int) -> LearnedGate:
    """A gate that weighs all experts alike, whatever it sees."""
    generator = torch.Generator().manual_seed(random_seed)
    seen_NF = examples.features_NEF[~examples.absent_NE]
    count = seen_NF.shape[-1]
    return LearnedGate(
        seen_NF.mean(0) if len(seen_NF) else torch.zeros(count),
        seen_NF.std(0, correction=0).clamp(min=1e-3) if len(seen_NF) else torch.ones(count),
        torch.zeros(count),
        torch.randn(count, HIDDEN, generator=generator) / math.sqrt(count),
        torch.zeros(HIDDEN),
        torch.zeros(HIDDEN),
    )


def _descend(
    gate: LearnedGate,
    examples: _Examples,
    rows: torch.Tensor,
    held_out: torch.Tensor | None,
    looks: int,
    random_seed: int,
) -> tuple[LearnedGate, int]:
    """Adam on batches of tokens.

    The gate at its best look and that look's number; without `held_out`, at the last.
    """
    generator = torch.Generator().manual_seed(random_seed)
    names = [
        name
        for name in ("linear_F", "inner_FH", "inner_H", "outer_H", "bias_E")
        if getattr(gate, name) is not None
    ]
    moving = {name: getattr(gate, name).clone().requires_grad_() for name in names}
    optimizer = torch.optim.AdamW(moving.values(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    mean = {name: tensor.detach().clone() for name, tensor in moving.items()}
    best, best_look = gate, 0
    best_loss = math.inf if held_out is None else examples.held_out_loss(gate, held_out)
    for look in range(1, looks + 1):
        for _ in range(STEPS_BETWEEN_LOOKS):
            drawn = rows[torch.randint(len(rows), (min(BATCH_TOKENS, len(rows)),), generator=generator)]
            optimizer.zero_grad()
            with torch.enable_grad():
                examples.loss(replace(gate, **moving), drawn).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for name, tensor in moving.items():
                mean[name].lerp_(tensor.detach(), AVERAGING_RATE)
        seen = replace(gate, **{name: tensor.clone() for name, tensor in mean.items()})
        loss = -look if held_out is None else examples.held_out_loss(seen, held_out)
        if loss < best_loss:
            best, best_look, best_loss = seen, look, loss
        if look - best_look >= PATIENCE:
            break
    return best, best_look
