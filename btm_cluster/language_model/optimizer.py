"""The optimiser of a training, and its learning rate at each update."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from btm_cluster.equations.schedule import learning_rate, rewarmed_learning_rate
from btm_cluster.language_model.demix import has_row_per_domain
from btm_cluster.language_model.layers import layers_of
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.plan import ALL, TrainingPlan, Trains

MOMENTUM = 0.95
"""Muon's, with Nesterov's step.

Source: Jordan et al., 2024, Muon: An optimizer for hidden layers in neural networks.
"""
_ADAMS, _MUONS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)


class TrainingOptimizer:
    """AdamW over all that is trained; or Muon over the matrices of the layers, and AdamW over the rest.

    Torch's Muon takes single matrices. So of a stack of them, as a DEMix has one, it gets each by itself.
    """

    def __init__(
        self,
        adamw: torch.optim.AdamW,
        muon: torch.optim.Muon | None = None,
        by_muon: Mapping[torch.nn.Parameter, Sequence[torch.nn.Parameter]] | None = None,
    ) -> None:
        """`by_muon` has the matrices that Muon knows of each parameter: itself, or those of a stack."""
        self._adamw, self._muon, self._by_muon = adamw, muon, by_muon or {}

    def step(self, learning_rate: float) -> None:
        """Takes a step by the gradients, and drops them."""
        for stack, matrices in self._stacks():
            for number, matrix in enumerate(matrices):
                matrix.data = stack.data[number]
                matrix.grad = None if stack.grad is None else stack.grad[number]
        for optimizer in (self._adamw, *((self._muon,) if self._muon is not None else ())):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forgets the gradients."""
        self._adamw.zero_grad(set_to_none=True)
        if self._muon is not None:
            self._muon.zero_grad(set_to_none=True)
        for stack, _ in self._stacks():
            stack.grad = None

    def _stacks(self) -> Iterator[tuple[torch.nn.Parameter, Sequence[torch.nn.Parameter]]]:
        return ((parameter, matrices) for parameter, matrices in self._by_muon.items() if parameter.ndim > 2)

    def moments_of(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        """The names of the moments that are kept of a parameter."""
        return _MUONS if parameter in self._by_muon else _ADAMS

    def counts_steps(self, parameter: torch.nn.Parameter) -> bool:
        """Whether a parameter's moments come with a number of steps: AdamW's do."""
        return parameter not in self._by_muon

    def state_of(self, parameter: torch.nn.Parameter) -> Mapping[str, torch.Tensor]:
        """Moments and `step` of a parameter; empty before the first step."""
        if self._muon is None or parameter not in self._by_muon:
            state: Mapping[str, torch.Tensor] = self._adamw.state.get(parameter, {})
            return state
        states: list[dict[str, torch.Tensor]] = [
            self._muon.state.get(matrix, {}) for matrix in self._by_muon[parameter]
        ]
        if parameter.ndim == 2 or not all(states):
            return states[0]
        return {name: torch.stack([one[name] for one in states]) for name in states[0]}

    def set_state(
        self, parameter: torch.nn.Parameter, moments: Mapping[str, torch.Tensor], step: torch.Tensor | None
    ) -> None:
        """Gives a parameter its moments, held as it is, and the number of steps that AdamW has made."""
        if self._muon is not None and parameter in self._by_muon:
            for number, matrix in enumerate(self._by_muon[parameter]):
                own = moments if matrix is parameter else {n: stack[number] for n, stack in moments.items()}
                self._muon.state[matrix] = dict(own)
            return
        assert step is not None, "AdamW's moments come with their number of steps"
        # The fused kernel counts where the parameter is.
        self._adamw.state[parameter] = {"step": step.clone().to(parameter.device), **moments}


def build_optimizer(
    model: PreTrainedModel, training: TrainingPlan, is_demix: bool = False, trains: Trains = ALL
) -> TrainingOptimizer:
    """The optimiser of all parameters that are trained; weight decay on matrices only.

    The factors of an adapter are AdamW's, whatever the plan says: Muon's step is made for whole matrices.
    """

    def dimensions(name: str, parameter: torch.nn.Parameter) -> int:
        return parameter.ndim - (is_demix and has_row_per_domain(name))

    parameters = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    in_layers = (
        set(hidden_parameters(model)) if training.optimizer == "muon" and trains.lora is None else set()
    )
    hidden = {p for name, p in parameters if p in in_layers and dimensions(name, p) == 2}
    by_adam = [(name, p) for name, p in parameters if p not in hidden]
    groups = [
        {
            "params": [p for name, p in by_adam if dimensions(name, p) >= 2],
            "weight_decay": training.weight_decay,
        },
        {"params": [p for name, p in by_adam if dimensions(name, p) < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=training.betas, eps=training.epsilon, fused=True)
    by_muon = {p: _matrices(p) for _, p in parameters if p in hidden}
    muon = _muon([matrix for of in by_muon.values() for matrix in of], training) if by_muon else None
    return TrainingOptimizer(adamw, muon, by_muon)


def _matrices(parameter: torch.nn.Parameter) -> list[torch.nn.Parameter]:
    """A matrix, or the matrices of a stack, in its memory."""
    if parameter.ndim == 2:
        return [parameter]
    return [torch.nn.Parameter(matrix) for matrix in parameter.detach()]


def _muon(parameters: list[torch.nn.Parameter], training: TrainingPlan) -> torch.optim.Muon:
    """Muon with steps as large as AdamW's, so that learning rate and weight decay mean the same for both.

    Source: Liu et al., 2025, Muon is scalable for LLM training, section 2.2.
    """
    return torch.optim.Muon(
        parameters,
        lr=0.0,
        weight_decay=training.weight_decay,
        momentum=MOMENTUM,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )


def hidden_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The trained parameters of a model's layers, without embeddings and output matrix."""
    return [p for layer in layers_of(model) for p in layer.parameters() if p.requires_grad]


def learning_rate_at(update: int, spec: TrainingSpec) -> float:
    """Learning rate of an update: on the seed's line, or on a new warm-up where the optimiser starts anew."""
    training = spec.training
    peak, updates = training.learning_rate, training.updates
    warmup = round(training.warmup_share * updates)
    if spec.rewarms:
        branch = spec.first_update
        return rewarmed_learning_rate(
            update, branch=branch, peak=peak, updates=updates, warmup_updates=warmup
        )
    return learning_rate(update, peak=peak, updates=updates, warmup_updates=warmup)
