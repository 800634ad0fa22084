"""A run's timeline as numbers: lanes of bars, how many devices were busy when, and what it cost.

Knows nothing of how it is drawn.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from btm_cluster.ledger.timelines import Event, Timeline
from btm_cluster.report.drawing import duration

MOST_LANES = 40
TASK = "task"
"""Name of processes that run steps of any kind."""
READING = ("reading, tokenising", 2)
OTHER_PROCESSES: Mapping[str, str] = {TASK: "other steps", "merge": "averages"}
STEPS: Mapping[str, tuple[str, int]] = {
    "train": ("training", 0),
    "score": ("scoring", 1),
    "read_text": READING,
    "shuffle_texts": READING,
    "train_tokenizer": READING,
    "import_tokenizer": READING,
    "tokenize": READING,
    "find_overlap": READING,
}
"""Activity in the legend by step name, and the number of its colour."""
OTHER_STEPS = ("fitting, mixing, averaging", 3)
WAITING = "waiting for capacity"
OTHER_EVENTS: Mapping[str, tuple[str, int]] = {
    "start": ("starting", 4),
    "wait": (WAITING, 7),
    "checkpoint": ("checkpoint", 5),
    "failure": ("failure", 6),
    "stop": ("stopped", 6),
}


@dataclass(frozen=True)
class Bar:
    """Something that took time in a lane, in seconds since the run began."""

    what: str
    colour: int
    start: float
    end: float
    tip: str


@dataclass(frozen=True)
class Lane:
    """A process of a node: bars that do not overlap, and moments that lie over them."""

    name: str
    bars: tuple[Bar, ...]
    marks: tuple[Bar, ...]


@dataclass(frozen=True)
class Busy:
    """Devices that were at a step, over time."""

    device: str
    total: float
    steps: tuple[tuple[float, float], ...]
    """From each second on, so many."""
    used_seconds: float
    """Device-seconds of steps."""
    whole_seconds: float
    """Device-seconds of the whole run."""

    @property
    def idle(self) -> float:
        """The share of device-seconds in which there was no step."""
        return max(0.0, 1 - self.used_seconds / self.whole_seconds) if self.whole_seconds else 0.0


def seconds_of(timeline: Timeline) -> float:
    """Seconds that the run took."""
    return max(timeline.ended - timeline.began, 1e-3)


def lanes_of(timeline: Timeline) -> tuple[list[Lane], int]:
    """The lanes with the most to show, in order of nodes and processes, and how many were left out."""
    trained: dict[str, dict[str, str]] = {}  # by process and label, in the order of trainings
    for event in sorted(timeline.events, key=lambda event: event.ended):
        if event.kind == "train":
            trained.setdefault(event.process, {}).setdefault(event.label, _model_name(event))
    nodes = {
        event.process: event.node for event in timeline.events if event.node and event.process in trained
    }
    grouped: dict[tuple[str, str], list[Event]] = {}
    waiting: list[Event] = []
    for event in timeline.events:
        # A trainer's first model waits in the lane that it has later.
        key = event.node or nodes.get(event.process)
        is_first = event.label == next(iter(trained.get(event.process, {})), None)
        if key is None or (event.what == "wait" and not is_first):
            waiting.append(event)
        else:
            node = timeline.nodes[key].name if key in timeline.nodes else key
            name = _process_name(event.process, list(trained.get(event.process, {}).values()))
            grouped.setdefault((node, name), []).append(event)
    several = len({node for node, _ in grouped}) > 1
    first = {key: min(event.began for event in events) for key, events in grouped.items()}
    lanes = [
        lane
        for node, name in sorted(grouped, key=lambda key: (key[0], first[key], key[1]))
        for lane in _lanes(f"{name} on {node}" if several else name, grouped[node, name], timeline.began)
    ]
    lanes += _waiting(waiting, timeline.began)
    by_work = sorted(range(len(lanes)), key=lambda n: -sum(bar.end - bar.start for bar in lanes[n].bars))
    busiest = sorted(by_work[:MOST_LANES])
    return [lanes[number] for number in busiest], len(lanes) - len(busiest)


def _model_name(training: Event) -> str:
    return f"expert {training.label}" if training.role == "expert" else training.label


def _process_name(process: str, models: Sequence[str]) -> str:
    """The name of a process: of a trainer that of its models, since Ray's names have hashes."""
    if models:
        return models[0] if len(models) == 1 else f"{models[0]} and {len(models) - 1} more"
    return OTHER_PROCESSES.get(process.partition("-")[0], process)


