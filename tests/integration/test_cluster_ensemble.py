"""The ensemble by cluster distance against a loop over tokens, what its weights
may see, and which plans are refused."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from btm_cluster.data.blocks import Blocks
from btm_cluster.data.clusters import Clusters, find_clusters, load_clusters, save_clusters
from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.driver.recipes import score_request
from btm_cluster.equations.mixture import ends_of_documents
from btm_cluster.equations.perplexity import BYTES, TOKENS
from btm_cluster.errors import UserError
from btm_cluster.evaluation.cluster_ensemble import context_log_weights
from btm_cluster.evaluation.evaluate import evaluate
from btm_cluster.evaluation.rows import CLUSTER_ENSEMBLE
from btm_cluster.evaluation.verdict import SplitResult, verdict
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.mixing.scores import ScoreStack
from btm_cluster.operations.plan import preview
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import Plan
from btm_cluster.steps.stored import documents_of, open_tokenizer
from tests.conftest import DOMAINS, in_process
from tests.integration.conftest import GrownForest

TEMPERATURE = 0.3


@pytest.fixture(scope="module")
def model(grown: GrownForest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster model found in the domains' text, its clusters named as the
    domains by hand; and one cluster more."""
    folder = tmp_path_factory.mktemp("clusters")
    ledger = grown.driver.ledger
    texts = [text for name in DOMAINS for text in documents_of(ledger, grown.text(name).identity, "train")]
    found = find_clusters(texts, 4, random_seed=0)
    names: list[str] = []
    for words in found.words:
        fits = [
            name
            for name in DOMAINS
            if name not in names and sum(set(word) <= set(name) for word in words) > 7
        ]
        names.append(fits[0] if fits else "another")
    assert set(names) == {*DOMAINS, "another"}
    save_clusters(dataclasses.replace(found, names=tuple(names)), folder)
    return folder


def planned(grown: GrownForest, **merging: object) -> PreparedPlan:
    """The grown forest's prepared plan under a plan with other `merging`."""
    plan = grown.prepared.plan
    return dataclasses.replace(
        grown.prepared, plan=plan.model_copy(update={"merging": plan.merging.model_copy(update=merging)})
    )


@pytest.fixture(scope="module")
def results(grown: GrownForest, model: Path) -> tuple[SplitResult, ...]:
    prepared = planned(grown, clusters=str(model), cluster_temperature=TEMPERATURE)
    driver = in_process(prepared.plan)
    evaluation = evaluate(prepared, grown.grown.forest, grown.grown.baseline, driver)
    assert not driver.made, "a new question costs nothing"
    return evaluation.results


def distances(clusters: Clusters, text: str) -> dict[str, float]:
    """Squared distance by cluster name, computed word by word."""
    counts = Counter(text.casefold().split())
    place = {word: i for i, word in enumerate(clusters.vocabulary)}
    weights = {
        place[w]: (1 + math.log(n)) * float(clusters.rarity_V[place[w]])
        for w, n in counts.items()
        if w in place
    }
    point_F = sum(
        (w * clusters.directions_FV[:, i].astype(np.float64) for i, w in weights.items()), np.zeros(1)
    )
    if not weights:
        return dict.fromkeys(clusters.names, 1.0)
    point_F = point_F / np.linalg.norm(point_F)
    centres = zip(clusters.names, clusters.centres_EF.numpy(), strict=True)
    return {name: float(((point_F - centre_F) ** 2).sum()) for name, centre_F in centres}


@pytest.mark.parametrize(("name", "split"), [("market", "test"), ("harbour", "development")])
def test_the_row_is_the_sum_of_a_loop_over_tokens(
    grown: GrownForest, model: Path, results: tuple[SplitResult, ...], name: str, split: str
) -> None:
    ledger, text, domains = grown.driver.ledger, grown.text(name), grown.grown.forest.domains
    clusters, tokenizer = load_clusters(model), open_tokenizer(ledger, grown.prepared.tokenizer)
    models = [Ref("model", expert.identity) for expert in grown.grown.forest.experts]
    stack = ScoreStack(ledger, [score_of(grown, m, name, split) for m in models], text.tokens[split])
    logp_EBT, _ = stack.take(0, len(stack))
    tokens_BT = np.concatenate(
        [np.load(ledger.open_file(ledger.get(r), "tokens.npy")) for r in text.tokens[split]]
    )
    expected_UD = np.zeros(tuple(stack.sizes().shape))
    ends_BT = ends_of_documents(stack.documents_BT)
    for b, tokens in enumerate(tokens_BT):
        for t in range(len(tokens)):
            seen = max((m for m in (8, 16) if m <= t), default=0)
            context = "\n".join(
                tokenizer.decode(part) for part in split_at(tokens[:seen].tolist(), tokenizer.end_of_text)
            )
            far = distances(clusters, context)
            weights = np.array([math.exp(-far[domain] / TEMPERATURE) for domain in domains])
            owner = int(stack.documents_BT[b, t])
            if owner >= 0:
                p = float((weights / weights.sum()) @ np.exp(logp_EBT[:, b, t].numpy()))
                expected_UD[TOKENS, owner] += math.log(p)
                expected_UD[BYTES, owner] += 0.0 if ends_BT[b, t] else math.log(p)
    result = next(r for r in results if (r.text, r.split) == (name, split))
    np.testing.assert_allclose(result.logp[CLUSTER_ENSEMBLE].numpy(), expected_UD, rtol=1e-4)


