"""The ensemble's log-probabilities, and sums of any model's by document."""

import torch

from btm_cluster.equations.posterior import Posterior, log_posterior


def log_mixture(logp_EBT: torch.Tensor, log_prior_E: torch.Tensor, posterior: Posterior) -> torch.Tensor:
    """log p(x_t | x_<t) of the ensemble, a mixture in probability space: [B, T].

    Source: paper, equation 1.
    """
    return torch.logsumexp(log_posterior(logp_EBT, log_prior_E, posterior) + logp_EBT, dim=0)


def document_sums(logp_BT: torch.Tensor, documents_BT: torch.Tensor) -> torch.Tensor:
    """Summed log-probability of each document: [D]. `documents_BT` numbers them, -1 for padding."""
    real_BT = documents_BT >= 0
    owners = documents_BT[real_BT].long()
    count = int(owners.max()) + 1 if len(owners) else 0
    return torch.zeros(count, dtype=torch.float64).index_add_(0, owners, logp_BT[real_BT].double())


def ends_of_documents(documents_BT: torch.Tensor) -> torch.Tensor:
    """Which tokens are a document's last, its end-of-text token: bool [B, T]. The blocks follow each other."""
    documents_N = documents_BT.flatten()
    next_N = torch.cat([documents_N[1:], documents_N.new_tensor([-1])])
    return ((documents_N != next_N) & (documents_N >= 0)).view_as(documents_BT)
