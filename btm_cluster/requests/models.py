"""Requests to train models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

from btm_cluster.identity import Inputs, Ref, identity_by, identity_of, plain_inputs
from btm_cluster.plan import ALL, TrainingPlan, Trains
from btm_cluster.requests.request import Resources, StepRequest, texts_of

PROFILE = "profile"
"""The kind of a profiler's trace."""
_TRAINING = {
    "block_tokens",
    "updates",
    "blocks_per_domain_update",
    "learning_rate",
    "warmup_share",
    "betas",
    "epsilon",
    "weight_decay",
    "gradient_clip",
    "random_seed",
}
"""Fields of a plan's `training` that a model's identity hangs on, beside those of `_added`; `seed_share` is in its
first and last update."""


@dataclass(frozen=True)
class TrainingText:
    """A text as training sees it: its identity, and the artifacts of its token blocks in shard order."""

    text: str
    tokens: tuple[Ref, ...]
    split: str = "train"
    first_blocks: int | None = None
    """Train on so many blocks only."""
    development: tuple[Ref, ...] = ()
    """Blocks to take a loss on now and then, which is looked at: no part of any identity."""

    @property
    def name(self) -> str:
        """The name that the order of blocks is drawn by."""
        return self.text if self.split == "train" else f"{self.text}/{self.split}/{self.first_blocks}"


@dataclass(frozen=True)
class Start:
    """Where training starts: a stored model, with its optimiser kept or reset."""

    model: Ref
    keep_optimizer: bool


@dataclass(frozen=True)
class Pretrained:
    """A model from elsewhere: a folder that every node sees or a name on the hub, and the SHA-256 of its
    configuration and weights."""

    source: str
    sha256: str


Role: TypeAlias = Literal["seed", "expert", "transformer-lm", "demix"]


