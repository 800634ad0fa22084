"""The timeline of a run of a plan, from what it prints and from the manifests in its store.

Times are seconds since the command started. Relies on the words that progress lines begin with
(`label: phase`), on kinds and facts of manifests and on identities in them, and on no field of a recipe.
Knows neither how a run is started nor how busy a machine is.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

PROGRESS = re.compile(
    r"(?:[\d-]+ [\d:]+ [A-Z]+ )?(?P<label>[^:]+): (?P<phase>[a-z]+)(?: update (?P<update>\d+)/(?P<last>\d+) loss \S+)?(?: .*)?"
)
TRAINING_PHASES = {"starting", "loading", "storing"}
TEXT_PHASES = {"reading", "tokenising", "comparing"}
"""Told of a domain's text, under the label that its expert has too."""
AVERAGES = "averages"
IDENTITY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Progress:
    """One progress line: an update is given while a model trains."""

    seconds: float
    label: str
    phase: str
    update: int | None
    last: int | None

    @property
    def is_last(self) -> bool:
        return self.update is not None and self.update == self.last


@dataclass(frozen=True)
class Made:
    """One artifact, by its manifest."""

    seconds: float
    kind: str
    identity: str
    role: str
    mentions: frozenset[str]
    """Identities of other artifacts in its manifest."""


@dataclass(frozen=True)
class Event:
    """Something that happened once."""

    seconds: float
    name: str
    what: str


def parse_line(seconds: float, line: str) -> Progress | None:
    """The progress that a line tells of; None for any other line."""
    found = PROGRESS.fullmatch(line.strip())
    if found is None:
        return None
    if found["update"] is None:
        return Progress(seconds, found["label"], found["phase"], None, None)
    return Progress(seconds, found["label"], found["phase"], int(found["update"]), int(found["last"]))


def read_store(store: Path, began: float) -> tuple[list[Made], dict[str, str]]:
    """The artifacts of a store in a folder, and the names of the forest's models by identity.

    Times are those of the manifests' files, since a manifest's own note has whole seconds only. `began` is
    when the command started, in seconds since the epoch.
    """
    made = []
    for file in store.glob("artifacts/*/*.json"):
        document = json.loads(file.read_text(encoding="utf-8"))
        made.append(made_from(document, file.stat().st_mtime - began))
    names: dict[str, str] = {}
    for file in sorted(store.glob("forest/*.json")):
        names |= forest_names(json.loads(file.read_text(encoding="utf-8"))["body"])
    return sorted(made, key=lambda one: one.seconds), names


def made_from(document: Mapping[str, Any], seconds: float) -> Made:
    """An artifact from its manifest."""
    body = document["body"]
    mentions = set(IDENTITY.findall(json.dumps([body["recipe"], body.get("inputs")]))) - {body["identity"]}
    role = str(body["facts"].get("role", ""))
    return Made(seconds, body["kind"], body["identity"], role, frozenset(mentions))


def forest_names(body: Mapping[str, Any]) -> dict[str, str]:
    """Names of the models that a version of the forest has, by identity."""
    seed = body.get("foundation", {}).get("seed")
    experts = {expert["identity"]: expert["domain"] for expert in body.get("experts", ())}
    return experts | ({seed: "seed"} if seed else {})


def timeline(
    progress: Sequence[Progress], made: Sequence[Made], names: Mapping[str, str], ended: float
) -> list[Event]:
    """Every event of a run, in the order of time."""
    models = {one.identity: _model_name(one, names) for one in made if one.kind == "model"}
    trained = [one for one in made if one.kind == "model" and one.role != "average"]
    events = [
        *_training_events(progress),
        *_first_and_last(
            "text", [one.seconds for one in made if one.kind in ("source", "text", "tokens")], "stored"
        ),
        *(Event(one.seconds, models[one.identity], "stored") for one in trained),
        *_first_and_last(AVERAGES, [one.seconds for one in made if one.role == "average"], "stored"),
        *_score_events(progress, made, models),
    ]
    known = {"source", "text", "tokens", "model", "scores"}
    for kind in sorted({one.kind for one in made} - known):
        events += _first_and_last(kind, [one.seconds for one in made if one.kind == kind], "stored")
    return sorted([*events, Event(ended, "verdict", "printed")], key=lambda event: event.seconds)


def first_update(events: Iterable[Event]) -> float | None:
    """When the seed's first update was told of."""
    return next(
        (event.seconds for event in events if (event.name, event.what) == ("seed", "first update")), None
    )


def last_score(events: Iterable[Event]) -> float | None:
    """When the last score was stored."""
    return max((event.seconds for event in events if event.what == "last score stored"), default=None)


def longest_waits(events: Sequence[Event], count: int = 10) -> list[tuple[float, Event, Event]]:
    """The longest stretches between an event and the next, as (seconds, from, to), longest first."""
    pairs = [(later.seconds - earlier.seconds, earlier, later) for earlier, later in pairwise(events)]
    return sorted(pairs, key=lambda pair: -pair[0])[:count]


def _model_name(one: Made, names: Mapping[str, str]) -> str:
    if one.role == "average":
        return AVERAGES
    return names.get(one.identity) or one.role or one.identity[:8]


def _training_events(progress: Sequence[Progress]) -> list[Event]:
    """The first line of each phase of each training, its first update and its last."""
    trains = {one.label for one in progress if one.update is not None or one.phase in TRAINING_PHASES}
    seen: dict[tuple[str, str], Event] = {}
    for one in progress:
        if one.label not in trains or one.phase in TEXT_PHASES:
            continue
        whats = (
            [one.phase] if one.update is None else ["first update", *(["last update"] if one.is_last else [])]
        )
        for what in whats:
            seen.setdefault((one.label, what), Event(one.seconds, one.label, what))
    return list(seen.values())


def _score_events(
    progress: Sequence[Progress], made: Sequence[Made], models: Mapping[str, str]
) -> list[Event]:
    """When scoring began, and each model's first and last score."""
    began = [one.seconds for one in progress if one.phase == "scoring"]
    events = [Event(min(began), "scores", "first task scores")] if began else []
    scored: dict[str, list[float]] = {}
    for one in made:
        if one.kind == "scores":
            for identity in one.mentions & models.keys():
                scored.setdefault(models[identity], []).append(one.seconds)
    for name, times in scored.items():
        events += [
            Event(min(times), name, "first score stored"),
            Event(max(times), name, "last score stored"),
        ]
    return events


def _first_and_last(name: str, times: Sequence[float], what: str) -> list[Event]:
    if not times:
        return []
    if len(times) == 1:
        return [Event(times[0], name, what)]
    count = f"all {len(times)} {what}"
    return [Event(min(times), name, f"first {what}"), Event(max(times), name, count)]
