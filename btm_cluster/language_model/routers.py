"""Fits the routers of a mixture of experts on the inputs of every layer's feed-forwards in one dense model, as
it reads development text of the experts' domains.

That model is the one whose attention, embeddings and norms the mixture has. Layers above see what its own
feed-forwards make of a text, not what the mixture's do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from btm_cluster.equations.router import best_sharpness, ridge_router
from btm_cluster.language_model.compute import autocast, device_of
from btm_cluster.language_model.loss import read_after
from btm_cluster.language_model.soup import HELD_OUT_EVERY, Reading
from btm_cluster.requests import Resources

SCORED_TOKENS = 2**15
"""Held-out tokens that scores are kept of, at most, in equal parts of the domains: an accuracy has a standard
error under 0.3 %."""


@dataclass(frozen=True)
class Router:
    """The router of a layer."""

    weights_EH: torch.Tensor
    """Weights as the stock architecture has them: sharpened, float32."""
    sharpness: float
    """The inverse temperature by which the regression was multiplied."""
    accuracy: float
    """Share of held-out tokens whose largest score is their own domain's expert, mean over domains."""


def fit_routers(
    model: PreTrainedModel,
    readings: Sequence[Reading],
    first_token: int,
    how: Resources,
    count: Callable[[int], None] = lambda _: None,
) -> list[Router]:
    """A router for every layer of a dense model, from blocks of each expert's domain.

    Domains weigh alike, however many tokens they have. A fifth of each one's blocks is held out of the
    regressions: on their tokens the sharpness is fitted, and the accuracy taken; on a sample of SCORED_TOKENS
    where there are more, the same in every call. `count` is told of blocks that were read.

    Memory beside the model, in float64: on its device a matrix [width, width] for every layer, and on the host
    SCORED_TOKENS scores for every layer and expert: 0.5 GB for 32 layers and 64 experts.
    """
    model = model.to(device_of(how.gpus_per_worker)).eval()
    parts = [_split(reading) for reading in readings]
    trunk = _Trunk(model, first_token, how, count)
    weights = [ridge_router(*moments) for moments in _moments(trunk, [learning for learning, _ in parts])]
    sampled = [_sample(held_out, SCORED_TOKENS // len(parts)) for _, held_out in parts]
    scores, experts_N, weights_N = _scores(trunk, sampled, weights)
    routers = []
    for weights_EH, of_layer in zip(weights, scores, strict=True):
        scores_NE = torch.cat(of_layer)
        sharpness = best_sharpness(scores_NE, experts_N, weights_N)
        is_right_N = scores_NE.argmax(1) == experts_N
        accuracy = float((weights_N * is_right_N).sum() / weights_N.sum())
        routers.append(Router((sharpness * weights_EH).float().cpu(), sharpness, accuracy))
    return routers


def blocks_to_read(readings: Sequence[Reading]) -> int:
    """How many blocks `fit_routers` reads of these."""
    return sum(len(part) for reading in readings for part in _split(reading))


def _split(reading: Reading) -> tuple[Reading, Reading]:
    """The blocks to learn from, and those held out: the same one where there is only one."""
    places = torch.arange(len(reading))
    held = places % HELD_OUT_EVERY == min(HELD_OUT_EVERY, len(reading)) - 1
    learning = reading.take(places[~held]) if len(reading) > 1 else reading
    return learning, reading.take(places[held])


def _sample(reading: Reading, most: int) -> Reading:
    """The same blocks, with so many of their real tokens at most, drawn by a fixed seed."""
    real_N = reading.mask_BT.flatten().nonzero()[:, 0]
    drawn = real_N[torch.randperm(len(real_N), generator=torch.Generator().manual_seed(0))[:most]]
    mask_BT = torch.zeros(reading.mask_BT.shape, dtype=torch.bool)
    mask_BT.view(-1)[drawn] = True
    return Reading(reading.tokens_BT, mask_BT)


@dataclass(frozen=True)
class _Trunk:
    """The dense model, read layer by layer."""

    model: PreTrainedModel
    first_token: int
    how: Resources
    count: Callable[[int], None]

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The feed-forwards."""
        return [layer.mlp for layer in self.model.base_model.layers]

    @torch.inference_mode()
    def read(self, reading: Reading, look: Callable[[int, torch.Tensor], None]) -> None:
        """Shows what the feed-forward of each layer reads at the real tokens of some blocks: [N, H], a
        micro-batch at a time."""
        device = self.model.device
        for rows in torch.split(torch.arange(len(reading)), self.how.blocks_at_once):
            part = reading.take(rows)
            real_BT = part.mask_BT.to(device)

            def look_at_real(layer: int, hidden_BTH: torch.Tensor, real_BT: torch.Tensor = real_BT) -> None:
                look(layer, hidden_BTH[real_BT])

            tokens_BT = read_after(part.tokens_BT.to(device), self.first_token)
            with _watched(self.layers, look_at_real), autocast(device, self.how.precision):
                self.model.base_model(input_ids=tokens_BT, use_cache=False)
            self.count(len(part))


@contextmanager
def _watched(modules: Sequence[torch.nn.Module], look: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Shows the input of some modules, by their number, as a model is run. `look` computes in the precision of
    its tensors, whatever the model's is."""

    def hook(number: int) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def show(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            with torch.autocast(inputs[0].device.type, enabled=False):
                look(number, inputs[0])

        return show

    handles = [module.register_forward_pre_hook(hook(number)) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(trunk: _Trunk, readings: Sequence[Reading]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gram matrix [H, H] and sums by expert [E, H] of each layer's hidden states, in float64; each domain weighs
    one. Products of a micro-batch are float32."""
    width, device = trunk.model.config.hidden_size, trunk.model.device
    moments = [
        (
            torch.zeros(width, width, dtype=torch.float64, device=device),
            torch.zeros(len(readings), width, dtype=torch.float64, device=device),
        )
        for _ in trunk.layers
    ]
    for expert, reading in enumerate(readings):
        tokens = int(reading.mask_BT.sum())

        def add(layer: int, hidden_NH: torch.Tensor, expert: int = expert, tokens: int = tokens) -> None:
            gram_HH, sums_EH = moments[layer]
            hidden_NH = hidden_NH.float()
            gram_HH += (hidden_NH.T @ hidden_NH).double() / tokens
            sums_EH[expert] += hidden_NH.double().sum(0) / tokens

        trunk.read(reading, add)
    return moments


def _scores(
    trunk: _Trunk, readings: Sequence[Reading], weights: Sequence[torch.Tensor]
) -> tuple[list[list[torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Each layer's scores of all tokens, [N, E] in pieces, their experts [N], and their weights [N]; each domain
    weighs one."""
    found: list[list[torch.Tensor]] = [[] for _ in weights]

    def add(layer: int, hidden_NH: torch.Tensor) -> None:
        found[layer].append((hidden_NH.double() @ weights[layer].T).cpu())

    for reading in readings:
        trunk.read(reading, add)
    sizes = torch.tensor([int(reading.mask_BT.sum()) for reading in readings])
    experts_N = torch.arange(len(readings)).repeat_interleave(sizes)
    return found, experts_N, 1 / sizes[experts_N].double()
