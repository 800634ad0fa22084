"""The port between the driver and whoever does the work: five verbs, and the records that cross.

A request names what it is made from, so its recipe is its identity; how it is made (`how`, labels) is no part of it.
Records are a few kB; weights, tokens and scores go through the store. `on_ray/` and `in_process.py` implement the port.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from btm_cluster.forest import Parent, identity_of
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.plan import ReadingPlan, TextPlan, TrainedTokenizerPlan, TrainingPlan


class _Request(ABC):
    """What every request has: a label to show, and the artifact that it asks for."""

    kind: ClassVar[str]
    label: str

    @property
    @abstractmethod
    def recipe(self) -> Mapping[str, Any]:
        """What the artifact is made from: its identity is this one's hash."""

    @property
    def ref(self) -> Ref:
        return Ref(self.kind, identity_of(self.recipe))


@dataclass(frozen=True)
class ReadText(_Request):
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
class ShuffleTexts(_Request):
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
class TrainTokenizer(_Request):
    """Train a byte-level BPE on the training text of the founding domains."""

    kind: ClassVar[str] = "tokenizer"
    label: str
    texts: tuple[str, ...]
    settings: TrainedTokenizerPlan

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"train": self.settings.model_dump(mode="json"), "texts": sorted(self.texts)}


@dataclass(frozen=True)
class ImportTokenizer(_Request):
    """Bring a pretrained tokenizer into the store."""

    kind: ClassVar[str] = "tokenizer"
    label: str
    source: str
    """A folder that every node sees, or a name on the hub."""
    sha256: str
    """Of its tokenizer files."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"pretrained": self.sha256}


@dataclass(frozen=True)
class Tokenize(_Request):
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
class FindOverlap(_Request):
    """Look for test documents, and 20-word windows of them, in a training text."""

    kind: ClassVar[str] = "overlap"
    label: str
    text: str
    tests: tuple[str, ...]

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"train": self.text, "tests": sorted(self.tests), "window_words": 20}


PrepareRequest: TypeAlias = ReadText | ShuffleTexts | TrainTokenizer | ImportTokenizer | Tokenize | FindOverlap


@dataclass(frozen=True)
class TrainingText:
    """A text as training sees it: its identity, and the artifacts of its training blocks in shard order."""

    identity: str
    tokens: tuple[Ref, ...]
    first_blocks: int | None = None
    """Train on so many blocks only; the identity says so too."""


@dataclass(frozen=True)
class Start:
    """Where training starts: a stored model, with its optimiser kept or reset."""

    model: Ref
    parents: tuple[Parent, ...]
    keep_optimizer: bool


@dataclass(frozen=True)
class Resources:
    """How a model is trained. Fixed at a model's first start and kept by its retries, since results depend on it."""

    workers: int
    gpus_per_worker: float
    cpus_per_worker: int
    micro_batch_blocks: int
    precision: str
    compile: bool


@dataclass(frozen=True)
class Pretrained:
    """A model from elsewhere: a folder that every node sees or a name on the hub, and the SHA-256 of its configuration and
    weights."""

    source: str
    sha256: str


Role: TypeAlias = Literal["seed", "expert", "transformer-lm", "demix"]


@dataclass(frozen=True)
class TrainRequest(_Request):
    """Train a model from update `first_update` to `last_update` on blocks of its texts, equally many of each."""

    kind: ClassVar[str] = "model"
    label: str
    role: Role
    """seed, expert, transformer-lm or demix. Shown, and more: a milestone of a Transformer-LM is called a seed, names of actors
    begin with it, and what is stored under it tells a removal which models are baselines. Resources and `restart_data` follow
    from it in `recipes.py`."""
    model: Mapping[str, Any]
    """The transformers configuration in full."""
    tokenizer: Ref
    texts: tuple[TrainingText, ...]
    training: TrainingPlan
    first_update: int
    last_update: int
    start: Start | None
    pretrained: Pretrained | None
    restart_data: bool
    """Count blocks from the branch point (an expert) and not from update 0 (the Transformer-LM)."""
    how: Resources
    checkpoint_seconds: float
    milestones: tuple[int, ...] = ()
    """Updates on the way at which the model is an artifact too, that of the request which ends there: training goes on from
    the latest one that is there, and commits those that it passes. Seeds and Transformer-LM are one such way."""
    is_demix: bool = False
    """One feed-forward per text in every layer. What comes out is a model for each of `parts`, and an artifact that names them."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        start = None
        if self.start is not None:
            parents = [asdict(parent) for parent in self.start.parents]
            start = {"parents": parents, "keep_optimizer": self.start.keep_optimizer}
        recipe = {
            "model": self.model,
            "tokenizer": self.tokenizer.identity,
            "texts": sorted(text.identity for text in self.texts),
            "training": self.training.model_dump(mode="json", exclude={"seed_share"}),  # the updates say it
            "first_update": self.first_update,
            "last_update": self.last_update,
            "start": start,
            "pretrained": self.pretrained.sha256 if self.pretrained else None,
            "restart_data": self.restart_data,
        }
        return recipe | {"is_demix": True} if self.is_demix else recipe

    @property
    def parts(self) -> tuple["DemixPart", ...]:
        """Of a DEMix: the models that it is for each text, in order of `texts`."""
        return tuple(DemixPart(self.label, self.ref, text.identity) for text in self.texts) if self.is_demix else ()

    def until(self, milestone: int) -> "TrainRequest":
        """The request that ends at a milestone of this one: a seed's, on the Transformer-LM's way."""
        role: Role = "seed" if self.role == "transformer-lm" else self.role
        return replace(self, label=role, role=role, last_update=milestone, milestones=())

    @property
    def blocks_per_update(self) -> int:
        """Blocks of all texts together."""
        return len(self.texts) * self.training.blocks_per_domain_update

    @property
    def tokens(self) -> int:
        """Tokens trained on from the first update to the last."""
        return (self.last_update - self.first_update) * self.blocks_per_update * self.training.block_tokens


def way_of(recipe: Mapping[str, Any]) -> str:
    """The same for all trainings that differ in how far they go: a seed, and the Transformer-LM that passes it."""
    return identity_of({name: value for name, value in recipe.items() if name != "last_update"})


@dataclass(frozen=True)
class DemixPart(_Request):
    """What a DEMix is for one of its texts, an ordinary model: all that is shared, and that text's feed-forwards."""

    kind: ClassVar[str] = "model"
    label: str
    demix: Ref
    text: str

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"demix": self.demix.identity, "text": self.text}


