"""The learned gate, token by token: discounted sums, and a network of its own for each sequence.

F features of an expert, H hidden units, R sequences, G discounts, beside the letters of the package.
"""

from dataclasses import dataclass, fields

import torch
from torch.nn import functional

from btm_cluster.equations.gate_features import features_of_sums
from btm_cluster.equations.gates import DISCOUNTS
from btm_cluster.equations.running import State, sums_after


@dataclass(frozen=True)
class RunningNetwork:
    """The numbers of a `LearnedGate`, by the same names."""

    center_F: torch.Tensor
    scale_F: torch.Tensor
    linear_F: torch.Tensor
    inner_FH: torch.Tensor
    inner_H: torch.Tensor
    outer_H: torch.Tensor
    bias_E: torch.Tensor | None
    needs_entropy = needs_all_experts = True
    is_full_posterior = False

    def begin(self, logp_ET: torch.Tensor, entropy_ET: torch.Tensor) -> State:
        discounts_G = torch.tensor(DISCOUNTS, dtype=torch.float64)
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        numbers["bias_E"] = torch.zeros(len(logp_ET)) if self.bias_E is None else self.bias_E
        sums = {
            "discounts": discounts_G,
            "logp": sums_after(logp_ET, discounts_G),
            "entropy": sums_after(entropy_ET, discounts_G),
            "count": sums_after(torch.ones_like(logp_ET[:1]), discounts_G)[:, 0],
        }
        return {name: value.double() for name, value in (numbers | sums).items()}

    def log_weights(self, state: State, entropy_ER: torch.Tensor) -> torch.Tensor:
        features_ERF = features_of_sums(state["logp"], state["entropy"], state["count"], entropy_ER)
        scaled_ERF = (features_ERF - state["center_F"].T) / state["scale_F"].T
        inner_ERH = torch.einsum("erf,fhr->erh", scaled_ERF, state["inner_FH"]) + state["inner_H"].T
        straight_ER = torch.einsum("erf,fr->er", scaled_ERF, state["linear_F"])
        bent_ER = torch.einsum("erh,hr->er", functional.gelu(inner_ERH), state["outer_H"])
        return torch.log_softmax(straight_ER + bent_ER + state["bias_E"], dim=0)

    def advance(self, state: State, logp_ER: torch.Tensor, entropy_ER: torch.Tensor) -> State:
        discounts_GR = state["discounts"]
        return {
            "logp": discounts_GR[:, None] * state["logp"] + logp_ER,
            "entropy": discounts_GR[:, None] * state["entropy"] + entropy_ER,
            "count": discounts_GR * state["count"] + 1,
        }
