"""Requests of the verb *prepare*: text to token blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from btm_cluster.ledger import Ref
from btm_cluster.plan import ReadingPlan, TextPlan, TrainedTokenizerPlan
from btm_cluster.requests.request import StepRequest


@dataclass(frozen=True)
class ReadText(StepRequest):
    """Read a source into documents. The result, a memo, names the text by its content."""

    kind: ClassVar[str] = "source"
    label: str
    source: TextPlan
    reading: ReadingPlan
    is_target: bool
    fingerprint: Mapping[str, Any]
    """Of the source's files or data set, so that unchanged text is not read twice."""
    most_bytes: int | None = None
    """How much is read of a source that is not trusted, decompressed."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        how = self.source.model_dump(mode="json", exclude={"name"})
        return {
            "source": how,
            "reading": self.reading.model_dump(mode="json"),
            "is_target": self.is_target,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class ShuffleTexts(StepRequest):
    """Deal the training documents of several texts at random into as many texts, and write one of them: a control.

    The result is a memo, as that of reading a source.
    """

    kind: ClassVar[str] = "source"
    label: str
    texts: tuple[str, ...]
    part: int
    random_seed: int

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"shuffle": sorted(self.texts), "part": self.part, "random_seed": self.random_seed}


@dataclass(frozen=True)
class TrainTokenizer(StepRequest):
    """Train a byte-level BPE on the training text of the founding domains."""

    kind: ClassVar[str] = "tokenizer"
    label: str
    texts: tuple[str, ...]
    settings: TrainedTokenizerPlan

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"train": self.settings.model_dump(mode="json"), "texts": sorted(self.texts)}


@dataclass(frozen=True)
class ImportTokenizer(StepRequest):
    """Bring a pretrained tokenizer into the store."""

    kind: ClassVar[str] = "tokenizer"
    label: str
    source: str
    """A folder that every node sees, or a name on the hub."""
    sha256: str
    """Of its tokenizer files."""
    first_token: str
    """The token after which every block is read."""
    end_of_text: str

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"pretrained": self.sha256, "first_token": self.first_token, "end_of_text": self.end_of_text}


@dataclass(frozen=True)
class Tokenize(StepRequest):
    """Turn one shard of a text into token blocks."""

    kind: ClassVar[str] = "tokens"
    label: str
    text: str
    split: str
    shard: str
    tokenizer: Ref
    block_tokens: int

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {
            "text": self.text,
            "shard": self.shard,
            "tokenizer": self.tokenizer.identity,
            "block_tokens": self.block_tokens,
        }


@dataclass(frozen=True)
class FindOverlap(StepRequest):
    """Look for test documents, and 20-word windows of them, in a training text."""

    kind: ClassVar[str] = "overlap"
    label: str
    text: str
    tests: tuple[str, ...]

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"train": self.text, "tests": sorted(self.tests), "window_words": 20}


PrepareRequest: TypeAlias = ReadText | ShuffleTexts | TrainTokenizer | ImportTokenizer | Tokenize | FindOverlap
