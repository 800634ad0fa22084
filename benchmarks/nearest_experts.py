"""Perplexities of new texts under their nearest experts alone, beside those under all experts.

    python benchmarks/nearest_experts.py PLAN.yaml            after `btm run PLAN.yaml`
    python benchmarks/nearest_experts.py PLAN.yaml --blocks 2 4 8 --json nearest.json

For each target, and each number k of experts: the perplexity on its test text of the calibrated ensemble of its k
nearest experts, fitted on the development blocks that a plan takes, beside that of all. Nearest is

- clusters: by the distance between mean embeddings of text (TF-IDF and truncated SVD, as `btm discover` has it) of the
  target's development blocks and of each domain's training blocks. It takes no expert;
- n blocks: by the likelihood of the target's first n development blocks, which all experts have to score.

Prints each way's loss, the mean over targets and the largest. Trains nothing; scores that are not in the store are
made.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from btm_cluster.equations.mixture import log_mixture
from btm_cluster.equations.perplexity import TOKENS, perplexity
from btm_cluster.ledger import Ref
from btm_cluster.mixing.fitting import fit_mixing
from btm_cluster.plan import MergingPlan, Plan, read_plan
from btm_cluster.session import driving, opened_view

if TYPE_CHECKING:
    from btm_cluster.algorithm import Grown
    from btm_cluster.driver.driver import Driver
    from btm_cluster.driver.prepared_plan import PreparedText
    from btm_cluster.ledger import Ledger

CLUSTERS = "clusters"
EMBEDDED_BLOCKS = 400
"""Training blocks of each domain that are embedded, at most."""


@dataclass(frozen=True)
class Found:
    """A target's perplexities."""

    target: str
    nearest: Mapping[str, Sequence[str]]
    """Domains of the experts by way, the nearest first."""
    of_all: float
    of_nearest: Mapping[str, Mapping[int, float]]
    """By way, and by the number of experts."""

    def loss(self, way: str, count: int) -> float:
        return self.of_nearest[way][count] / self.of_all - 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--in-process", action="store_true", help="without Ray")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    plan = read_plan(asked.plan)
    with opened_view() as view, driving(view, plan, None, asked.in_process, command="nearest") as driver:
        found = measure(plan, asked.blocks, driver)
    print("\n".join(table(found)))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")


def measure(plan: Plan, first_blocks: Sequence[int], driver: "Driver") -> list[Found]:
    """The perplexities of every target, under the forest that stands in the plan's store."""
    from btm_cluster.algorithm import grow
    from btm_cluster.evaluation.scoring import score_models

    grown = grow(plan, driver)
    models = {Ref("model", expert.identity): expert.domain for expert in grown.forest.experts}
    targets = [text for text in grown.prepared.texts if text.is_target]
    score_models(grown.prepared, models, targets, driver)
    distances = _distances(grown, targets, driver.ledger)
    return [
        _found(text, models, distances[text.name], first_blocks, plan.merging, driver.ledger)
        for text in targets
    ]


def _found(
    text: "PreparedText",
    models: Mapping[Ref, str],
    distance_E: torch.Tensor,
    first_blocks: Sequence[int],
    merging: MergingPlan,
    ledger: "Ledger",
) -> Found:
    from btm_cluster.evaluation.scoring import stack_of

    refs, domains = list(models), list(models.values())
    logp_EBT, mask_BT = stack_of(ledger, refs, text, "development").take(0, merging.development_blocks)
    orders = {CLUSTERS: distance_E.argsort()}
    for count in first_blocks:
        likelihood_E = (logp_EBT[:, :count] * mask_BT[:count]).sum((1, 2))
        orders[f"{count} blocks"] = likelihood_E.argsort(descending=True)
    test = stack_of(ledger, refs, text, "test")
    tokens = test.sizes()[TOKENS].sum()

    def perplexity_of(chosen_K: torch.Tensor) -> float:
        mixing = fit_mixing("calibrated", "fitted", logp_EBT[chosen_K], mask_BT, merging)

        def mixture(logp_EBT: torch.Tensor, _: int) -> torch.Tensor:
            return log_mixture(logp_EBT[chosen_K], mixing.log_prior_E, mixing.posterior)[None]

        return float(perplexity(test.by_document(mixture)[0, TOKENS].sum(), tokens))

    counts = _counts(len(refs))
    return Found(
        text.name,
        {way: [domains[i] for i in order_E.tolist()] for way, order_E in orders.items()},
        perplexity_of(torch.arange(len(refs))),
        {
            way: {k: perplexity_of(order_E[:k].sort().values) for k in counts}
            for way, order_E in orders.items()
        },
    )


def _counts(experts: int) -> list[int]:
    """Powers of two, and what lies between the last two of them: fewer than all experts."""
    powers = [2**n for n in range(experts.bit_length()) if 2**n < experts]
    return sorted({*powers, 3 * experts // 4} - {0, experts})


def _distances(
    grown: "Grown", targets: Sequence["PreparedText"], ledger: "Ledger"
) -> dict[str, torch.Tensor]:
    """Each target's squared distances to the domains of the forest's experts, in their order."""
    from btm_cluster.data.clusters import find_clusters
    from btm_cluster.requests import TrainingText
    from btm_cluster.steps.stored import open_blocks, open_held_out, open_tokenizer

    prepared = grown.prepared
    tokenizer = open_tokenizer(ledger, prepared.tokenizer)
    by_name = {domain.name: domain for domain in prepared.domains}

    def trained(domain: "PreparedText") -> list[str]:
        blocks = open_blocks(ledger, TrainingText(domain.identity, domain.tokens["train"])).blocks
        return [
            tokenizer.decode(row)
            for row in blocks.take(np.arange(min(len(blocks), EMBEDDED_BLOCKS))).tolist()
        ]

    def held_out(target: "PreparedText") -> list[str]:
        most = prepared.plan.merging.development_blocks
        tokens_BT, mask_BT = open_held_out(ledger, target.tokens["development"], most)
        return [tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens_BT, mask_BT, strict=True)]

    texts = [trained(by_name[name]) for name in grown.forest.domains]
    clusters = find_clusters([block for blocks in texts for block in blocks], len(texts), random_seed=0)
    centres_EF = torch.stack([clusters.embed(blocks).mean(0) for blocks in texts])
    points = {target.name: clusters.embed(held_out(target)).mean(0) for target in targets}
    return {name: (centres_EF - point_F).square().sum(1) for name, point_F in points.items()}


def table(found: Sequence[Found]) -> list[str]:
    """The losses as Markdown."""
    ways = list(found[0].of_nearest)
    lines = [f"| experts | {' | '.join(ways)} |", "|---" * (1 + len(ways)) + "|"]
    for count in found[0].of_nearest[CLUSTERS]:
        cells = []
        for way in ways:
            losses = [one.loss(way, count) for one in found]
            cells.append(f"{np.mean(losses):+.2%} (at most {max(losses):+.2%})")
        lines.append(f"| {count} of {len(found[0].nearest[CLUSTERS])} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