@dataclass(frozen=True)
class TrainRequest(StepRequest):
    """Train a model from update `first_update` to `last_update` on blocks of its
    texts, equally many of each."""

    kind: ClassVar[str] = "model"
    label: str
    role: Role
    """seed, expert, transformer-lm or demix. Shown, and more: a seed on a Transformer-LM's way is called a
    seed, names of actors begin with it, and what is stored under it tells a removal which models are
    baselines. Resources and `restart_data` follow from it in `driver/recipes.py`."""
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
    """Updates on the way at which the model is an artifact too, that of the request which ends there:
    training goes on from the latest one that is there, and commits those that it passes. Seeds and
    Transformer-LM are one such way."""
    snapshots: tuple[int, ...] = ()
    """Updates on the way at which the weights alone are an artifact too, to be
    compared: no training goes on from them."""
    weights_only: bool = False
    """Whether it is such a snapshot.

    That is in its name: a seed that ends at the same update has its optimiser.
    """
    is_demix: bool = False
    """One feed-forward per text in every layer.

    What comes out is a model for each of `parts`, and an artifact that names them.
    """
    trains: Trains = ALL
    """The weights that change. Of less than all, `start` is needed to use what comes out."""
    profile: bool = False
    """Whether a profiler's trace of a few updates is kept beside the model."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        kept = {"weights_only": True} if self.weights_only else {}
        return {**self._trajectory, "last_update": self.last_update, **kept}

    @property
    def _trajectory(self) -> dict[str, Any]:
        """The recipe of a training that does not say how far it goes."""
        return {
            "model": self.model,
            "training": self.training.model_dump(mode="json", include=_TRAINING | self._added),
            "first_update": self.first_update,
            "keep_optimizer": self.start is not None and self.start.keep_optimizer,
            "pretrained": self.pretrained.sha256 if self.pretrained else None,
            "restart_data": self.restart_data,
            "is_demix": self.is_demix,
            "parts_of_texts": [
                [text.split, text.first_blocks] for text in self._ordered if text.split != "train"
            ],
            **self.trains.recipe,
        }

    @property
    def _added(self) -> set[str]:
        """Fields of `training` that stand in a recipe only where they change something: no other model has another
        name for them."""
        rounded = {"weights"} if self.training.weights != "float32" else set()
        return rounded | ({"optimizer"} if self.by_muon else set())

    @property
    def by_muon(self) -> bool:
        """Whether Muon trains the matrices of its layers; an adapter's are AdamW's."""
        return self.training.optimizer == "muon" and self.trains.lora is None

    @property
    def trajectory(self) -> str:
        """The same for all trainings that differ in how far they go: a seed, and
        the Transformer-LM that passes it."""
        return identity_of({"recipe": self._trajectory, "inputs": plain_inputs(self.inputs)})

    @property
    def _ordered(self) -> list[TrainingText]:
        return sorted(self.texts, key=lambda text: text.text)

    @property
    def inputs(self) -> Inputs:
        start = () if self.start is None else (self.start.model,)
        texts = texts_of(tuple(text.text for text in self.texts))
        return {"texts": texts, "tokenizer": (self.tokenizer,), "start": start}

    @property
    def needs(self) -> tuple[Ref, ...]:
        tokens = (ref for text in self.texts for ref in (*text.tokens, *text.development))
        return (self.tokenizer, *self.inputs["start"], *tokens, *self._passed)

    @property
    def priority(self) -> int:
        return int(self.role in ("transformer-lm", "demix"))  # the forest comes before its baselines

    @property
    def group(self) -> Resources:
        return self.how

    @property
    def makes(self) -> tuple[Ref, ...]:
        return (
            self.ref,
            *self._passed,
            *(one.ref for one in self.at_snapshots),
            *(part.ref for part in self.parts),
        )

    @property
    def _passed(self) -> list[Ref]:
        """The models on the way."""
        return [self.until(update).ref for update in self.milestones]

    @property
    def parts(self) -> tuple["DemixPart", ...]:
        """The models that a DEMix is for each text, in order of `texts`."""
        return (
            tuple(DemixPart(self.label, self.ref, text.text) for text in self.texts) if self.is_demix else ()
        )

    def until(self, milestone: int) -> "TrainRequest":
        """The request that ends at a milestone of this one: a seed's, on the Transformer-LM's way."""
        role: Role = "seed" if self.role == "transformer-lm" else self.role
        whole = replace(self, milestones=(), snapshots=(), weights_only=False)
        return replace(whole, label=role, role=role, last_update=milestone)

    @property
    def at_snapshots(self) -> list["TrainRequest"]:
        """The requests that end at the snapshots of this one."""
        snapshot = replace(self, milestones=(), snapshots=(), weights_only=True)
        return [replace(snapshot, last_update=update) for update in sorted(self.snapshots)]

    def passing(self, update: int) -> list["TrainRequest"]:
        """The requests that end at an update on the way of this one: its milestone's
        and its snapshot's, where it has them."""
        milestones = [self.until(update)] if update in self.milestones else []
        return [*milestones, *(one for one in self.at_snapshots if one.last_update == update)]

    @property
    def blocks_per_update(self) -> int:
        """Blocks of all texts together."""
        return len(self.texts) * self.training.blocks_per_domain_update

    @property
    def tokens(self) -> int:
        """Tokens trained on from the first update to the last."""
        return (self.last_update - self.first_update) * self.blocks_per_update * self.training.block_tokens


@dataclass(frozen=True)
class DemixPart(StepRequest):
    """The ordinary model that a DEMix is for one of its texts: all that is
    shared, and that text's feed-forwards."""

    kind: ClassVar[str] = "model"
    label: str
    demix: Ref
    text: str

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"part_of": "demix"}

    @property
    def inputs(self) -> Inputs:
        return {"demix": (self.demix,), "texts": (Ref("text", self.text),)}


@dataclass(frozen=True)
class TraceOf:
    """The name of a profiler's trace of a model's training. It is kept as long as the model is."""

    model: Ref

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {}

    @property
    def inputs(self) -> Inputs:
        return {"model": (self.model,)}

    @property
    def ref(self) -> Ref:
        """The artifact."""
        return Ref(PROFILE, identity_by(PROFILE, self.recipe, self.inputs))
