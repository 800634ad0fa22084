"""Tells the events of a run what happens on the cluster.

Nodes' clocks differ. The board, which is on the driver's node, keeps for each node the smallest difference
between when it heard and what that node's clock said: the difference of the clocks, and the quickest message's
few milliseconds. Times are told by the driver's clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.driver.run_events import RunEvents, cause_of
from btm_cluster.identity import Ref
from btm_cluster.ledger.timelines import Event, Node
from btm_cluster.requests import Resources, TrainRequest
from btm_cluster.workers.on_ray.progress import News
from btm_cluster.workers.on_ray.running import Running
from btm_cluster.workers.on_ray.spans import Begun, Span
from btm_cluster.workers.on_ray.training import trainer_name
from btm_cluster.workers.step_events import event_of

SHORT_WAIT_SECONDS = 1.0
"""Shorter waits are not told."""
LOST = "its process or node was lost; it was started again"


class Chronicle:
    """The record of one driver's steps on the cluster."""

    def __init__(self, events: RunEvents, store: str) -> None:
        self._events, self._store = events, store
        self._offsets: Mapping[str, float] = {}
        """Seconds to add to a node's clock, by node."""

    def heard(self, news: News, running: Iterable[Running], trainings: Mapping[Ref, TrainRequest]) -> None:
        """Tells of what has begun, and of processes that got ready for one of `trainings`."""
        self._offsets = {**self._offsets, **news.clock_offsets}
        by_ref = {one.batch[0].ref: one for one in running}
        for begun in news.begun:
            if (one := by_ref.get(begun.first)) is not None:  # it may be over
                self._begin(one, begun)
        for ref, span in news.warm_ups:
            if (request := trainings.get(ref)) is not None:
                known = {"process": trainer_name(request, self._store), **_held(request.how)}
                self._add(event_of(request, "start", *self._on(span), **known), span.node)

    def ended(self, one: Running, outcomes: Sequence[Outcome], spans: Sequence[Span]) -> None:
        """Tells how a batch ended: each request's step, or its failure."""
        under_way = self._events.end(one.batch[0].ref)
        if under_way is None and spans:  # over before it was heard of
            self._tell_wait(one, self._on(spans[0])[0])
        for request, span in zip(one.batch, spans, strict=False):
            step = event_of(request, "step", *self._on(span), **_of(one), attempt=one.attempt)
            self._add(step, span.node)
        now = self._events.now()
        lost = under_way or self._event(one, "failure", now, now)
        for failure in (outcome for outcome in outcomes if isinstance(outcome, Failure)):
            told = {"what": "failure", "label": failure.label, "cause": cause_of(failure.cause)}
            self._events.add(lost.model_copy(update=told))
            lost = lost.model_copy(update={"began": lost.ended})  # the attempt counts once

    def given_up(self, running: Iterable[Running]) -> None:
        """Tells of what was under way when the driver ended it."""
        for one in running:
            if (event := self._events.end(one.batch[0].ref)) is not None:
                self._events.add(event)

    def _begin(self, one: Running, begun: Begun) -> None:
        """A batch has begun: for the first time after its wait, else since its process was lost."""
        at = begun.at + self._offsets.get(begun.node, 0.0)
        before = self._events.end(one.batch[0].ref)
        if before is None:
            self._tell_wait(one, at)
        else:
            one.attempt += 1
            self._events.add(before.model_copy(update={"what": "failure", "cause": LOST}))
        self._add_node(begun.node)
        step = self._event(one, "step", at, at).model_copy(update={"node": begun.node})
        self._events.begin(one.batch[0].ref, step)

    def _tell_wait(self, one: Running, until: float) -> None:
        if until - one.asked >= SHORT_WAIT_SECONDS:
            waited = {"gpus": 0.0, "cpus": 0.0}
            self._events.add(self._event(one, "wait", one.asked, until).model_copy(update=waited))

    def _event(self, one: Running, what: Any, began: float, ended: float) -> Event:
        return event_of(one.batch[0], what, began, ended, **_of(one), attempt=one.attempt)

    def _on(self, span: Span) -> tuple[float, float]:
        offset = self._offsets.get(span.node, 0.0)
        return span.began + offset, span.ended + offset

    def _add(self, event: Event, node: str) -> None:
        self._add_node(node)
        self._events.add(event.model_copy(update={"node": node}))

    def _add_node(self, identity: str) -> None:
        if self._events.knows_node(identity):
            return
        found = next((node for node in ray.nodes() if node["NodeID"] == identity), None)
        name, has = (found["NodeManagerHostname"], found["Resources"]) if found else ("", {})
        self._events.add_node(identity, Node(name=name, gpus=has.get("GPU", 0.0), cpus=has.get("CPU", 0.0)))


def _of(one: Running) -> dict[str, Any]:
    """The fields that all events of a batch share."""
    group = one.batch[0].group
    how = one.how or (group and replace(group, workers=1))
    return {"process": one.process, **(_held(how) if how else {"cpus": 1.0})}


def _held(how: Resources) -> dict[str, Any]:
    """GPUs and CPUs of a step or a trainer, over all processes of a group."""
    return {"gpus": how.workers * how.gpus_per_worker, "cpus": float(how.workers * how.cpus_per_worker)}
