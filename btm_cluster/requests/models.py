"""Requests that end in a model: of the verbs *train* and *average*, and of *soup*, which looks for an average's weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

from btm_cluster.forest import Parent, identity_of
from btm_cluster.ledger import Ref
from btm_cluster.plan import TrainingPlan
from btm_cluster.requests.request import StepRequest


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
class TrainRequest(StepRequest):
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
    saved_at: int | None = None
    """The update of the training checkpoint whose resources `how` are; None: they are the plan's."""
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
class DemixPart(StepRequest):
    """What a DEMix is for one of its texts, an ordinary model: all that is shared, and that text's feed-forwards."""

    kind: ClassVar[str] = "model"
    label: str
    demix: Ref
    text: str

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"demix": self.demix.identity, "text": self.text}


@dataclass(frozen=True)
class AverageRequest(StepRequest):
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
class SoupRequest(StepRequest):
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
