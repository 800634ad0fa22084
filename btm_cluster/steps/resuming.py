"""Where a training goes on from, its state loaded from there, and the numerics
profiles that it has run under so far.

A profile is kept as spans of updates, since results depend on it: one span is written as the profile alone.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from btm_cluster.errors import IntegrityError, MissingError
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.language_model.training_state import TrainingState, build_state
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.requests import Resources, TrainRequest
from btm_cluster.steps.checkpoints import load_curve, load_stored
from btm_cluster.steps.stored import open_weights

log = logging.getLogger(__name__)
SPAN = ("first_update", "last_update")


@dataclass(frozen=True)
class Source:
    """The state to load before the first update, and the update to go on from.

    Without one, weights are drawn.
    """

    update: int
    stored: Artifact | None = None
    keep_optimizer: bool = True

    @property
    def is_checkpoint(self) -> bool:
        return self.stored is not None and self.stored.kind == "training"

    def is_on_the_way(self, request: TrainRequest) -> bool:
        """Whether it is of this training, and not what it starts from."""
        return self.is_checkpoint or self.update > request.first_update


class AlreadyTrained(Exception):
    """Another driver has committed the model since it was looked for, and its
    training checkpoints are gone."""


def restore(
    request: TrainRequest, spec: TrainingSpec, ledger: Ledger, group: ProcessGroup
) -> tuple[TrainingState, Source, set[str]]:
    """The state to go on from: the last training checkpoint that can be read,
    the last milestone, or the start.

    All ranks of a group load the same, or all pass it over. A checkpoint may be dropped by another driver
    while it is read here: then there is a newer one, or the model. Returns, too, the manifest hashes of
    checkpoints passed over.

    Raises:
        AlreadyTrained: there is nothing left to train.
    """
    passed_over: set[str] = set()
    while True:
        source = _agree_on_source(request, ledger, group, passed_over)
        # Anew after a failure, which may have loaded a part of it.
        is_drawn = source.stored is None
        state = build_state(spec, group, _base_of(request, ledger), draws_weights=is_drawn)
        damaged = not _loads(state, source, ledger, request.label)
        if not any(group.any(damaged)):
            if source.stored is not None and source.is_on_the_way(request):
                load_curve(state, ledger, source.stored, request.label)
            return state, source, passed_over
        assert source.stored is not None
        passed_over.add(source.stored.manifest_hash)
        del state


def _base_of(request: TrainRequest, ledger: Ledger) -> StoredWeights | None:
    """The weights of which a part is trained; None where all are."""
    if not request.trains.is_delta:
        return None
    assert request.start is not None, "what changes is a part of a model that is there"
    return open_weights(ledger, ledger.get(request.start.model))


def _agree_on_source(
    request: TrainRequest, ledger: Ledger, group: ProcessGroup, passed_over: Collection[str]
) -> Source:
    """The source that the first rank finds."""
    found = group.from_first(group.made_by_first(lambda: find_source(request, ledger, passed_over)))
    assert found is not None
    return found


def _loads(state: TrainingState, source: Source, ledger: Ledger, label: str) -> bool:
    """Fills `state` from its source; False where that is a training checkpoint which cannot be read: it was
    made here, and can be made again."""
    if source.stored is None:
        return True
    try:
        load_stored(state, source.update, ledger, source.stored, source.keep_optimizer)
    except (IntegrityError, MissingError) as exc:
        if not source.is_checkpoint:
            raise
        words = "%s: passed over, its training checkpoint is damaged (update %d): %s"
        log.warning(words, label, source.update, exc)
        return False
    return True


def find_source(request: TrainRequest, ledger: Ledger, passed_over: Collection[str] = ()) -> Source:
    """The last training checkpoint or milestone, or else the start.

    `passed_over` are manifest hashes of checkpoints.

    Raises:
        AlreadyTrained: there is nothing left to train.
    """
    saved = ledger.latest_training(request.ref.identity, passed_over)
    passed = {update: ledger.find(request.until(update).ref) for update in request.milestones}
    milestone, model = max(((u, found) for u, found in passed.items() if found), default=(-1, None))
    if saved is not None and int(saved.recipe["update"]) > milestone:
        return Source(int(saved.recipe["update"]), saved)
    if ledger.find(request.ref) is not None:  # committed first, cleared afterwards: so it is looked for last
        raise AlreadyTrained
    if model is not None:
        return Source(milestone, model)
    if request.start is not None:
        return Source(request.first_update, ledger.get(request.start.model), request.start.keep_optimizer)
    return Source(request.first_update)


def profile_of(how: Resources) -> dict[str, Any]:
    """The numerics profile: all that results depend on beside the recipe."""
    device = "cuda" if how.gpus_per_worker > 0 else "cpu"
    return how.facts | {"torch": torch.__version__, "device": device}


def profiles(earlier: Sequence[Mapping[str, Any]], update: int, how: Resources, last: int) -> dict[str, Any]:
    """For an artifact's facts: the profile of all updates until `last`, or a list
    of spans where there were several.

    `earlier` are the spans until `update`, from which on `how` was in force.
    """
    spans = [dict(span) for span in earlier]
    span = {"first_update": update, "last_update": last, **profile_of(how)}
    if spans and _profile(spans[-1]) == _profile(span):
        spans[-1]["last_update"] = last
    elif last > update or not spans:
        spans.append(span)
    return {"profile": spans if len(spans) > 1 else _profile(spans[0])}


def earlier_spans(source: Source, first_update: int) -> list[dict[str, Any]]:
    """The spans of this training until the update that it goes on from."""
    if source.stored is None or source.update == first_update:
        return []
    facts = source.stored.facts
    # Checkpoints of before kept no profile.
    profile = facts.get("profile") or profile_of(Resources(**facts["how"]))
    if isinstance(profile, list):
        return [dict(span) for span in profile]
    return [{"first_update": first_update, "last_update": source.update, **profile}]


def measured_before(source: Source, request: TrainRequest, gpus: float) -> tuple[float, float]:
    """Tokens and seconds of this training that were measured until its source, on as many GPUs: of the milestone that
    it goes on from. A training checkpoint has none."""
    if source.stored is None or source.is_checkpoint or not source.is_on_the_way(request):
        return 0.0, 0.0
    note = source.stored.note
    if note.get("gpus") != gpus or "seconds" not in note:
        return 0.0, 0.0
    return note["tokens_per_second"] * note["seconds"], note["seconds"]


def _profile(span: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in span.items() if name not in SPAN}
