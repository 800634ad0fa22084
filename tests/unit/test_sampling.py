"""Draws against transformers' own processors, and against the probabilities that they are made by."""

import pytest
import torch
from scipy.stats import chisquare
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


@pytest.mark.parametrize(("top_p", "temperature"), [(1e-50, 1.0), (0.5, 1e-42)])
def test_the_likeliest_token_stays_where_rounding_takes_top_p_or_temperature_for_0(
    top_p: float, temperature: float
) -> None:
    """All were ruled out, and the first one of the vocabulary, the end of the text, was drawn."""
    kept = keep_likeliest(LOG_PROBS, torch.full((ROWS,), VOCABULARY), each(top_p), each(temperature))
    assert torch.equal(kept.argmax(-1), LOG_PROBS.argmax(-1))
    assert torch.equal(kept.isfinite().sum(-1), torch.ones(ROWS))


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
def test_a_token_is_drawn_by_its_probability(temperature: float) -> None:
    count = 100_000
    uniform = torch.from_numpy(uniforms(0, 0, count))
    drawn = draw(LOG_PROBS[:1].expand(count, -1), uniform, torch.full((count,), temperature))
    found = torch.bincount(drawn, minlength=VOCABULARY).double()
    expected = torch.softmax(LOG_PROBS[0].double() / temperature, -1) * count
    assert chisquare(found, expected).pvalue > 0.001


def test_draws_of_one_sequence_do_not_depend_on_each_other() -> None:
    """Not even of neighbouring numbers, nor of neighbouring tokens."""
    numbers = torch.arange(20_000, dtype=torch.float64) * 2.0**-53
    drawn = draw(torch.zeros(1, 16).expand(len(numbers), -1), numbers, torch.ones(len(numbers)))
    pairs = torch.zeros(16, 16).index_put((drawn[:-1], drawn[1:]), torch.ones(()), accumulate=True)
    assert chisquare(pairs.flatten()).pvalue > 0.001


def test_rounding_of_the_probabilities_changes_hardly_any_draw() -> None:
    """Where cumulated probabilities reach a number, one draw in ninety would differ."""
    count, vocabulary = 5000, 2000
    random = torch.Generator().manual_seed(3)
    log_probs = torch.log_softmax(torch.randn(1, vocabulary, generator=random), -1)
    rounded = log_probs + 1e-3 * torch.randn(1, vocabulary, generator=random)
    uniform, temperature = torch.from_numpy(uniforms(0, 0, count)), torch.ones(count)
    drawn = [draw(one.expand(count, -1), uniform, temperature) for one in (log_probs, rounded)]
    assert (drawn[0] != drawn[1]).sum() <= 5


def test_what_is_ruled_out_is_never_drawn_not_even_by_the_smallest_or_largest_number() -> None:
    log_probs = torch.tensor([[-torch.inf, -30.0, -torch.inf, -60.0, -torch.inf]]).expand(1002, -1)
    extremes = torch.tensor([0.0, 1 - 2.0**-40], dtype=torch.float64)
    uniform = torch.cat([extremes, torch.from_numpy(uniforms(0, 0, 1000))])
    for temperature in (0.0, 1.0, 100.0):
        drawn = draw(log_probs, uniform, torch.full((1002,), temperature))
        assert set(drawn.tolist()) == ({1, 3} if temperature == 100 else {1})


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
