"""The optimiser of a training, and its learning rate at each update."""

import torch
from transformers import PreTrainedModel

from btm_cluster.equations.schedule import learning_rate, rewarmed_learning_rate
from btm_cluster.language_model.demix import has_row_per_domain
from btm_cluster.requests import TrainRequest


def build_optimizer(model: PreTrainedModel, request: TrainRequest) -> torch.optim.AdamW:
    """AdamW over all parameters; weight decay on matrices only."""

    def is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
        stacked = request.is_demix and has_row_per_domain(name)
        return parameter.ndim - stacked >= 2

    training = request.training
    parameters = sorted(model.named_parameters())
    groups = [
        {"params": [p for name, p in parameters if is_matrix(name, p)], "weight_decay": training.weight_decay},
        {"params": [p for name, p in parameters if not is_matrix(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=training.betas, eps=training.epsilon, fused=True)


def learning_rate_at(update: int, request: TrainRequest) -> float:
    """Of an update of this request: the seed's line, or a fresh warm-up where the branch has no optimiser to continue."""
    training = request.training
    peak, updates = training.learning_rate, training.updates
    warmup = round(training.warmup_share * updates)
    if request.start is not None and not request.start.keep_optimizer:
        branch = request.first_update
        return rewarmed_learning_rate(update, branch=branch, peak=peak, updates=updates, warmup_updates=warmup)
    return learning_rate(update, peak=peak, updates=updates, warmup_updates=warmup)
