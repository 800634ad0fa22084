"""Metrics of one replica, as Prometheus reads them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from btm_cluster.serving.forest import LoadedForest
from btm_cluster.serving.http_errors import GONE, as_error


@dataclass
class Outcome:
    """How a call ended; an exception sets it by itself."""

    status: int = 200


class Metrics:
    """Counts of calls and tokens, and what an engine has to do."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._calls = Counter(
            "btm_serve_calls", "Calls of /v1/completions by status.", ["status"], registry=self._registry
        )
        self._tokens = Counter("btm_serve_tokens", "Tokens written.", registry=self._registry)
        self._seconds = Histogram("btm_serve_call_seconds", "Time that calls took.", registry=self._registry)
        self._rows = Gauge("btm_serve_rows", "Sequences that are being written.", registry=self._registry)
        self._waiting = Gauge("btm_serve_waiting", "Prompts and texts that wait.", registry=self._registry)
        self._version = Gauge("btm_serve_forest_version", "Version that is served.", registry=self._registry)

    @contextmanager
    def call(self) -> Iterator["Outcome"]:
        """Counts a call and its time by its status: 200, an error's, or 499 where the caller hung up."""
        started, outcome = time.monotonic(), Outcome()
        try:
            yield outcome
        except Exception as exc:
            outcome.status = as_error(exc)[0]
            raise
        except BaseException:  # cancelled
            outcome.status = GONE
            raise
        finally:
            self._calls.labels(outcome.status).inc()
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
