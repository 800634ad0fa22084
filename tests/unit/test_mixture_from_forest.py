"""The benchmark of data mixtures: its proportions, what a training on them takes, and its plan and table."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from btm_cluster.algorithm import Grown
from btm_cluster.data.blocks import Blocks
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import transformer_lm_request
from btm_cluster.forest import Expert, Forest, Foundation
from btm_cluster.language_model.batches import blocks_of_update
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.training_spec import TextBlocks
from btm_cluster.ledger import Ref
from btm_cluster.plan import Plan
from btm_cluster.requests import TrainRequest
from btm_cluster.steps.training_run import spec_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts import what lies beside them
import mixture_from_forest
from data_mixtures import (
    FITTED,
    LARGEST,
    LEARNED,
    POSTERIOR,
    SEED,
    SOUP,
    UNIFORM,
    largest_remainder,
    mixture_request,
    mixtures,
    parts,
    seed_of,
    shares_of,
)
from mixture_from_forest import Row, table

DOMAINS = ("code", "legal", "news")
BLOCKS, BLOCK_TOKENS = 40, 8


@pytest.fixture
def grown() -> Grown:
    fields = {
        "name": "forest",
        "store": "store",
        "domains": [{"name": name, "text": f"{name}.jsonl"} for name in DOMAINS],
        "tokenizer": {"train": {"vocabulary": 300}},
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1}},
        "training": {"updates": 8, "block_tokens": BLOCK_TOKENS, "blocks_per_domain_update": 4},
    }
    plan = Plan.model_validate(fields)
    texts = tuple(
        PreparedText(name, False, f"text of {name}", {}, {}, {"train": (Ref("tokens", name),)})
        for name in DOMAINS
    )
    founders = tuple((text.name, text.identity) for text in texts)
    prepared = PreparedPlan(plan, texts, founders, (), Ref("tokenizer", "t"), {"model_type": "gpt2"}, None)
    experts = tuple(
        Expert(text.name, f"expert on {text.name}", "", text.identity, ()) for text in prepared.texts
    )
    return Grown(prepared, Forest(1, Foundation("s", "t", "m", 8, founders), experts, {}, ""), None, ())


def taken(grown: Grown, request: TrainRequest, update: int, folder: Path) -> list[tuple[str, int]]:
    """Domain and number of each block that the train loop takes in an update."""
    names = {text.identity: text.name for text in grown.prepared.domains}
    for place, name in enumerate(DOMAINS):
        tokens = np.arange(BLOCKS)[:, None].repeat(BLOCK_TOKENS, 1) + BLOCKS * place
        np.save(folder / f"{name}.npy", tokens.astype(np.uint16))
    opened = [TextBlocks(text.name, Blocks([folder / f"{names[text.text]}.npy"])) for text in request.texts]
    group = ProcessGroup(0, 1, torch.device("cpu"))
    spec = spec_of(request, opened, first_token=0)
    numbers = blocks_of_update(spec, update, group, None)[:, 0].tolist()
    return [(DOMAINS[number // BLOCKS], number % BLOCKS) for number in numbers]


def test_a_training_takes_so_many_blocks_of_each_domain_in_every_update(grown: Grown, tmp_path: Path) -> None:
    request = mixture_request(grown, "mixture", [0.5, 0.1, 0.4])
    for update in (4, 5, 7):
        blocks = taken(grown, request, update, tmp_path)
        assert Counter(domain for domain, _ in blocks) == {"code": 6, "legal": 1, "news": 5}
        assert len(set(blocks)) > 6  # parts of a domain do not take the same blocks
    assert taken(grown, request, 4, tmp_path) != taken(grown, request, 5, tmp_path)
    assert shares_of(grown, request) == {"code": 6 / 12, "legal": 1 / 12, "news": 5 / 12}


def test_a_mixture_costs_what_the_transformer_lm_does_and_goes_on_from_the_seed(grown: Grown) -> None:
    whole = transformer_lm_request(grown.prepared, seed_of(grown))
    request = mixture_request(grown, "mixture", [1.0, 0.0, 0.0])
    assert request.blocks_per_update == 12
    assert (request.first_update, request.last_update) == (whole.milestones[0], whole.last_update)
    assert request.start is not None
    assert (request.start.model, request.start.keep_optimizer) == (Ref("model", "s"), True)
    assert request.training.learning_rate == whole.training.learning_rate


def test_other_proportions_make_another_model(grown: Grown) -> None:
    shares = ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [1 / 3] * 3)
    assert len({mixture_request(grown, "mixture", one).ref for one in shares}) == 4


@pytest.mark.parametrize(
    ("proportions", "total", "counts"),
    [
        ([0.5, 0.5], 4, [2, 2]),
        ([0.5, 0.3, 0.2], 4, [2, 1, 1]),
        ([0.9, 0.06, 0.04], 10, [9, 1, 0]),
        ([1.0, 0.0], 7, [7, 0]),
        ([1 / 3] * 3, 12, [4, 4, 4]),
        ([2.0, 2.0], 3, [2, 1]),
    ],
)
def test_counts_are_the_proportions_by_largest_remainder(
    proportions: list[float], total: int, counts: list[int]
) -> None:
    assert largest_remainder(proportions, total) == counts


@pytest.mark.parametrize(("domains", "blocks"), [(3, 4), (4, 6), (8, 32), (8, 128), (100, 7)])
def test_parts_of_an_update_make_its_blocks(domains: int, blocks: int) -> None:
    of_each, of_each_part = parts(domains, blocks)
    assert of_each * of_each_part == blocks
    assert parts(8, 32) == (8, 4)


def test_the_learned_soups_proportions_leave_the_seed_out() -> None:
    weights = {SOUP: {"code": 0.3, "news": 0.1, SEED: 0.6}, POSTERIOR: {"legal": 0.2, "news": 0.8}}
    weights[FITTED] = {"code": 1.0}
    found = mixtures(weights, DOMAINS)
    assert found[UNIFORM] == pytest.approx([1 / 3] * 3)
    assert found[LEARNED] == pytest.approx([0.75, 0.0, 0.25])
    assert found[LARGEST] == [1.0, 0.0, 0.0]
    assert found[POSTERIOR] == [0.0, 0.2, 0.8]
    assert found[FITTED] == [1.0, 0.0, 0.0]


def test_a_soup_that_is_the_seed_alone_wants_all_domains_alike() -> None:
    found = mixtures({SOUP: {SEED: 1.0}, POSTERIOR: {"code": 1.0}, FITTED: {"code": 1.0}}, DOMAINS)
    assert found[LEARNED] == found[LARGEST] == found[UNIFORM]


def test_the_table_counts_targets_whose_interval_leaves_out_zero() -> None:
    def row(target: str, point: float, low: float, high: float) -> Row:
        against = dict.fromkeys((UNIFORM, POSTERIOR, FITTED, LARGEST), (point, low, high))
        return Row(target, LEARNED, {"code": 0.25, "news": 0.75}, 80.0, 2.0, against)

    lines = table([row("a", -0.05, -0.06, -0.04), row("b", 0.01, -0.01, 0.03), row("c", 0.01, 0.005, 0.02)])
    assert (
        "| a | mixture by the learned soup | news 75, code 25 | 80.00 | 2.0000 | -5.0 % (-6.0 to -4.0) |"
        in lines
    )
    assert "-1.0 % on average, better on 1 of 3 targets and worse on 1" in lines[-1]


def test_a_corpus_that_is_not_there_is_told_and_names_that_it_has_not_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    call = ["mixture_from_forest.py", str(tmp_path), "--to", str(tmp_path / "to"), "--work", str(work)]
    monkeypatch.setattr(sys, "argv", call)
    mixture_from_forest.main()
    assert "there is no corpus here, and nothing is measured" in capsys.readouterr().out
    assert not work.exists()
    (tmp_path / "train_domains" / "code").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", [*call, "--domains", "code", "laws"])
    with pytest.raises(SystemExit, match="has no laws, but code"):
        mixture_from_forest.main()
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit, match="eval_domains has no folder of a text"):
        mixture_from_forest.main()
