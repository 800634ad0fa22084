"""Requests and a clock for tests of how a run's progress is counted, estimated and shown."""

from dataclasses import dataclass

from btm_cluster.ledger import Artifact, Ref
from btm_cluster.plan import ReadingPlan, TextPlan, TrainingPlan
from btm_cluster.requests import ReadText, Resources, Role, ScoreRequest, Tokenize, TrainingText, TrainRequest
from btm_cluster.requests.progress import Progress

HOW = Resources(1, 1.0, 1, 1, "float32", False)
BLOCK_TOKENS = 100
TOKENIZER = Ref("tokenizer", "7" * 64)


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def training(label: str, role: Role = "expert", first: int = 100, last: int = 200) -> TrainRequest:
    """A training of so many updates, 100 tokens each."""
    plan = TrainingPlan(
        block_tokens=BLOCK_TOKENS, blocks_per_domain_update=1, updates=last, learning_rate=1e-3
    )
    texts = (TrainingText(label * 8, ()),)
    return TrainRequest(
        label=label,
        role=role,
        model={},
        tokenizer=TOKENIZER,
        texts=texts,
        training=plan,
        first_update=first,
        last_update=last,
        start=None,
        pretrained=None,
        restart_data=False,
        how=HOW,
        checkpoint_seconds=600.0,
    )


def reading(label: str, size_bytes: int = 1000) -> ReadText:
    """A source of so many bytes."""
    source = TextPlan(name=label, text=(f"{label}.jsonl",))
    return ReadText(label, source, ReadingPlan(), False, {"text": [[f"{label}.jsonl", size_bytes, 0]]})


def tokenising(text: str) -> Tokenize:
    """A text's development shard."""
    return Tokenize(text, text * 8, "development", "development-00000.jsonl.zst", TOKENIZER, BLOCK_TOKENS)


def scoring(text: str, model: TrainRequest) -> ScoreRequest:
    """The development text of a text under a model."""
    return ScoreRequest(text, model.label, model.ref, (tokenising(text).ref,), HOW)


def made(ref: Ref, **facts: object) -> Artifact:
    """An artifact, as far as progress looks at it."""
    return Artifact(ref.kind, ref.identity, {}, {}, (), facts, {}, (), "0" * 64)


def at_update(request: TrainRequest, update: int, loss: float = 3.0) -> Progress:
    """The report of a training."""
    return Progress(
        request.label,
        "training",
        update,
        request.last_update,
        "updates",
        first=request.first_update,
        loss=loss,
        tokens_per_second=4_782.0,
        seconds_left=84.0,
    )
