"""The paper's directions, on made-up domains that differ as domains do: much
in common, and much of their own.

One study of small models on a CPU, seeded. On text like this the forest must win; if one of these fails, the
algorithm is broken. (How it does on real text is measured, not tested: docs/results.md.)
"""

import random
from typing import Any

import pytest

from btm_cluster.equations import learned_gate
from btm_cluster.language_model import soup
from btm_cluster.plan import Plan
from btm_cluster.study.run import run_study
from tests.conftest import in_process, write_jsonl

DOMAINS = ("north", "south", "east", "west")
WORDS = ["".join(random.Random(f"w{i}").choices("aeioubdfgklmnprst", k=2 + i % 3)) for i in range(60)]
OWN = 0.4
"""Share of words after which a domain goes on in its own way; elsewhere all go on alike."""
NOISE = 0.1


def documents(domain: str, count: int, words: int = 80) -> list[str]:
    """Documents in which each word is followed by one of three."""
    everybody = random.Random("everybody")
    followers = {word: everybody.sample(WORDS, 3) for word in WORDS}
    rng = random.Random(domain)
    followers |= {word: rng.sample(WORDS, 3) for word in WORDS if rng.random() < OWN}
    found = []
    for _ in range(count):
        document = [rng.choice(WORDS)]
        while len(document) < words:
            document.append(rng.choice(WORDS if rng.random() < NOISE else followers[document[-1]]))
        found.append(" ".join(document))
    return found


@pytest.fixture(scope="module")
def perplexity(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Test perplexity over all texts by system: `perplexity(system, posterior, prior, seed_share)`."""
    folder = tmp_path_factory.mktemp("claims")
    texts = {name: write_jsonl(folder / f"{name}.jsonl", documents(name, 400)) for name in DOMAINS}
    either = zip(documents("north", 60), documents("south", 60), strict=True)
    texts["border"] = write_jsonl(folder / "border.jsonl", [pair[i % 2] for i, pair in enumerate(either)])
    plan = Plan.model_validate(
        {
            "name": "claims",
            "store": str(folder / "store"),
            "domains": [{"name": name, "text": str(texts[name])} for name in DOMAINS],
            "targets": [{"name": "border", "text": str(texts["border"])}],
            "reading": {"development_share": 0.1, "test_share": 0.1},
            "tokenizer": {"train": {"vocabulary": 400}},
            "model": {"config": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2}},
            "training": {
                "block_tokens": 64,
                "updates": 300,
                "seed_share": 0.5,
                "blocks_per_domain_update": 4,
                "learning_rate": 5e-3,
            },
            "cluster": {"seed_cpus": 1, "cpus_per_expert": 1, "micro_batch_blocks": 16},
            "study": {"systems": ["demix", "random-split"], "seed_shares": [0]},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (soup, learned_gate):  # what searches find is no claim of the paper
            patch.setattr(module, "LOOKS", 1)
        entries = list(run_study(plan, in_process(plan)))[-1].entries

    def lookup(
        system: str, posterior: str | None = None, prior: str | None = None, seed_share: float | None = 0.5
    ) -> float:
        wanted = (system, posterior, prior, seed_share, None, None)
        names = ("system", "posterior", "prior", "seed_share", "development_blocks", "top_k")
        (found,) = [entry["all"] for entry in entries if tuple(entry[name] for name in names) == wanted]
        return float(found)

    return lookup


@pytest.mark.parametrize(("posterior", "prior"), [("full", "ema"), ("calibrated", "fitted")])
def test_the_forest_beats_the_transformer_lm(perplexity: Any, posterior: str, prior: str) -> None:
    assert perplexity("forest", posterior, prior) < 0.8 * perplexity("transformer-lm", seed_share=None)


@pytest.mark.parametrize(("posterior", "prior"), [("full", "ema"), ("calibrated", "fitted")])
def test_domains_beat_random_splits(perplexity: Any, posterior: str, prior: str) -> None:
    assert perplexity("forest", posterior, prior) < 0.8 * perplexity("random-split", posterior, prior)


def test_the_ensemble_beats_every_single_expert(perplexity: Any) -> None:
    assert perplexity("forest", "full", "ema") < perplexity("best single expert")


def test_without_a_common_seed_averages_explode_and_ensembles_do_not(perplexity: Any) -> None:
    seeded = perplexity("average", prior="uniform")
    assert perplexity("average", prior="uniform", seed_share=0.0) > 2 * seeded
    assert perplexity("forest", "full", "ema", seed_share=0.0) < 0.8 * seeded


def test_an_average_by_the_posterior_beats_a_uniform_one(perplexity: Any) -> None:
    assert perplexity("average", prior="ema") < 0.8 * perplexity("average", prior="uniform")


def test_demix_beats_the_transformer_lm(perplexity: Any) -> None:
    # Not that the forest beats DEMix: here they draw, and on real text it is the other way than in the paper.
    assert perplexity("demix", "full", "ema", seed_share=None) < 0.8 * perplexity(
        "transformer-lm", seed_share=None
    )
