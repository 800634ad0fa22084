"""Documents scored by an ensemble as they stream by: sums for each model and the
mixture, and whose domain a document is of.

Perplexity and bits per byte are the verdict's, in blocks that are read after the tokenizer's first token.
Knows no store.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from btm_cluster.data.batches import batches
from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.equations.perplexity import bits_per_byte, perplexity
from btm_cluster.language_model.ensemble_scoring import TextScores

TOKENS_AT_ONCE = 65_536
"""Tokens that are held until they are scored together."""


class Score(Protocol):
    """An engine's `score`, with its gate."""

    def __call__(self, texts: Sequence[Sequence[int]]) -> list[TextScores]:
        """Scores of token ids, each of at most a block, under each expert and the ensemble."""


@dataclass(frozen=True)
class NamedText:
    """A document and where it is from."""

    source: str
    number: int
    """In its source, from 1."""
    text: str


@dataclass(frozen=True)
class Surprise:
    """How surprising a text was."""

    perplexity: float
    bits_per_byte: float
    """Bits per byte of the text in UTF-8, end-of-text tokens left out."""


@dataclass(frozen=True)
class Scored:
    """A document, or all documents together."""

    tokens: int
    """With end-of-text tokens."""
    bytes: int
    ensemble: Surprise
    experts: Mapping[str, Surprise]
    """By domain; the seed's too, where it mixes with them."""
    posterior: Mapping[str, float]
    """p(domain | the whole document) by Bayes' rule, all domains alike
    before; of several documents, the mean."""

    @property
    def domain(self) -> str:
        """The domain with the largest posterior."""
        return max(self.posterior, key=lambda name: self.posterior[name])


@dataclass
class Sums:
    """Log-probabilities of one document or of several, by expert and then the ensemble: float64 [E + 1]."""

    models: int
    """With the ensemble."""
    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    logp: torch.Tensor = field(init=False)
    ends: torch.Tensor = field(init=False)
    """Log-probability of end-of-text tokens alone."""
    posterior: torch.Tensor = field(init=False)
    """Summed over documents: [domains]."""

    def __post_init__(self) -> None:
        self.logp, self.ends = (torch.zeros(self.models, dtype=torch.float64) for _ in range(2))
        self.posterior = torch.zeros(0, dtype=torch.float64)

    def close(self, domains: Sequence[int]) -> None:
        """Takes the document as whole: `domains` are the experts that are weighed."""
        self.documents, self.posterior = 1, torch.softmax(self.logp[list(domains)], dim=0)

    def add(self, other: "Sums") -> None:
        """Takes in another document."""
        self.tokens, self.bytes = self.tokens + other.tokens, self.bytes + other.bytes
        self.documents += other.documents
        self.logp, self.ends = self.logp + other.logp, self.ends + other.ends
        self.posterior = other.posterior + (self.posterior if len(self.posterior) else 0)

    def scored(self, names: Sequence[str], domains: Sequence[int]) -> Scored:
        """As figures, of at least one document."""
        surprises = [
            Surprise(*figures)
            for figures in zip(
                perplexity(self.logp, torch.tensor(self.tokens)).tolist(),
                bits_per_byte(self.logp - self.ends, torch.tensor(self.bytes)).tolist(),
                strict=True,
            )
        ]
        shares = (self.posterior / self.documents).tolist()
        return Scored(
            self.tokens,
            self.bytes,
            surprises[-1],
            dict(zip(names, surprises[:-1], strict=True)),
            dict(zip((names[j] for j in domains), shares, strict=True)),
        )


@dataclass
class _Open:
    """A document that is being scored."""

    text: NamedText
    sums: Sums
    left: int
    """Tokens that are not scored yet."""


@dataclass
class _Block:
    """Token ids to be read at once, and the documents that they are of."""

    tokens: list[int] = field(default_factory=list)
    parts: list[tuple[_Open | None, int]] = field(default_factory=list)
    """Each with its number of tokens, in order; None for a token that begins the next document, which is read
    and not counted."""


class DocumentScorer:
    """Scores documents under several models and their mixture."""

    def __init__(
        self,
        score: Score,
        tokenizer: TextTokenizer,
        block_tokens: int,
        names: Sequence[str],
        domains: Sequence[int],
    ) -> None:
        """`names` are the models' in the engine's order, `domains` the places of those
        that are experts of a domain."""
        self._score, self._tokenizer, self._block_tokens = score, tokenizer, block_tokens
        self.names, self.domains = names, domains

    def total(self) -> Sums:
        """Sums of no document yet."""
        return Sums(len(self.names) + 1)

    def score(self, texts: Iterable[NamedText], packs: bool = False) -> Iterator[tuple[NamedText, Sums]]:
        """Each document with its sums, in order, in bounded memory.

        A document is read by itself, in blocks from its beginning. With `packs`, documents follow each other
        without a gap, as held-out text is stored, and a block may begin within one and go on with the next.
        """
        waiting: deque[_Open] = deque()

        def opened() -> Iterator[tuple[_Open, list[int]]]:
            for text in texts:
                ids = [*self._tokenizer.encode(text.text), self._tokenizer.end_of_text]
                sums = Sums(len(self.names) + 1, len(ids), len(text.text.encode()))
                waiting.append(_Open(text, sums, len(ids)))
                yield waiting[-1], ids

        between = self._tokenizer.first_token if packs and self._tokenizer.begins_documents else None
        cut = _cut(opened(), self._block_tokens, packs, between)
        for blocks in batches(cut, lambda block: len(block.tokens), TOKENS_AT_ONCE):
            for block, said in zip(blocks, self._score([block.tokens for block in blocks]), strict=True):
                _take_in(block, said)
            while waiting and not waiting[0].left:
                done = waiting.popleft()
                done.sums.close(self.domains)
                yield done.text, done.sums


def _cut(
    documents: Iterable[tuple[_Open, list[int]]], block_tokens: int, packs: bool, between: int | None
) -> Iterator[_Block]:
    """Documents' token ids as blocks; with `packs` all but the last are full. A token `between` two documents
    stands where none begins a block."""
    block = _Block()
    for one, ids in documents:
        if between is not None and block.tokens:
            block.tokens.append(between)
            block.parts.append((None, 1))
        start = 0
        while start < len(ids):
            taken = ids[start : start + block_tokens - len(block.tokens)]
            start += len(taken)
            block.tokens += taken
            block.parts.append((one, len(taken)))
            if len(block.tokens) == block_tokens or (start == len(ids) and not packs):
                yield block
                block = _Block()
    if block.tokens:
        yield block


def _take_in(block: _Block, said: TextScores) -> None:
    logp_MT = torch.cat([said.logp_ET, said.logp_T[None]])
    start = 0
    for one, count in block.parts:
        part_MT = logp_MT[:, start : start + count]
        start += count
        if one is None:
            continue
        one.left -= count
        one.sums.logp += part_MT.sum(1)
        if not one.left:
            one.sums.ends += part_MT[:, -1]
