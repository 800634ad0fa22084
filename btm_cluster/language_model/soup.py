"""Averages whose weights are fitted: models of one architecture, their weighted sum,
and the search for the weights.

A posterior says how well each expert predicts a text by itself, which need not be how much of it an average
should hold. Here the averaged model's own loss on development blocks decides. All models are held on one
device, next to one more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from btm_cluster.equations.averaging import greedy_weights, posterior_weights, uniform_weights
from btm_cluster.language_model.compute import autocast, device_of
from btm_cluster.language_model.loss import read_after
from btm_cluster.language_model.model import weights_of
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import names_in_order
from btm_cluster.requests import Resources

BATCH_BLOCKS = 16
STEPS_BETWEEN_LOOKS = 5
LOOKS = 20
"""Times the held-out loss is looked at from each start, at most: 100 steps."""
PATIENCE = 4
"""Looks without a gain after which a start is given up."""
LEARNING_RATE = 0.1
"""Learning rate of the weights' logits, under Adam."""
SMOOTHING = 0.1
"""Share of the uniform average in where a search sets out: at a weight of
zero, softmax has no slope to climb."""
HELD_OUT_EVERY = 5
"""Every fifth block is held out to choose among starts and to say when to stop."""


@dataclass(frozen=True)
class Reading:
    """Blocks as a model is judged on them: tokens [B, T], and where they are predicted."""

    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor

    def take(self, rows: torch.Tensor) -> "Reading":
        return Reading(self.tokens_BT[rows], self.mask_BT[rows])

    def __len__(self) -> int:
        return len(self.tokens_BT)


@dataclass(frozen=True)
class SearchedWeights:
    """The weights that a search found, in the order of the models; they sum to one, rounded
    so that an average's name can depend on them."""

    weights: list[float]
    loss: float
    """Nats per token of the average, on the blocks that decided: all for
    greedy, the held-out ones for learned."""


class Soup:
    """Several models, and the one whose parameters are any weighted sum of theirs."""

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Sequence[StoredWeights],
        first_token: int,
        how: Resources,
        count: Callable[[], None] = lambda: None,
    ) -> None:
        """`model` has the architecture of all; its own weights are written over. `count` is called for each
        average that is tried."""
        self._how, self._first_token, self._count = how, first_token, count
        self._device = device_of(how.gpus_per_worker)
        self._model = model.to(self._device).eval()
        self._parts = [
            {n: part.read(n, self._device).to(torch.float32) for n in names_in_order(part.header)}
            for part in parts
        ]

    def __len__(self) -> int:
        return len(self._parts)

    def loss(self, weights: Sequence[float], reading: Reading) -> float:
        """Nats per token of the average with these weights."""
        self._mix(weights)
        with torch.inference_mode():
            return sum(float(self._summed(part)) for part in self._parts_of(reading)) / int(
                reading.mask_BT.sum()
            )

    def gradient(self, weights: Sequence[float], reading: Reading) -> torch.Tensor:
        """d loss / d w_j = ⟨d loss / d θ, θ_j⟩ at the average: float64 [E]."""
        self._mix(weights)
        self._model.zero_grad()
        with torch.enable_grad():
            for part in self._parts_of(reading):
                self._summed(part).backward()  # type: ignore[no-untyped-call]
        slopes = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        tokens = int(reading.mask_BT.sum())
        # Read from the device once: a thousand small reads would take longer than the pass.
        products = [
            torch.stack([torch.sum(g * part[name]) for name, g in slopes.items()]) for part in self._parts
        ]
        return torch.stack(products).double().sum(1).cpu() / tokens

    def _mix(self, weights: Sequence[float]) -> None:
        self._count()
        with torch.no_grad():
            for name, parameter in weights_of(self._model).items():
                if not parameter.is_floating_point():
                    continue  # the same in all, or they could not be averaged
                parameter.zero_()
                for part, weight in zip(self._parts, weights, strict=True):
                    if weight:
                        parameter.add_(part[name], alpha=weight)

    def _parts_of(self, reading: Reading) -> list[Reading]:
        return [
            reading.take(rows) for rows in torch.split(torch.arange(len(reading)), self._how.blocks_at_once)
        ]

    def _summed(self, reading: Reading) -> torch.Tensor:
        """Summed negative log-probability of the predicted tokens.

        Softmax in float32 whatever the arithmetic before it.
        """
        tokens_BT = reading.tokens_BT.to(self._device)
        with autocast(self._device, self._how.precision):
            logits = self._model(input_ids=read_after(tokens_BT, self._first_token), use_cache=False).logits
        real_N = reading.mask_BT.to(self._device).flatten()
        return functional.cross_entropy(
            logits.flatten(0, 1)[real_N].float(), tokens_BT.flatten()[real_N], reduction="sum"
        )


