"""A data mixture from a forest: are the learned soup's weights good sampling proportions for a target?

    python benchmarks/mixture_from_forest.py CORPUS --domains legal reddit --targets contracts tweets --to results
    python benchmarks/mixture_from_forest.py --toy --in-process --to results    a toy size, on CPU, in some minutes

Grows a forest. Then, for each target, goes on with the seed's training to the end of the plan's updates, as the
Transformer-LM does, on mixtures of the training domains:

- learned soup: by the weights of the experts in the target's learned soup, without the seed's;
- posterior: by the target's cached prior, the running mean of posteriors that the paper has (`ema`);
- fitted prior: by the prior of largest likelihood, which takes no search;
- largest alone: the one domain with the largest weight in the learned soup;
- uniform: the same of each domain, which is what the Transformer-LM does.

All take equally many blocks per update, those of the Transformer-LM, and differ in nothing else. Weights are
fitted on the target's development text, and models are scored on its test text, beside the seed, the
Transformer-LM of the plan and the learned soup itself. Intervals of 95 % are over documents: they do not say how
much another random seed would change.

An update takes a fixed number of blocks of each domain: the nearest to the proportions by largest remainder, in
at most 64 parts. A domain with several parts stands in the training's texts as often, each time in an order of
its own. So the train loop stays as it is, and a block may come twice before others have come once.

CORPUS has a folder for each text in CORPUS/train_domains and CORPUS/eval_domains, with files train.*, valid.* and
test.*. Where CORPUS is not there, this says so and measures nothing. Killed and run again, it goes on where it was.
"""

import argparse
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from corpus_plan import MODEL_SIZES, texts, toy_texts
from data_mixtures import (
    FITTED,
    LARGEST,
    LEARNED,
    POSTERIOR,
    SEED,
    SOUP,
    UNIFORM,
    mixture_request,
    mixtures,
    seed_of,
    shares_of,
    weights_for,
)

from btm_cluster.plan import Plan
from btm_cluster.session import driving, opened_view

if TYPE_CHECKING:
    from btm_cluster.algorithm import Grown
    from btm_cluster.driver.driver import Driver
    from btm_cluster.driver.prepared_plan import PreparedText
    from btm_cluster.ledger import Artifact, Ref

RESAMPLES = 1000
TRANSFORMER_LM = "Transformer-LM"


@dataclass(frozen=True)
class Row:
    """A system on a target's test text."""

    target: str
    system: str
    proportions: Mapping[str, float] | None
    """By domain, as they were trained on; None where the system is not trained on a mixture."""
    perplexity: float
    bits_per_byte: float
    against: Mapping[str, tuple[float, float, float]]
    """The difference in perplexity, as a share, to other systems, with its interval."""


def main() -> None:
    asked = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not asked.toy and not (asked.corpus and asked.corpus.joinpath("train_domains").is_dir()):
        print(f"{asked.corpus}: there is no corpus here, and nothing is measured; --toy makes its own text")
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    fields = plan_fields(asked, toy_texts(asked.work) if asked.toy else _corpus_texts(asked))
    asked.to.mkdir(parents=True, exist_ok=True)
    (asked.to / "plan.yaml").write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    os.chdir(asked.work)
    plan = Plan.model_validate(fields)
    with opened_view() as view, driving(view, plan, None, asked.in_process, command="mixture") as driver:
        rows, weights = measure(plan, driver)
    stored = {"weights": weights, "rows": [asdict(row) for row in rows]}
    (asked.to / "mixtures.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--domains", nargs="+", help="names of training domains; without it, all")
    parser.add_argument("--targets", nargs="+", help="names of targets; without it, all")
    parser.add_argument("--toy", action="store_true", help="text of this Python installation, and a toy size")
    parser.add_argument("--to", type=lambda to: Path(to).resolve(), required=True, help="for the results")
    parser.add_argument("--work", type=Path, default=Path("mixture-from-forest"), help="for the store")
    parser.add_argument("--model-size", choices=MODEL_SIZES, default="1m")
    parser.add_argument("--updates", type=int, help="default: 400, and 40 of a toy")
    parser.add_argument("--seed-share", type=float, default=0.75)
    parser.add_argument("--blocks", type=int, default=8, help="of each domain in an update")
    parser.add_argument("--learning-rate", type=float, default=0.004)
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--gpus", type=int, default=0, help="1 for one GPU")
    parser.add_argument("--in-process", action="store_true", help="without Ray")
    asked = parser.parse_args()
    if asked.toy:
        asked.model_size = "tiny"
    asked.updates = asked.updates or (40 if asked.toy else 400)
    return asked


def _corpus_texts(asked: argparse.Namespace) -> dict[str, Any]:
    return {
        "domains": _chosen(asked.corpus / "train_domains", asked.domains),
        "targets": _chosen(asked.corpus / "eval_domains", asked.targets),
    }


def _chosen(folder: Path, names: Sequence[str] | None) -> list[dict[str, str]]:
    """The texts there, or those of these names.

    Raises:
        SystemExit: a name that is not there, or no text at all.
    """
    found = {text["name"]: text for text in texts(folder, sum(path.is_dir() for path in folder.glob("*")))}
    if not found:
        raise SystemExit(f"{folder} has no folder of a text")
    if unknown := set(names or ()) - found.keys():
        raise SystemExit(f"{folder} has no {', '.join(sorted(unknown))}, but {', '.join(found)}")
    return [found[name] for name in names or found]


