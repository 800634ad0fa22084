"""How tokens are drawn: settings of one sequence, and the draw for several
sequences at once, on their device.

Each sequence has one uniform number per token, of a stream of its own, and every token of the vocabulary gets
Gumbel noise made of that number: the largest log-probability with its noise is drawn. So a draw depends on
nothing else in the batch, but for rounding, which matters where the two largest sums are equal but for it.

R sequences, V tokens of the vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch

from btm_cluster.errors import UserError

_LARGEST_UNIFORM = 1 - 2.0**-40
"""Times a sum of probabilities, it stays below that sum in float64."""
_GOLDEN_GAMMA = -0x61C8864680B583EB
_MIXED = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1))
"""SplitMix64: its step, and shifts and factors of its output."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: by its probability, flattened or sharpened by
    `temperature`, among the likeliest."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Among the likeliest tokens that together reach this probability."""
    random_seed: int = 0
    top_k: int | None = None
    """Among so many of the likeliest tokens."""
    repetition_penalty: float = 1.0
    """Factor on the log-probability of every token that the text has already: above 1 they are avoided. A
    mixture has no logits, on which transformers takes it."""

    @property
    def filters(self) -> bool:
        """Whether anything but the temperature changes the probabilities."""
        return self.top_p < 1 or self.top_k is not None or self.repetition_penalty != 1

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn by their probabilities as they are."""
        return self.temperature == 1 and not self.filters


def uniforms(random_seed: int, sample: int, count: int) -> np.ndarray:
    """The numbers of one sequence: float64 [count], from 0 up to 1.

    Another seed or sample, another stream.
    """
    key = np.array([random_seed % 2**64, sample], dtype=np.uint64)
    drawn = np.random.Generator(np.random.Philox(key=key)).random(count)
    return np.clip(drawn, 0, _LARGEST_UNIFORM, out=drawn)


def draw(log_probs_RV: torch.Tensor, uniform_R: torch.Tensor, temperature_R: torch.Tensor) -> torch.Tensor:
    """One token of each sequence: int64 [R].

    Log-probabilities need not be normalised; -inf is never drawn. Temperature 0 takes the likeliest.

    Source: Maddison et al., A* Sampling, 2014 (the Gumbel-max trick).
    """
    noise_RV = _gumbel(uniform_R, log_probs_RV.shape[1])
    return (log_probs_RV.double() + temperature_R.double()[:, None] * noise_RV).argmax(-1)


def _gumbel(uniform_R: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of the standard Gumbel distribution, each made of its sequence's number
    and its place alone: float64 [R, count].

    Source: Steele et al., Fast Splittable Pseudorandom Number Generators, 2014.
    """
    steps_V = torch.arange(1, 1 + count, device=uniform_R.device) * _GOLDEN_GAMMA
    bits_RV = (uniform_R * 2.0**53).long()[:, None] + steps_V
    for shift, factor in _MIXED:
        bits_RV = (bits_RV ^ (bits_RV >> shift & (1 << 64 - shift) - 1)) * factor
    between_0_and_1_RV = ((bits_RV >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52
    return -(-between_0_and_1_RV.log()).log()


def penalise(log_probs_RV: torch.Tensor, seen_RV: torch.Tensor, penalty_R: torch.Tensor) -> torch.Tensor:
    """Multiplies the log-probabilities of tokens seen before: [R, V].

    Source: Keskar et al., CTRL, 2019, on log-probabilities.
    """
    return torch.where(seen_RV, log_probs_RV * penalty_R[:, None], log_probs_RV)


def keep_likeliest(
    log_probs_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor, temperature_R: torch.Tensor
) -> torch.Tensor:
    """The log-probabilities, -inf outside the `top_k` likeliest and, of these, the
    likeliest that reach `top_p`: [R, V].

    Shares are taken at the temperature, in transformers' order: temperature, top-k, top-p.
    """
    sorted_RV, order_RV = log_probs_RV.sort(dim=-1, descending=True)
    rank_V = torch.arange(sorted_RV.shape[1], device=sorted_RV.device)
    is_kept_RV = rank_V < top_k_R[:, None]
    scaled_RV = sorted_RV / temperature_R.masked_fill(temperature_R == 0, 1)[:, None]
    share_RV = torch.softmax(scaled_RV.masked_fill(~is_kept_RV, -torch.inf), dim=-1)
    before_RV = share_RV.cumsum(-1) - share_RV
    # Rounding may reach 1 too early, and takes a tiny `top_p` or temperature for 0.
    is_kept_RV &= (before_RV < top_p_R[:, None]) | (top_p_R[:, None] == 1) | (rank_V == 0)
    is_kept_RV = torch.zeros_like(is_kept_RV).scatter(1, order_RV, is_kept_RV)
    return log_probs_RV.masked_fill(~is_kept_RV, -torch.inf)


def check_sampling(sampling: Sampling) -> None:
    """Refuses settings by which nothing can be drawn.

    Raises:
        UserError: saying which.
    """
    if not 0 <= sampling.temperature < float("inf"):
        raise UserError(
            "temperature is out of range", found=f"{sampling.temperature:g}", expected="at least 0"
        )
    if not 0 < sampling.top_p <= 1:
        raise UserError("top-p is out of range", found=f"{sampling.top_p:g}", expected="above 0, at most 1")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise UserError("top-k is too small", found=str(sampling.top_k), expected="at least 1")
    if not 0 < sampling.repetition_penalty < float("inf"):
        found = f"{sampling.repetition_penalty:g}"
        raise UserError("the repetition penalty is out of range", found=found, expected="above 0; 1 for none")
