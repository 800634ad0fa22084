"""The optimiser of a training, and its learning rate at each update."""

import torch
from transformers import PreTrainedModel

from btm_cluster.equations.schedule import learning_rate, rewarmed_learning_rate
from btm_cluster.language_model.demix import has_row_per_domain
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.plan import TrainingPlan


def build_optimizer(
    model: PreTrainedModel, training: TrainingPlan, is_demix: bool = False
) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained; weight decay on matrices only."""

    def is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
        stacked = is_demix and has_row_per_domain(name)
        return parameter.ndim - stacked >= 2

    parameters = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    groups = [
        {
            "params": [p for name, p in parameters if is_matrix(name, p)],
            "weight_decay": training.weight_decay,
        },
        {"params": [p for name, p in parameters if not is_matrix(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=training.betas, eps=training.epsilon, fused=True)


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