def plan_fields(asked: argparse.Namespace, of_texts: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of forest and Transformer-LM."""
    size = dict(MODEL_SIZES[asked.model_size])
    block_tokens, vocabulary = size.pop("block_tokens"), size.pop("vocabulary")
    resources = {"seed_gpus": asked.gpus, "gpus_per_expert": 0.25, "seed_cpus": 4} if asked.gpus else {}
    return {
        "name": "mixture-from-forest",
        "store": "store",
        **of_texts,
        "tokenizer": {"train": {"vocabulary": vocabulary}},
        "model": {"config": {"model_type": "gpt2", **size}},
        "training": {
            "block_tokens": block_tokens,
            "updates": asked.updates,
            "seed_share": asked.seed_share,
            "blocks_per_domain_update": asked.blocks,
            "learning_rate": asked.learning_rate,
            "random_seed": asked.random_seed,
        },
        "baselines": ["transformer-lm"],
        "cluster": {"seed_cpus": 1, "cpus_per_expert": 1, **resources},
    }


def measure(plan: Plan, driver: "Driver") -> tuple[list[Row], dict[str, dict[str, dict[str, float]]]]:
    """Grows the forest, trains on every mixture and scores: the rows, and by target the weights of the learned
    soup and the posterior, by domain and the seed."""
    from btm_cluster.algorithm import grow

    grown = grow(plan, driver)
    if grown.failures:
        raise SystemExit("\n".join(f"{one.label}: {one.cause}" for one in grown.failures))
    targets = [text for text in grown.prepared.texts if text.is_target]
    soups = {text.name: _soup(grown, text, driver) for text in targets}
    weights = {text.name: weights_for(grown, text, soups[text.name], driver) for text in targets}
    asked = {
        text.name: {
            name: mixture_request(grown, f"{name}, {text.name}", proportions)
            for name, proportions in mixtures(weights[text.name], grown.forest.domains).items()
        }
        for text in targets
    }
    driver.require([request for requests in asked.values() for request in requests.values()])
    rows: list[Row] = []
    for text in targets:
        trained = {name: request.ref for name, request in asked[text.name].items()}
        assert grown.baseline is not None
        single = {SEED: seed_of(grown), TRANSFORMER_LM: grown.baseline}
        systems = {**single, **trained, SOUP: soups[text.name].ref}
        shares = {name: shares_of(grown, request) for name, request in asked[text.name].items()}
        rows += _score(grown, text, systems, shares, driver)
    return rows, weights


def _soup(grown: "Grown", text: "PreparedText", driver: "Driver") -> "Artifact":
    from btm_cluster.operations.averages import Average, make_average

    return make_average(grown, Average("learned", text.name), driver)


def _score(
    grown: "Grown",
    text: "PreparedText",
    systems: Mapping[str, "Ref"],
    shares: Mapping[str, Mapping[str, float]],
    driver: "Driver",
) -> Iterator[Row]:
    from btm_cluster.equations.perplexity import (
        BYTES,
        TOKENS,
        bits_per_byte,
        interval,
        perplexity,
        resampled_perplexity,
    )
    from btm_cluster.evaluation.scoring import score_models, stack_of

    models = list(dict.fromkeys(systems.values()))
    named = {model: name for name, model in systems.items()}
    score_models(grown.prepared, named, [text], driver, ["test"])
    stack = stack_of(driver.ledger, models, text, "test")
    sums_SUD, sizes_UD = stack.sums(), stack.sizes()
    totals_SU, totals_U = sums_SUD.sum(2), sizes_UD.sum(1)
    perplexities_S = perplexity(totals_SU[:, TOKENS], totals_U[TOKENS])
    bits_S = bits_per_byte(totals_SU[:, BYTES], totals_U[BYTES])
    resampled_SR = resampled_perplexity(sums_SUD[:, TOKENS], sizes_UD[TOKENS], RESAMPLES, random_seed=0)
    at = {name: models.index(model) for name, model in systems.items()}

    def difference(one: str, other: str) -> tuple[float, float, float]:
        point = float(perplexities_S[at[one]] / perplexities_S[at[other]]) - 1
        return point, *interval(resampled_SR[at[one]] / resampled_SR[at[other]] - 1)

    for name, row in at.items():
        others = [other for other in (UNIFORM, POSTERIOR, FITTED, LARGEST, TRANSFORMER_LM) if other != name]
        yield Row(
            text.name,
            name,
            shares.get(name),
            float(perplexities_S[row]),
            float(bits_S[row]),
            {other: difference(name, other) for other in others},
        )


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as Markdown, and how often the learned soup's mixture is better."""
    lines = [
        "| target | system | trained on, % | perplexity | bits per byte | against the uniform mixture |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        by_size = sorted((row.proportions or {}).items(), key=lambda one: -one[1])
        shares = ", ".join(f"{name} {100 * share:.0f}" for name, share in by_size)
        against = _percent(row.against[UNIFORM]) if UNIFORM in row.against else ""
        lines.append(
            f"| {row.target} | {row.system} | {shares} | {row.perplexity:.2f} | {row.bits_per_byte:.4f} | {against} |"
        )
    learned = [row for row in rows if row.system == LEARNED]
    for other in (UNIFORM, POSTERIOR, FITTED, LARGEST):
        found = [row.against[other] for row in learned]
        better, worse = sum(high < 0 for _, _, high in found), sum(low > 0 for _, low, _ in found)
        mean = sum(point for point, _, _ in found) / len(found)
        lines.append(
            f"\n{LEARNED} against {other}: {100 * mean:+.1f} % on average, better on {better} of {len(found)} "
            f"targets and worse on {worse}, by intervals that leave out 0: "
            + ", ".join(f"{row.target} {_percent(row.against[other])}" for row in learned)
        )
    return lines


def _percent(difference: tuple[float, float, float]) -> str:
    point, low, high = (100 * one for one in difference)
    return f"{point:+.1f} % ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
