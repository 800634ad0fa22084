"""Draws against transformers' own processors, and against the probabilities that they are made by."""

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from btm_cluster.errors import UserError
from btm_cluster.language_model.sampling import (
    Sampling,
    check_sampling,
    draw,
    keep_likeliest,
    penalise,
    uniforms,
)

ROWS, VOCABULARY = 5, 40
LOG_PROBS = torch.log_softmax(
    torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2, dim=-1
)


def each(value: float) -> torch.Tensor:
    return torch.full((ROWS,), value)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 0.8), (7, 1.0), (7, 0.8), (1, 1.0), (None, 1e-6), (None, 1.0)]
)
def test_the_likeliest_tokens_are_transformers(temperature: float, top_k: int | None, top_p: float) -> None:
    expected = TemperatureLogitsWarper(temperature)(None, LOG_PROBS)
    expected = expected if top_k is None else TopKLogitsWarper(top_k)(None, expected)
    expected = expected if top_p == 1 else TopPLogitsWarper(top_p)(None, expected)
    many = torch.full((ROWS,), top_k or VOCABULARY)
    kept = keep_likeliest(LOG_PROBS, many, each(top_p), each(temperature))
    assert torch.equal(kept.isfinite(), expected.isfinite())
    torch.testing.assert_close(torch.softmax(kept / temperature, -1), torch.softmax(expected, -1))


def test_tokens_seen_before_are_penalised_as_transformers_does() -> None:
    ids = torch.randint(VOCABULARY, (ROWS, 6), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(ROWS, VOCABULARY, dtype=torch.bool).scatter(1, ids, True)
    found = penalise(LOG_PROBS, seen, torch.tensor([1.3, 1.3, 1.3, 1.0, 0.8]))
    for row, penalty in enumerate((1.3, 1.3, 1.3, 1.0, 0.8)):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(
            ids[row : row + 1], LOG_PROBS[row : row + 1].clone()
        )
        torch.testing.assert_close(found[row : row + 1], expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_token_is_drawn_for_its_share_of_the_uniform_numbers(temperature: float) -> None:
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(LOG_PROBS[:1].expand(count, -1), uniform, torch.full((count,), temperature))
    found = torch.bincount(drawn, minlength=VOCABULARY) / count
    torch.testing.assert_close(
        found, torch.softmax(LOG_PROBS[0] / temperature, -1), rtol=0, atol=1.01 / count
    )


def test_what_is_ruled_out_is_never_drawn_not_even_by_the_smallest_or_largest_number() -> None:
    log_probs = torch.tensor([[-torch.inf, -1.0, -torch.inf, -2.0, -torch.inf]]).expand(3, -1)
    smallest, largest = 0.0, float(max(uniforms(0, 0, 1000)))
    drawn = draw(
        log_probs, torch.tensor([smallest, largest, 1 - 2.0**-40], dtype=torch.float64), torch.ones(3)
    )
    assert drawn.tolist() == [1, 3, 3]


def test_at_temperature_0_the_likeliest_token_is_taken_beside_rows_that_draw() -> None:
    temperature = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    drawn = draw(LOG_PROBS, torch.full((ROWS,), 0.999, dtype=torch.float64), temperature)
    assert drawn[::2].tolist() == LOG_PROBS.argmax(-1)[::2].tolist()
    assert drawn[1] != LOG_PROBS[1].argmax()


def test_seeds_and_samples_have_streams_of_their_own() -> None:
    streams = [uniforms(seed, sample, 50).tolist() for seed in (0, 1, -1, 2**63) for sample in (0, 1)]
    assert len({tuple(stream) for stream in streams}) == len(streams)
    assert uniforms(3, 2, 50).tolist()[:20] == uniforms(3, 2, 20).tolist(), "whatever is asked for"
    assert all(0 <= number < 1 for stream in streams for number in stream)


@pytest.mark.parametrize(
    "wrong",
    [
        Sampling(temperature=-1),
        Sampling(temperature=float("nan")),
        Sampling(top_p=0),
        Sampling(top_p=1.1),
        Sampling(top_k=0),
        Sampling(repetition_penalty=0),
    ],
    ids=str,
)
def test_settings_by_which_nothing_can_be_drawn_are_refused(wrong: Sampling) -> None:
    with pytest.raises(UserError) as caught:
        check_sampling(wrong)
    assert caught.value.found
    assert caught.value.expected
