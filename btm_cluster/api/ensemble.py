"""An ensemble, loaded: it continues prompts and scores texts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from btm_cluster.errors import UserError
from btm_cluster.language_model.document_scores import DocumentScorer, NamedText, Scored, Sums
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.ledger import Ledger
from btm_cluster.operations.generate import Continuation, Generated, continue_prompts
from btm_cluster.operations.score import scorer_by
from btm_cluster.steps.mixture import Mixture, open_engine
from btm_cluster.steps.stored import open_tokenizer


class OpenEnsemble:
    """The experts of a forest version, loaded, as one language model. Of one thread; its memory is free once it
    is gone."""

    def __init__(
        self,
        ledger: Ledger,
        mixture: Mixture,
        rows: int,
        precision: Literal["float32", "bfloat16"],
        device: str | None,
    ) -> None:
        self.mixture = mixture
        self.text_tokenizer = open_tokenizer(ledger, mixture.tokenizer)
        """The tokenizer as texts are read by it here: what spells a special token in a text is text."""
        self.engine = open_engine(ledger, mixture, self.text_tokenizer, rows, precision, device)
        """For tokens, log-probabilities and experts' weights one by one."""

    def __repr__(self) -> str:
        return f"<ensemble of {', '.join(self.names)}, forest version {self.mixture.version}>"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models that are mixed: domains, and `the seed` where the plan says so."""
        return tuple(self.mixture.models)

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 100,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        random_seed: int = 0,
    ) -> list[Generated]:
        """Continues prompts, each by random numbers of its own, as `btm generate` does.

        Args:
            max_new_tokens: a text also ends at an end-of-text token, a stop string or a full block; `finish` says
                which.
            temperature: 0 takes the likeliest token.
            top_p: sample from the smallest set of tokens with at least this total probability.
            top_k: sample from this many of the likeliest tokens.
            repetition_penalty: above 1, tokens that have occurred become less likely.
            stop: strings before which a text ends.
            random_seed: the same one gives the same texts.

        Raises:
            UserError: a value out of range, or a prompt that fills a block or is no text.
        """
        sampling = Sampling(temperature, top_p, random_seed, top_k, repetition_penalty)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        asked = Continuation(max_new_tokens, sampling, stops)
        given = [_text(prompt, f"prompt {i}") for i, prompt in enumerate(_several(prompts, "prompts"), 1)]
        return continue_prompts(self.engine, self.text_tokenizer, self.names, given, asked)

    def score(self, texts: str | Iterable[str]) -> list[Scored]:
        """How surprising each text is to each model and to the ensemble, and which domain it is of.

        Each is read by itself, as by `btm score`.

        Raises:
            UserError: a text that is empty, or is no Unicode.
        """
        return [sums.scored(self._scorer.names, self._scorer.domains) for sums in self._sums(texts, False)]

    def score_together(self, texts: Iterable[str], *, packed: bool = False) -> Scored:
        """The same of all texts together, in bounded memory.

        Args:
            packed: they follow each other in blocks, as the verdict reads them.

        Raises:
            UserError: there is no text, or one that is empty or no Unicode.
        """
        total = self._scorer.total()
        for sums in self._sums(texts, packed):
            total.add(sums)
        if not total.documents:
            raise UserError("there is no text to score")
        return total.scored(self._scorer.names, self._scorer.domains)

    @cached_property
    def _scorer(self) -> DocumentScorer:
        return scorer_by(self.engine, self.mixture, self.text_tokenizer)

    def _sums(self, texts: str | Iterable[str], packed: bool) -> Iterator[Sums]:
        given = enumerate(_several(texts, "texts"), 1)
        named = (NamedText("text", number, _checked(text, number)) for number, text in given)
        return (sums for _, sums in self._scorer.score(named, packed))


def _several(given: Any, what: str) -> Iterable[Any]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping | bytes) or not isinstance(given, Iterable):
        raise UserError(f"{what} are no text", found=type(given).__name__, expected="a string, or several")
    return given


def _text(given: Any, what: str) -> str:
    if not isinstance(given, str):
        raise UserError(f"{what} is no text", found=type(given).__name__, expected="a string")
    return given


def _checked(given: Any, number: int) -> str:
    text = _text(given, f"text {number}")
    if not text.strip():
        raise UserError(f"text {number} is empty", remedy="leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise UserError(f"text {number} is no Unicode", found=str(exc)) from exc
    return text
