"""Requests for texts, tokenizers and token blocks, and for what texts have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from btm_cluster.identity import Inputs, Ref
from btm_cluster.plan import ChatTemplate, ReadingPlan, TextPlan, TrainedTokenizerPlan
from btm_cluster.requests.request import StepRequest, texts_of

_SOURCE = {"text", "development", "test", "dataset", "field", "delimiter"}
_READING = {"development_share", "test_share", "longest_document_characters", "bad_documents"}
_TOKENIZER = {"vocabulary", "characters_per_domain"}
WINDOW_WORDS = 20
RENDERING = 2
"""The version of how a rendered conversation becomes tokens that are predicted or read alone.

Raise it where a change must reach blocks that are stored.
"""


@dataclass(frozen=True)
class ReadText(StepRequest):
    """Read a source into documents.

    The artifact names the text, whose identity is that of its documents, as its part.
    """

    kind: ClassVar[str] = "source"
    label: str
    source: TextPlan
    reading: ReadingPlan
    is_target: bool
    fingerprint: Mapping[str, Any]
    """Fingerprint of the source's files or data set, so that unchanged text is not read twice."""
    most_bytes: int | None = None
    """How much is read of a source that is not trusted, decompressed."""
    template: ChatTemplate | None = None
    """Messages are tried on it. They are stored as they are, so that a text is the same by any."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        messages: dict[str, Any] = {}
        if self.source.messages is not None:
            tried_on = None if self.template is None else self.template.sha256
            messages = {"messages": list(self.source.messages), "tried_on": tried_on}
        return messages | {
            "source": self.source.model_dump(mode="json", include=_SOURCE),
            "reading": self.reading.model_dump(mode="json", include=_READING),
            "is_target": self.is_target,
            "fingerprint": self.fingerprint,
        }

    @property
    def source_bytes(self) -> int:
        """Bytes of its files as they are stored; 0 for a data set, whose size is not known."""
        splits = ("text", "development", "test")
        return sum(file[1] for split in splits for file in self.fingerprint.get(split, ()))

    @property
    def inputs(self) -> Inputs:
        return {}


@dataclass(frozen=True)
class ShuffleTexts(StepRequest):
    """Deal the training documents of several texts at random into as many texts,
    and write one of them: a control.

    The artifact names the text, as that of reading a source does.
    """

    kind: ClassVar[str] = "source"
    label: str
    texts: tuple[str, ...]
    part: int
    random_seed: int

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"part": self.part, "random_seed": self.random_seed}

    @property
    def inputs(self) -> Inputs:
        return {"texts": texts_of(self.texts)}


@dataclass(frozen=True)
class TrainTokenizer(StepRequest):
    """Train a byte-level BPE on the training text of several texts."""

    kind: ClassVar[str] = "tokenizer"
    label: str
    texts: tuple[str, ...]
    settings: TrainedTokenizerPlan

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"train": self.settings.model_dump(mode="json", include=_TOKENIZER)}

    @property
    def inputs(self) -> Inputs:
        return {"texts": texts_of(self.texts)}


@dataclass(frozen=True)
class ImportTokenizer(StepRequest):
    """Bring a pretrained tokenizer into the store."""

    kind: ClassVar[str] = "tokenizer"
    label: str
    source: str
    """A folder that every node sees, or a name on the hub."""
    sha256: str
    """The hash of its tokenizer files."""
    first_token: str
    """The token after which every block is read."""
    end_of_text: str

    @property
    def recipe(self) -> Mapping[str, Any]:
        own = {} if self.first_token == self.end_of_text else {"begins_documents": True}
        return {
            "pretrained": self.sha256,
            "first_token": self.first_token,
            "end_of_text": self.end_of_text,
            **own,
        }

    @property
    def inputs(self) -> Inputs:
        return {}


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
    template: ChatTemplate | None = None
    """Renders the text's conversations, where it has any."""

    @property
    def shown(self) -> str:
        return f"{self.label} {self.shard.partition('.')[0]}"

    @property
    def recipe(self) -> Mapping[str, Any]:
        held_out = {} if self.split == "train" else {"bytes_of_documents": True}
        chat = {} if self.template is None else {"template": self.template.sha256, "rendering": RENDERING}
        return {
            "split": self.split,
            "shard": self.shard,
            "block_tokens": self.block_tokens,
            **held_out,
            **chat,
        }

    @property
    def inputs(self) -> Inputs:
        return {"text": (Ref("text", self.text),), "tokenizer": (self.tokenizer,)}


@dataclass(frozen=True)
class FindOverlap(StepRequest):
    """Look for test documents, and 20-word windows of them, in a training text."""

    kind: ClassVar[str] = "overlap"
    label: str
    text: str
    tests: tuple[str, ...]

    @property
    def shown(self) -> str:
        return f"{self.label} with test text"

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"window_words": WINDOW_WORDS}

    @property
    def inputs(self) -> Inputs:
        return {"text": (Ref("text", self.text),), "tests": texts_of(self.tests)}