def split_at(tokens: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def score_of(grown: GrownForest, model: Ref, name: str, split: str) -> Artifact:
    return grown.driver.ledger.get(score_request(grown.prepared, model, grown.text(name), split, "").ref)


def test_every_text_has_the_row_and_without_a_cluster_model_none_has(
    grown: GrownForest, results: tuple[SplitResult, ...]
) -> None:
    assert all(CLUSTER_ENSEMBLE in result.logp for result in results)
    assert not any(CLUSTER_ENSEMBLE in result.logp for result in grown.evaluation.results)
    row = next(row for row in verdict(results).rows["test"] if row.system == CLUSTER_ENSEMBLE)
    assert {"domains", "targets", "all"} == row.means.keys()


def test_a_weight_sees_only_what_stands_before_its_token(grown: GrownForest, model: Path) -> None:
    ledger, text = grown.driver.ledger, grown.text("market")
    clusters, tokenizer = load_clusters(model), open_tokenizer(ledger, grown.prepared.tokenizer)
    blocks = Blocks([ledger.open_file(ledger.get(ref), "tokens.npy") for ref in text.tokens["test"]])
    before_BT = blocks.take(np.arange(4))
    other_BT = Blocks(
        [ledger.open_file(ledger.get(ref), "tokens.npy") for ref in grown.text("orchard").tokens["test"]]
    ).take(np.arange(4))
    experts = [clusters.names.index(domain) for domain in grown.grown.forest.domains]
    for changed in (0, 7, 8, 20):
        after_BT = before_BT.copy()
        after_BT[:, changed:] = other_BT[:, changed:]
        one, two = (context_log_weights(t, clusters, experts, tokenizer, 0.1) for t in (before_BT, after_BT))
        assert torch.equal(one[:, :, : changed + 1], two[:, :, : changed + 1])
        assert changed >= 16 or not torch.equal(one, two)
    assert torch.equal(one[:, :, :8], torch.full_like(one[:, :, :8], -math.log(3)))
    torch.testing.assert_close(one.exp().sum(0), torch.ones_like(one[0]))


def test_a_token_that_begins_documents_is_no_word_of_a_context(grown: GrownForest, model: Path) -> None:
    """As <s> is, which stands before each document but a block's first."""
    ledger, text = grown.driver.ledger, grown.text("market")
    clusters, tokenizer = load_clusters(model), open_tokenizer(ledger, grown.prepared.tokenizer)
    word = clusters.words[0][0]
    tokenizer.backend.add_special_tokens([word])
    begins = tokenizer.backend.token_to_id(word)
    ids = np.load(ledger.open_file(ledger.get(text.tokens["test"][0]), "tokens.npy"))[0].tolist()[:8]
    experts = list(range(len(clusters.names)))

    def weights(context: list[int], tokenizer: TextTokenizer) -> torch.Tensor:
        row = np.array([[*context, *[tokenizer.end_of_text] * (17 - len(context))]])
        return context_log_weights(row, clusters, experts, tokenizer, 0.1)[:, 0, -1]

    with_first = [begins, tokenizer.end_of_text, *ids]
    as_first = dataclasses.replace(tokenizer, first_token=begins)
    assert torch.equal(weights(with_first, as_first), weights(ids, tokenizer))
    assert not torch.equal(weights(with_first, tokenizer), weights(ids, tokenizer)), "as text it would count"


def test_a_domain_without_a_cluster_is_refused_before_anything_starts(
    plan: Plan, model: Path, tmp_path: Path
) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = json.loads((tmp_path / "clusters.json").read_text())
    rows = [row | {"name": "sea"} if row["name"] == "harbour" else row for row in rows]
    (tmp_path / "clusters.json").write_text(json.dumps(rows))
    plan = plan.model_copy(update={"merging": plan.merging.model_copy(update={"clusters": str(tmp_path)})})
    driver = in_process(plan)
    for refused in (lambda: run_plan(plan, driver), lambda: preview(plan, driver.ledger)):
        with pytest.raises(UserError, match="no cluster for harbour") as error:
            refused()
        assert "sea" in error.value.found
    assert not driver.made