@dataclass(frozen=True)
class ScoreRequest(_Request):
    """Score one split of one text under one model: a log-probability and an entropy per token."""

    kind: ClassVar[str] = "scores"
    label: str
    model: Ref
    tokens: tuple[Ref, ...]
    how: Resources

    @property
    def recipe(self) -> Mapping[str, Any]:
        tokens = [ref.identity for ref in self.tokens]
        return {"model": self.model.identity, "tokens": tokens, "of_each_token": ["logp", "entropy"]}


@dataclass(frozen=True)
class AverageRequest(_Request):
    """Average models into one."""

    kind: ClassVar[str] = "model"
    label: str
    parents: tuple[Parent, ...]
    card: Mapping[str, str]
    """For the model card: the plan's name, and the parents' domains by identity."""
    unrelated: bool = False
    """Average models without a common ancestor too: a control, whose result is noise."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"average": [asdict(parent) for parent in sorted(self.parents, key=lambda p: p.identity)]}


@dataclass(frozen=True)
class SoupRequest(_Request):
    """Search for the weights by which an average of models does best on development text.

    The artifact's facts hold them by model identity; the model itself is then an AverageRequest's.
    """

    kind: ClassVar[str] = "soup"
    label: str
    strategy: Literal["greedy", "learned"]
    models: tuple[Ref, ...]
    """The experts, and the seed where it may have a part in it: any models with a common ancestor."""
    tokens: tuple[Ref, ...]
    blocks: int
    """How many development blocks are looked at, at most."""
    starts: tuple[tuple[Parent, ...], ...]
    """Averages from which `learned` sets out too, beside the best expert and the uniform one: the prior's, for instance."""
    how: Resources

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {
            "strategy": self.strategy,
            "models": sorted(model.identity for model in self.models),
            "tokens": [ref.identity for ref in self.tokens],
            "blocks": self.blocks,
            "starts": [[asdict(parent) for parent in sorted(start, key=lambda p: p.identity)] for start in self.starts],
        }


Request: TypeAlias = PrepareRequest | TrainRequest | ScoreRequest | AverageRequest | SoupRequest


@dataclass(frozen=True)
class Failure:
    """A request that could not be met; its siblings go on."""

    label: str
    attempts: int
    where: str
    cause: str


Outcome: TypeAlias = Artifact | Failure


@dataclass(frozen=True)
class Progress:
    """A sign of life of one training: what the live line shows."""

    label: str
    phase: str
    update: int = 0
    first_update: int = 0
    last_update: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    stall_seconds: float | None = None
    """How long training stood still for its last checkpoint."""
    upload_seconds: float | None = None
    """How long that checkpoint then took to be stored, while training went on."""
    mfu: float | None = None
    """Share of the GPUs' arithmetic that the model uses, where their peak is known."""


class Control(Protocol):
    """What a step may say and ask while it runs."""

    def report(self, progress: Progress) -> None:
        """Says how far it is."""

    def stopping(self) -> bool:
        """Whether to save and stop at the next update."""

    def saving(self) -> bool:
        """Whether to save at the next update and go on: this machine was told that it will be taken away."""


Watcher: TypeAlias = Callable[[Progress], None]


class Workers(Protocol):
    """The verbs. Each takes any number of requests and returns an outcome for each, in order; none cancels another.

    A user's mistake (UserError) and a stop (Stopped) are raised, not returned.
    """

    def prepare(self, requests: Sequence[PrepareRequest]) -> list[Outcome]:
        """Text to token blocks."""

    def train(self, requests: Sequence[TrainRequest]) -> list[Outcome]:
        """Token blocks to models."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Models and token blocks to token log-probabilities."""

    def average(self, requests: Sequence[AverageRequest]) -> list[Outcome]:
        """Models to one model."""

    def soup(self, requests: Sequence[SoupRequest]) -> list[Outcome]:
        """Models and token blocks to the weights of an average."""
