"""The documents of a given text that its weights are estimated on, and what blocks say of it."""

import random
from collections.abc import Iterator

import pytest
import torch

from btm_cluster.data.corpus import content_hash
from btm_cluster.mixing.text_weights import weigh
from btm_cluster.operations.given_text import sample


class Letters:
    """A tokenizer with a token for each letter, which counts what it is asked for."""

    asked = 0

    def encode(self, text: str) -> list[int]:
        self.asked += 1
        return [ord(letter) for letter in text]


def test_a_sample_is_the_documents_of_the_lowest_hashes_whatever_their_order() -> None:
    documents = [f"document {number} {'x' * (number % 13)}" for number in range(200)]
    expected, held = [], 0
    for document in sorted(documents, key=content_hash):
        if held >= 500:
            break
        expected.append(document)
        held += len(document) + 1
    for order in range(5):
        shuffled = random.Random(order).sample([*documents, *documents[:50]], 250)
        assert sample(shuffled, Letters().encode, 500) == expected
    assert sample(documents[:3], Letters().encode, 500) == sorted(documents[:3], key=content_hash)
    assert sample([], Letters().encode, 500) == []


def test_a_sample_of_a_long_text_holds_and_encodes_few_documents() -> None:
    tokenizer = Letters()

    def documents() -> Iterator[str]:
        yield from (f"{number:09d}" for number in range(20_000))

    assert len(sample(documents(), tokenizer.encode, 100)) == 10
    assert tokenizer.asked < 200, "once ten are held, only those of a lower hash are looked at"


@pytest.mark.parametrize("prior", ["fitted", "ema", "mean", "uniform"])
def test_weights_are_the_priors_and_spreads_those_of_each_blocks_posterior(prior: str) -> None:
    # Two blocks of the first model's kind, one of the second's: 3 nats in all between the two.
    likely, unlikely = [[-1.0, -1.0, -1.0]], [[-2.0, -2.0, -2.0]]
    logp_EBT = torch.tensor([[*likely, *likely, *unlikely], [*unlikely, *unlikely, *likely]]).double()
    found = weigh(logp_EBT, torch.ones(3, 3, dtype=torch.bool), prior)  # type: ignore[arg-type]
    own = 1 / (1 + 2.718281828**-3)
    assert (found.blocks, found.tokens) == (3, 9)
    assert sum(model.weight for model in found.models) == pytest.approx(1)
    for model, blocks in zip(found.models, ([own, own, 1 - own], [1 - own, 1 - own, own]), strict=True):
        mean = sum(blocks) / 3
        assert model.block_mean == pytest.approx(mean)
        assert model.block_deviation == pytest.approx((sum((b - mean) ** 2 for b in blocks) / 2) ** 0.5)
    if prior == "uniform":
        assert [model.weight for model in found.models] == [0.5, 0.5]
    elif prior != "ema":  # which forgets: the last block was the other's
        assert found.models[0].weight > 0.6
    alone = weigh(logp_EBT[:, :1], torch.ones(1, 3, dtype=torch.bool), None)
    assert [model.weight for model in alone.models] == [1.0, 0.0]
    assert [model.block_deviation for model in alone.models] == [0.0, 0.0]
