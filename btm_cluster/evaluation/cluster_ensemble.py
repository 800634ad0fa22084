"""The ensemble that weighs experts by a context's distance to their clusters: one more row of an evaluation.

A token's weights follow from the text before it in its block, the same that the posterior sees; nothing is
fitted. The text is embedded after 8, 16, 32, … tokens, each embedding serving until the next: c-BTM embeds it
anew for every token.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from btm_cluster.data.blocks import Blocks
from btm_cluster.data.tokenizer import TOKENIZER_FILES, TextTokenizer, load_tokenizer
from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.equations.clusters import cluster_log_weights, log_weighted_mixture
from btm_cluster.errors import UserError
from btm_cluster.evaluation.rows import CLUSTER_ENSEMBLE
from btm_cluster.evaluation.scoring import stack_of
from btm_cluster.evaluation.verdict import SplitResult
from btm_cluster.forest import Forest
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.mixing.scores import ScoreStack
from btm_cluster.plan import Plan

if TYPE_CHECKING:
    from btm_cluster.data.clusters import Clusters

FIRST_CONTEXT_TOKENS = 8


def check_clusters(plan: Plan, domains: Sequence[str]) -> None:
    """Refuses a plan whose cluster model has no cluster for one of the domains.

    Raises:
        UserError: naming them.
    """
    if plan.merging.clusters is None:
        return
    from btm_cluster.data.clusters import cluster_names

    names = cluster_names(Path(plan.merging.clusters))
    missing = [domain for domain in domains if domain not in names]
    if missing:
        raise UserError(
            f"`merging.clusters` has no cluster for {', '.join(missing)}",
            found=f"clusters {', '.join(names)} in {plan.merging.clusters}",
            expected="a cluster by the name of every domain",
            remedy="name clusters in its clusters.json as the domains; where a domain has none, leave "
            "`merging.clusters` out",
        )


def with_cluster_ensemble(
    results: tuple[SplitResult, ...], prepared: PreparedPlan, forest: Forest, ledger: Ledger
) -> tuple[SplitResult, ...]:
    """The results, with the cluster ensemble's beside them if the plan names a cluster model."""
    merging = prepared.plan.merging
    if merging.clusters is None:
        return results
    check_clusters(prepared.plan, forest.domains)
    from btm_cluster.data.clusters import load_clusters

    clusters = load_clusters(Path(merging.clusters))
    experts = [clusters.names.index(domain) for domain in forest.domains]
    models = [Ref("model", expert.identity) for expert in forest.experts]
    stored = ledger.get(prepared.tokenizer)
    files = {name: ledger.open_file(stored, name) for name in TOKENIZER_FILES}
    tokenizer = load_tokenizer(files, stored.facts.get("first_token"))
    texts = {text.name: text for text in prepared.texts}

    def with_row(result: SplitResult) -> SplitResult:
        refs = texts[result.text].tokens[result.split]
        blocks = Blocks([ledger.open_file(ledger.get(ref), "tokens.npy") for ref in refs])
        stack = stack_of(ledger, models, texts[result.text], result.split)
        logp_UD = cluster_sums(stack, blocks, clusters, experts, tokenizer, merging.cluster_temperature)
        return replace(result, logp={**result.logp, CLUSTER_ENSEMBLE: logp_UD})

    return tuple(map(with_row, results))


def cluster_sums(
    stack: ScoreStack,
    blocks: Blocks,
    clusters: "Clusters",
    experts: Sequence[int],
    tokenizer: TextTokenizer,
    temperature: float,
) -> torch.Tensor:
    """The ensemble's summed log-probability by document: [U, D].

    `experts` are the clusters of the stack's models, in order.
    """

    def mixture(logp_EBT: torch.Tensor, start: int) -> torch.Tensor:
        tokens_BT = blocks.take(np.arange(start, start + logp_EBT.shape[1]))
        log_weight_EBT = context_log_weights(tokens_BT, clusters, experts, tokenizer, temperature)
        return log_weighted_mixture(logp_EBT, log_weight_EBT)[None]

    return stack.by_document(mixture)[0]


def context_log_weights(
    tokens_BT: np.ndarray,
    clusters: "Clusters",
    experts: Sequence[int],
    tokenizer: TextTokenizer,
    temperature: float,
) -> torch.Tensor:
    """log p(D=j | x_<t) by distance for every token: [E, B, T].

    Uniform before the first context is embedded.
    """
    blocks, block_tokens = tokens_BT.shape
    log_weight_EBT = torch.zeros(len(experts), blocks, block_tokens, dtype=torch.float64)
    log_weight_EBT -= float(np.log(len(experts)))
    seen = FIRST_CONTEXT_TOKENS
    while seen < block_tokens:
        contexts = [_text_of(ids, tokenizer) for ids in tokens_BT[:, :seen].tolist()]
        squared_EB = clusters.squared_distances(contexts)[experts]
        log_weight_EBT[:, :, seen : 2 * seen] = cluster_log_weights(squared_EB, temperature)[:, :, None]
        seen *= 2
    return log_weight_EBT


def _text_of(ids: Sequence[int], tokenizer: TextTokenizer) -> str:
    """The documents of these tokens, a line each, without the tokens that begin and end them."""
    around = (tokenizer.first_token, tokenizer.end_of_text)
    documents = [list(run) for is_around, run in groupby(ids, around.__contains__) if not is_around]
    return "\n".join(map(tokenizer.decode, documents))