def _lanes(name: str, events: Iterable[Event], began: float) -> Iterator[Lane]:
    """Lanes of one process; tasks of a node that run at once lie in several."""
    lanes: list[list[Bar]] = []
    marks: list[Bar] = []
    for event in sorted(events, key=lambda event: (event.began, event.ended)):
        bar = _bar(event, began)
        if event.what in ("checkpoint", "failure", "stop"):
            marks.append(bar)
            continue
        if bar.what == WAITING and lanes:  # while its process starts, that is what it waits for
            bar = replace(bar, start=max(bar.start, lanes[0][-1].end))
            if bar.start >= bar.end:
                continue
        free = next((lane for lane in lanes if _ends_before(lane[-1], bar)), None)
        if free is None:
            lanes.append(free := [])
        elif free[-1].end > bar.start:
            free[-1] = replace(free[-1], end=bar.start)
        free.append(bar)
    for number, bars in enumerate(lanes or [[]], 1):
        own = name if len(lanes) < 2 else f"{number}. {name}"
        yield Lane(own, tuple(bars), tuple(marks) if number == 1 else ())


def _ends_before(earlier: Bar, later: Bar) -> bool:
    """Whether a bar is over when another begins. A wait is, whatever begins: only trainings wait in a lane."""
    return (earlier.what == WAITING and later.what != WAITING) or earlier.end <= later.start + 1e-3


def _waiting(events: Iterable[Event], began: float) -> Iterator[Lane]:
    """One lane for all that waits at once and has no process yet."""
    bars: list[Bar] = []
    for event in sorted(events, key=lambda event: event.began):
        bar = _bar(event, began)
        if bars and bars[-1].what == bar.what and bar.start <= bars[-1].end:
            tip = f"{bars[-1].what}: several steps at once"
            bar = Bar(bar.what, bar.colour, bars[-1].start, max(bars[-1].end, bar.end), tip)
            bars.pop()
        bars.append(bar)
    if bars:
        yield Lane("waiting steps", tuple(bars), ())


def what_of(event: Event) -> tuple[str, int]:
    """Its name in the legend, and the number of its colour."""
    return STEPS.get(event.kind, OTHER_STEPS) if event.what == "step" else OTHER_EVENTS[event.what]


def _bar(event: Event, began: float) -> Bar:
    what, colour = what_of(event)
    tip = f"{event.label}: {what}, {duration(event.seconds)}"
    if event.attempt > 1:
        tip += f", attempt {event.attempt}"
    if event.cause:
        tip += f", {event.cause}"
    return Bar(what, colour, event.began - began, event.ended - began, tip)


def busy_of(timeline: Timeline) -> Busy:
    """How many GPUs were at a step; CPUs of a run without GPUs."""
    on_gpus = any(node.gpus for node in timeline.nodes.values())
    total = sum(node.gpus if on_gpus else node.cpus for node in timeline.nodes.values())
    changes: dict[float, float] = {0.0: 0.0}
    used = 0.0
    for event in timeline.events:
        count = event.gpus if on_gpus else event.cpus
        if event.what == "step" and count:
            start, end = event.began - timeline.began, event.ended - timeline.began
            changes[start] = changes.get(start, 0.0) + count
            changes[end] = changes.get(end, 0.0) - count
            used += count * event.seconds
    steps, now = [], 0.0
    for second, change in sorted(changes.items()):
        now += change
        steps.append((second, min(max(0.0, now), total)))  # averages share a process, and its CPU
    return Busy("GPUs" if on_gpus else "CPUs", total, tuple(steps), used, total * seconds_of(timeline))


def totals(timeline: Timeline) -> list[tuple[str, int, float]]:
    """Count and seconds of each activity, the longest first."""
    counted: dict[str, tuple[int, float]] = {}
    for event in timeline.events:
        what, _ = what_of(event)
        count, seconds = counted.get(what, (0, 0.0))
        counted[what] = (count + 1, seconds + event.seconds)
    return sorted(((what, *both) for what, both in counted.items()), key=lambda one: -one[2])


def mishaps(timeline: Timeline) -> list[Event]:
    """Attempts that failed, and stops."""
    return [event for event in timeline.events if event.what in ("failure", "stop")]
