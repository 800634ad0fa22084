"""Metrics of one replica, as Prometheus reads them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from btm_cluster.serving.forest import LoadedForest


class Metrics:
    """Counts of calls and tokens, and what an engine has to do."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._calls = Counter(
            "btm_serve_calls", "Calls of /v1/completions by outcome.", ["outcome"], registry=self._registry
        )
        self._tokens = Counter("btm_serve_tokens", "Tokens written.", registry=self._registry)
        self._seconds = Histogram("btm_serve_call_seconds", "Time that calls took.", registry=self._registry)
        self._rows = Gauge("btm_serve_rows", "Sequences that are being written.", registry=self._registry)
        self._waiting = Gauge("btm_serve_waiting", "Prompts and texts that wait.", registry=self._registry)
        self._version = Gauge("btm_serve_forest_version", "Version that is served.", registry=self._registry)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Counts a call and its time, by whether it went well."""
        started = time.monotonic()
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            self._calls.labels(outcome).inc()
            self._seconds.observe(time.monotonic() - started)

    def wrote(self, tokens: int) -> None:
        """Counts tokens."""
        self._tokens.inc(tokens)

    def page(self, forest: LoadedForest) -> bytes:
        """The text that Prometheus reads."""
        self._rows.set(forest.ensemble.under_way)
        self._waiting.set(forest.ensemble.waiting)
        self._version.set(forest.mixture.version)
        return generate_latest(self._registry)
