"""Gates computed token by token: for each sequence a state of fixed size, advanced by
what each expert said of its newest token.

A state holds a gate's own numbers beside its sums, so that sequences of one batch may have other priors and
weights. It is a mapping of names to tensors whose last dimension is the sequence. Steps are pure, run on any
device, and ask the host nothing.

R sequences, G discounts, W tokens of a window, beside the letters of the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from btm_cluster.equations.posterior import Posterior, discounted_sums

State: TypeAlias = Mapping[str, torch.Tensor]


class RunningGate(Protocol):
    """A gate with its numbers. Only `begin` reads them: the other two take all they need from the state."""

    needs_entropy: bool
    """Whether it looks at the entropy of predictions."""
    needs_all_experts: bool
    """Whether an expert's weight depends on more of the others than that weights sum to one."""

    @property
    def is_full_posterior(self) -> bool:
        """Whether its weights are p(D=j | x_<t) by Bayes' rule: one expert, drawn
        once, then writes as the mixture does."""

    def begin(self, logp_ET: torch.Tensor, entropy_ET: torch.Tensor) -> State:
        """The state after a text: float64, without the dimension of sequences."""

    def log_weights(self, state: State, entropy_ER: torch.Tensor) -> torch.Tensor:
        """The normalised log-weights for the next token, of whose predictions
        the entropies are given: [E, R]."""

    def advance(self, state: State, logp_ER: torch.Tensor, entropy_ER: torch.Tensor) -> State:
        """New values of the state once the next token is seen; the entropies are of its prediction."""


@dataclass(frozen=True)
class RunningSums:
    """log w_j(t) = b_j + Σ_i β_i Σ_{u<t} γ_i^(t-1-u) log p_j(x_u|x_<u), normalised."""

    log_prior_E: torch.Tensor
    discounts_G: torch.Tensor
    weights_G: torch.Tensor
    needs_entropy = needs_all_experts = False

    @property
    def is_full_posterior(self) -> bool:
        return self.discounts_G.tolist() == [1.0] and self.weights_G.tolist() == [1.0]

    def begin(self, logp_ET: torch.Tensor, entropy_ET: torch.Tensor) -> State:  # noqa: ARG002
        sums_GE = sums_after(logp_ET, self.discounts_G)
        return {
            "prior": self.log_prior_E,
            "discounts": self.discounts_G,
            "weights": self.weights_G,
            "sums": sums_GE,
        }

    def log_weights(self, state: State, entropy_ER: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        evidence_ER = (state["weights"][:, None] * state["sums"]).sum(0)
        return torch.log_softmax(state["prior"] + evidence_ER, dim=0)

    def advance(self, state: State, logp_ER: torch.Tensor, entropy_ER: torch.Tensor) -> State:  # noqa: ARG002
        return {"sums": state["discounts"][:, None] * state["sums"] + logp_ER}


@dataclass(frozen=True)
class RunningWindow:
    """log w_j(t) = b_j + β Σ of the last W tokens' log p_j, normalised.

    The window is summed anew: no rounding adds up.
    """

    log_prior_E: torch.Tensor
    window_tokens: int
    weight: float
    needs_entropy = needs_all_experts = False
    is_full_posterior = False

    def begin(self, logp_ET: torch.Tensor, entropy_ET: torch.Tensor) -> State:  # noqa: ARG002
        recent_WE = logp_ET.new_zeros(self.window_tokens, len(logp_ET))
        last_TE = logp_ET.T[-self.window_tokens :]
        recent_WE[self.window_tokens - len(last_TE) :] = last_TE
        return {"prior": self.log_prior_E, "weight": logp_ET.new_tensor(self.weight), "recent": recent_WE}

    def log_weights(self, state: State, entropy_ER: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return torch.log_softmax(state["prior"] + state["weight"] * state["recent"].sum(0), dim=0)

    def advance(self, state: State, logp_ER: torch.Tensor, entropy_ER: torch.Tensor) -> State:  # noqa: ARG002
        return {"recent": torch.cat([state["recent"][1:], logp_ER[None]])}


@dataclass(frozen=True)
class RunningFixedShare:
    """The forward recursion of `FixedShare`, one token at a time."""

    log_prior_E: torch.Tensor
    log_stay: float
    log_switch: float
    temperature: float
    needs_entropy = needs_all_experts = False

    @property
    def is_full_posterior(self) -> bool:
        return self.log_stay == 0 and self.temperature == 1

    def begin(self, logp_ET: torch.Tensor, entropy_ET: torch.Tensor) -> State:
        numbers = {
            name: logp_ET.new_tensor(getattr(self, name))
            for name in ("log_stay", "log_switch", "temperature")
        }
        state = {"prior": self.log_prior_E, "now": torch.log_softmax(self.log_prior_E, dim=0), **numbers}
        of_one = {name: value[..., None] for name, value in state.items()}
        for t in range(logp_ET.shape[1]):
            of_one |= self.advance(of_one, logp_ET[:, t, None], entropy_ET[:, t, None])
        return {name: value[..., 0] for name, value in of_one.items()}

    def log_weights(self, state: State, entropy_ER: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return torch.log_softmax(state["now"], dim=0)

    def advance(self, state: State, logp_ER: torch.Tensor, entropy_ER: torch.Tensor) -> State:  # noqa: ARG002
        seen_ER = torch.log_softmax(state["now"] + logp_ER / state["temperature"], dim=0)
        return {"now": torch.logaddexp(state["log_stay"] + seen_ER, state["log_switch"] + state["prior"])}


def running_posterior(log_prior_E: torch.Tensor, posterior: Posterior) -> RunningGate:
    """A posterior with its prior, token by token."""
    log_prior_E = log_prior_E.double()
    if posterior.kind == "window":
        return RunningWindow(log_prior_E, posterior.window_tokens, posterior.weight)
    discount = {"full": 1.0, "last-token": 0.0, "calibrated": posterior.discount}[posterior.kind]
    numbers = (torch.tensor([number], dtype=torch.float64) for number in (discount, posterior.weight))
    return RunningSums(log_prior_E, *numbers)


def sums_after(values_ET: torch.Tensor, discounts_G: torch.Tensor) -> torch.Tensor:
    """Σ_u γ^(T-1-u) of the values, for each γ: [G, E]."""
    behind_ET = torch.cat([values_ET, values_ET.new_zeros(len(values_ET), 1)], dim=1)
    return discounted_sums(behind_ET[:, None], discounts_G.tolist())[:, :, 0, -1]