def greedy_soup(soup: Soup, reading: Reading) -> SearchedWeights:
    """Experts by their own loss, best first; each is kept where the uniform average
    of those kept gets better with it."""
    weights, loss = greedy_weights(lambda weights: soup.loss(weights, reading), len(soup))
    return SearchedWeights(posterior_weights(torch.tensor(weights, dtype=torch.float64)), loss)


def learned_soup(
    soup: Soup, reading: Reading, starts: Sequence[Sequence[float]] = (), random_seed: int = 0
) -> SearchedWeights:
    """Weights by descent on the loss of the averaged model, from the best expert,
    the uniform average, and given starts.

    A fifth of the blocks is held out: the weights with the lowest loss there win, those of the starts among
    them.
    """
    places = torch.arange(len(reading))
    held = places % HELD_OUT_EVERY == min(HELD_OUT_EVERY, len(reading)) - 1
    held_out = reading.take(places[held])
    learning = reading.take(places[~held]) if len(reading) > 1 else reading
    experts = len(soup)
    one_hot = [[float(i == j) for i in range(experts)] for j in range(experts)]
    best_expert = min(one_hot, key=lambda weights: soup.loss(weights, reading))
    found = [
        _descend(soup, learning, held_out, start, random_seed)
        for start in (best_expert, uniform_weights(experts), *starts)
    ]
    return min(found, key=lambda one: one.loss)


def softmax_slope(slope_E: torch.Tensor, weights_E: torch.Tensor) -> torch.Tensor:
    """The gradient with regard to logits whose softmax the weights are, from
    that with regard to the weights: [E]."""
    return weights_E * (slope_E - (weights_E * slope_E).sum())


def _descend(
    soup: Soup, learning: Reading, held_out: Reading, start: Sequence[float], random_seed: int
) -> SearchedWeights:
    """The best of a start and of what Adam passes from there."""
    generator = torch.Generator().manual_seed(random_seed)
    best = SearchedWeights(list(start), soup.loss(start, held_out))
    start_E = torch.tensor(start, dtype=torch.float64)
    logits_E = ((1 - SMOOTHING) * start_E / start_E.sum() + SMOOTHING / len(start)).log().requires_grad_()
    optimizer = torch.optim.Adam([logits_E], LEARNING_RATE)
    best_look = 0
    for look in range(1, LOOKS + 1):
        for _ in range(STEPS_BETWEEN_LOOKS):
            drawn = torch.randperm(len(learning), generator=generator)[:BATCH_BLOCKS]
            weights_E = torch.softmax(logits_E.detach(), dim=0)
            logits_E.grad = softmax_slope(soup.gradient(weights_E.tolist(), learning.take(drawn)), weights_E)
            optimizer.step()
        weights = posterior_weights(torch.softmax(logits_E.detach(), dim=0))
        loss = soup.loss(weights, held_out)
        if loss < best.loss:
            best, best_look = SearchedWeights(weights, loss), look
        if look - best_look >= PATIENCE or not math.isfinite(loss):
            break
    return best
