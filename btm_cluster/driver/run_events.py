"""Gathers what a run does, as its workers tell it: steps, waits, checkpoints, failures, and what they held."""

import threading
import time
from collections.abc import Callable, Hashable

from btm_cluster.ledger.timelines import MOST_CAUSE, MOST_EVENTS, Event, Node, Outcome, Timeline, new_run_name
from btm_cluster.requests.progress import Progress


class RunEvents:
    """The events of one run. Any thread may look at them.

    Of a run of very many steps the short ones are left out, and only counted.
    """

    def __init__(self, command: str = "python", clock: Callable[[], float] = time.time) -> None:
        self.run = new_run_name()
        """The run's name in the store."""
        self._command, self._clock, self._began = command, clock, clock()
        self._nodes: dict[str, Node] = {}
        self._events: list[Event] = []
        self._under_way: dict[Hashable, Event] = {}
        self._stored_in: dict[str, float] = {}
        """How long the last checkpoint of each training took to be stored."""
        self._left_out = 0
        self._gpu_seconds = self._cpu_seconds = 0.0
        self._lock = threading.Lock()

    @property
    def are_any(self) -> bool:
        """Whether anything happened."""
        return bool(self._events or self._under_way)

    def now(self) -> float:
        """Seconds since 1970."""
        return self._clock()

    def knows_node(self, identity: str) -> bool:
        """Whether a machine was told of."""
        return identity in self._nodes

    def add_node(self, identity: str, node: Node) -> None:
        """Tells of a machine."""
        with self._lock:
            self._nodes[identity] = node

    def add(self, event: Event) -> None:
        """Tells of something that is over."""
        with self._lock:
            if event.holds:
                self._gpu_seconds += event.seconds * event.gpus
                self._cpu_seconds += event.seconds * event.cpus
            self._events.append(event)
            if len(self._events) >= 2 * MOST_EVENTS:
                self._left_out += len(self._events) - MOST_EVENTS
                self._events = _longest(self._events)

    def add_stop(self, asked: float, cause: str = "SIGTERM or Ctrl-C") -> None:
        """Tells that the run was asked to stop then, and has stopped now."""
        known = {"what": "stop", "kind": "run", "label": self._command, "process": "driver"}
        self.add(Event.model_validate(known | {"began": asked, "ended": self.now(), "cause": cause}))

    def begin(self, key: Hashable, event: Event) -> None:
        """Tells of something that is under way, whose end is not known yet."""
        with self._lock:
            self._under_way[key] = event

    def end(self, key: Hashable) -> Event | None:
        """Takes back what `begin` told, with now as its end; whoever knows better adds it."""
        with self._lock:
            event = self._under_way.pop(key, None)
        return event and event.model_copy(update={"ended": max(event.began, self.now())})

    def watch(self, progress: Progress) -> None:
        """Hears of checkpoints by the progress of a training, to the second."""
        seconds, stall = progress.upload_seconds, progress.stall_seconds or 0.0
        if seconds is None or self._stored_in.get(progress.label) == seconds:
            return
        self._stored_in[progress.label] = seconds
        now, training = self.now(), self._training(progress.label)
        if training is not None:
            known = {"what": "checkpoint", "began": now - seconds - stall, "ended": now}
            self.add(training.model_copy(update=known | {"cause": f"training stalled for {stall:.3g} s"}))

    def held(self) -> tuple[float, float]:
        """GPU-seconds and CPU-seconds that were held until now."""
        now = self.now()
        with self._lock:
            under_way = [one for one in self._under_way.values() if one.holds]
            gpus = sum(max(0.0, now - one.began) * one.gpus for one in under_way)
            cpus = sum(max(0.0, now - one.began) * one.cpus for one in under_way)
            return self._gpu_seconds + gpus, self._cpu_seconds + cpus

    def timeline(self, outcome: Outcome = "running") -> Timeline:
        """All that happened until now."""
        now = self.now()
        with self._lock:
            under_way = [
                event.model_copy(update={"ended": max(event.began, now)})
                for event in self._under_way.values()
            ]
            events, nodes = [*self._events, *under_way], dict(self._nodes)
            gpu_seconds, cpu_seconds, left_out = self._gpu_seconds, self._cpu_seconds, self._left_out
        shown = _longest(events)
        return Timeline(
            command=self._command,
            began=self._began,
            ended=now,
            outcome=outcome,
            nodes=nodes,
            events=sorted(shown, key=lambda event: event.began),
            left_out=left_out + len(events) - len(shown),
            gpu_seconds=gpu_seconds + sum(one.seconds * one.gpus for one in under_way if one.holds),
            cpu_seconds=cpu_seconds + sum(one.seconds * one.cpus for one in under_way if one.holds),
        )

    def _training(self, label: str) -> Event | None:
        with self._lock:
            found = (one for one in self._under_way.values() if one.kind == "train" and one.label == label)
            return next(found, None)


def cause_of(text: str) -> str:
    """A cause as an event has it: its first lines, at most so long."""
    return text.strip()[:MOST_CAUSE]


def _longest(events: list[Event]) -> list[Event]:
    """At most MOST_EVENTS: failures and stops first, then whatever took longest."""
    if len(events) <= MOST_EVENTS:
        return events
    return sorted(events, key=lambda event: (event.what not in ("failure", "stop"), -event.seconds))[
        :MOST_EVENTS
    ]
