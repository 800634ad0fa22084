"""Progress of a run and its time left: from the requests, their outcomes, and the pace of this run.

Work of models is counted in tokens that pass forward through one: a token that is trained on passes three
times, since going back costs twice as much. Any other step counts as one, and reading in bytes. Nothing is
estimated before a model's pace is known. Knows nothing of how it is shown.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.driver.step_kinds import Kind, kind_of
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.requests import ReadText, Resources, ScoreRequest, StepRequest, Tokenize, TrainRequest
from btm_cluster.requests.progress import Phase, Progress

PASSES_OF_TRAINING = 3
SECONDS_OF_OTHER_STEPS = 1.0
"""Assumed duration of a step that passes no token through a model, before one of its kind has ended."""
MEASURED_SECONDS = 5.0
"""A step under way tells its pace once it was counted for so long."""
NOT_AT_WORK: tuple[Phase, ...] = ("waiting", "starting", "warming up")
AtOnce = Callable[[Resources | None], int]
"""How many groups of such resources the workers can hold at once; None is one CPU."""


@dataclass
class _Step:
    request: StepRequest
    kind: Kind
    is_expected: bool = False
    """Known from a dry run, and not asked for yet."""
    is_done: bool = False
    is_failed: bool = False


@dataclass
class _Job:
    """Steps that one process does, by the name that their progress goes by."""

    began: float
    counted_from: float
    latest: Progress
    first_share: float = 0.0
    heard_at: float = 0.0
    ended_work: float = 0.0

    def hear(self, progress: Progress, now: float) -> None:
        if self.latest.phase in NOT_AT_WORK:
            self.began = now
        if progress.phase != self.latest.phase or (progress.share or 0.0) < self.first_share:
            self.counted_from, self.first_share = now, progress.share or 0.0
        self.latest, self.heard_at = progress, now

    def measured(self) -> tuple[float, float] | None:
        """Seconds, and the share of the job that they took; None where it is too early to say."""
        seconds, share = self.heard_at - self.counted_from, (self.latest.share or 0.0) - self.first_share
        return (seconds, share) if seconds >= MEASURED_SECONDS and share > 0 else None


@dataclass
class _Pace:
    """Seconds of a group of one worker, and the work done in them."""

    seconds: float = 0.0
    work: float = 0.0

    def add(self, seconds: float, work: float) -> None:
        self.seconds, self.work = self.seconds + seconds, self.work + work


@dataclass(frozen=True)
class Count:
    """The steps of a kind: how many there are, are done, and have failed."""

    kind: Kind
    done: int
    failed: int
    total: int
    is_asked: bool
    """Whether any of them was asked for, and not only expected."""


@dataclass
class Outlook:
    """Told of every request, report and outcome of a run, it says how many steps of each kind are done and
    how long the rest takes."""

    at_once: AtOnce = lambda _: 1
    clock: Callable[[], float] = time.monotonic
    _steps: dict[Ref, _Step] = field(default_factory=dict)
    _jobs: dict[str, _Job] = field(default_factory=dict)
    _paces: defaultdict[Kind, _Pace] = field(default_factory=lambda: defaultdict(_Pace))
    _tokens: dict[Ref, int] = field(default_factory=dict)
    _open: Counter[str] = field(default_factory=Counter)
    """How many steps of a name have not ended."""
    _unfinished: Counter[Kind] = field(default_factory=Counter)
    _ended_jobs: int = 0
    _busy_seconds: float = 0.0
    _idle_seconds: float = 0.0
    """In which something was asked for and nothing was at work: processes take time to start."""
    _looked: float | None = None

    # What it is told

    def expect(self, requests: Iterable[StepRequest]) -> None:
        """These are still to be made, as far as is known before texts are read."""
        for request in requests:
            self._steps.setdefault(request.ref, _Step(request, kind_of(request), is_expected=True))

    def found(self, request: StepRequest, artifact: Artifact) -> None:
        """This was there already."""
        self._learn(request, artifact)
        self._steps[request.ref] = _Step(request, kind_of(request), is_done=True)

    def ask(self, requests: Sequence[StepRequest]) -> None:
        """These are made now. They take the place of what was expected of their kinds."""
        kinds = {kind_of(request) for request in requests}
        for ref in [ref for ref, one in self._steps.items() if one.is_expected and one.kind in kinds]:
            del self._steps[ref]
        for request in requests:
            self._steps[request.ref] = _Step(request, kind_of(request))
        self._open.update(request.shown for request in requests)
        self._unfinished.update(map(kind_of, requests))

    def hear(self, progress: Progress) -> None:
        """A progress report: of steps that have not ended, since some arrive late."""
        if progress.label not in self._open:
            return
        now = self._look()
        job = self._jobs.get(progress.label)
        if job is None:
            self._jobs[progress.label] = _Job(now, now, progress, progress.share or 0.0)
        else:
            job.hear(progress, now)

    def end(self, request: StepRequest, outcome: Outcome) -> None:
        """A step came to its end. The time since its job began, or since the last one of its batch, was its own."""
        step = self._steps.setdefault(request.ref, _Step(request, kind_of(request)))
        step.is_done, step.is_failed = not isinstance(outcome, Failure), isinstance(outcome, Failure)
        if isinstance(outcome, Artifact):
            self._learn(request, outcome)
        now = self._look()
        self._unfinished[step.kind] -= 1
        self._open[request.shown] -= 1
        if not self._open[request.shown]:
            del self._open[request.shown]
            self._ended_jobs += 1
        job = self._jobs.get(request.shown)
        if job is None:
            return
        if step.is_done:
            self._paces[step.kind].add((now - job.began) * _workers(request), self._work(request))
        job.began, job.ended_work = now, job.ended_work + self._work(request)
        if request.shown not in self._open:
            del self._jobs[request.shown]

    def _look(self) -> float:
        """Counts the time since it last looked as busy or idle; returns the present."""
        now = self.clock()
        if self._looked is not None and self._open:
            if any(job.latest.phase not in NOT_AT_WORK for job in self._jobs.values()):
                self._busy_seconds += now - self._looked
            else:
                self._idle_seconds += now - self._looked
        self._looked = now
        return now

    def say(self, what: str) -> None:
        """Ignored: only steps take time here."""

    def part(self, what: str) -> None:
        """Parts are not told apart here."""

    def table(self, lines: str) -> None:
        """Ignored: trials are steps like others here."""

    def _learn(self, request: StepRequest, artifact: Artifact) -> None:
        if isinstance(request, Tokenize):
            self._tokens[request.ref] = int(artifact.facts.get("tokens", 0))

    # What it says

    def counts(self) -> list[Count]:
        """The steps of each kind, in the order of a run."""
        by_kind: defaultdict[Kind, list[_Step]] = defaultdict(list)
        for step in self._steps.values():
            by_kind[step.kind].append(step)
        return [
            Count(
                kind,
                sum(step.is_done for step in steps),
                sum(step.is_failed for step in steps),
                len(steps),
                not all(step.is_expected for step in steps),
            )
            for kind, steps in sorted(by_kind.items(), key=lambda one: one[0].order)
        ]

    def count_of(self, kind: Kind) -> Count:
        """The steps of one kind."""
        return next(count for count in self.counts() if count.kind == kind)

    def has_finished(self, kind: Kind) -> bool:
        """Whether every step of a kind that was asked for has ended."""
        return not self._unfinished[kind]

    def running(self) -> list[Progress]:
        """The newest report of each job under way, in the order in which they began."""
        return [job.latest for job in self._jobs.values()]

    def seconds_left(self) -> float | None:
        """How long the rest takes, by the pace of this run.

        None where nothing but preparation is known, or no model's pace.
        """
        if not any(step.kind.passes_tokens for step in self._steps.values()):
            return None
        paces = self._all_paces()
        self._look()
        longest: defaultdict[int, float] = defaultdict(float)
        together: defaultdict[int, float] = defaultdict(float)
        at_once = cache(self.at_once)
        jobs = self._outstanding_jobs()
        for steps in jobs:
            first = steps[0]
            pace = self._pace_of(first.kind, paces)
            if pace is None:
                return None
            seconds = self._work_left(steps) * pace / _workers(first.request)
            longest[first.kind.stage] = max(longest[first.kind.stage], seconds)
            together[first.kind.stage] += seconds / max(1, at_once(first.request.group))
        at_work = sum(max(longest[stage], together[stage]) for stage in longest)
        return at_work + self._idle_to_come(at_work, len(jobs))

    def _idle_to_come(self, at_work: float, jobs: int) -> float:
        """As much for each job as so far, but no larger a share of the time than so far."""
        by_job = self._idle_seconds / max(1, self._ended_jobs) * jobs
        by_share = at_work * self._idle_seconds / max(self._busy_seconds, 1e-9)
        return min(by_job, by_share)

    def _outstanding(self) -> Iterator[_Step]:
        return (step for step in self._steps.values() if not (step.is_done or step.is_failed))

    def _outstanding_jobs(self) -> list[list[_Step]]:
        jobs: defaultdict[tuple[Kind, str], list[_Step]] = defaultdict(list)
        for step in self._outstanding():
            jobs[step.kind, step.request.shown].append(step)
        return list(jobs.values())

    def _work_left(self, steps: Sequence[_Step]) -> float:
        work = sum(self._work(step.request) for step in steps)
        job = self._jobs.get(steps[0].request.shown)
        if job is None or job.latest.share is None:
            return work
        # The share is that of a whole batch, of which some may have ended.
        return min(work, (work + job.ended_work) * (1 - job.latest.share))

    def _all_paces(self) -> dict[Kind, _Pace]:
        """Paces of steps that have ended, and of those under way for long enough."""
        paces = defaultdict(_Pace, {kind: _Pace(one.seconds, one.work) for kind, one in self._paces.items()})
        for steps in self._outstanding_jobs():
            job = self._jobs.get(steps[0].request.shown)
            measured = job.measured() if job is not None else None
            if job is not None and measured is not None:
                work = sum(self._work(step.request) for step in steps) + job.ended_work
                paces[steps[0].kind].add(measured[0] * _workers(steps[0].request), measured[1] * work)
        return paces

    def _pace_of(self, kind: Kind, paces: dict[Kind, _Pace]) -> float | None:
        """Seconds for a unit of work of a kind: its own, or that of other models."""
        own = paces.get(kind)
        if own is not None and own.work > 0:
            return own.seconds / own.work
        if not kind.passes_tokens:
            return None if kind.is_in_bytes else SECONDS_OF_OTHER_STEPS
        others = [pace for other, pace in paces.items() if other.passes_tokens and pace.work > 0]
        work = sum(pace.work for pace in others)
        return sum(pace.seconds for pace in others) / work if work else None

    def _work(self, request: StepRequest) -> float:
        if isinstance(request, TrainRequest):
            return PASSES_OF_TRAINING * _tokens_to_train(request)
        if isinstance(request, ScoreRequest):
            return sum(self._tokens.get(ref, 0) for ref in request.tokens)
        if isinstance(request, ReadText):
            return float(request.source_bytes)
        return 1.0


def _tokens_to_train(request: TrainRequest) -> float:
    """From the checkpoint that it goes on from, or the last milestone, which another training makes."""
    first = request.saved_at or max((request.first_update, *request.milestones))
    return (request.last_update - first) * request.blocks_per_update * request.training.block_tokens


def _workers(request: StepRequest) -> int:
    return 1 if request.group is None else request.group.workers
