"""Ray's exceptions, translated once: to the package's own where a step raised one, to a Failure otherwise."""

from typing import Any

import ray
import ray.exceptions
import ray.util.state

from btm_cluster.driver.port import Failure
from btm_cluster.errors import BtmError, DivergedError, Stopped, UserError

LOG_LINES = 8


def failure_of(label: str, error: Exception, attempts: int, host: str, log: str) -> Failure:
    """The failure of a request whose result raised `error`: its last attempt's
    host, and the end of its `log`.

    Raises:
        UserError, Stopped: a step raised it; these are the user's to know, not a failure among others.
    """
    cause = root_cause(error)
    if isinstance(cause, UserError | Stopped):
        raise cause from None
    died = isinstance(
        cause, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError | ray.exceptions.NodeDiedError
    )
    where = "its process or node died" if died else "in its process"
    words = str(cause) if isinstance(cause, BtmError) else f"{type(cause).__name__}: {cause}"
    if not isinstance(cause, BtmError):
        words += "".join(f"\n    | {line}" for line in (log or str(error)).splitlines()[-LOG_LINES:])
    place = f"on {host}, {where}" if host else where
    return Failure(label, max(attempts, 1), place, words, isinstance(cause, DivergedError))


def log_of(trainer: Any) -> str:
    """The end of what a trainer's process logged, where the cluster serves logs."""
    if trainer is None:
        return ""
    try:
        lines = ray.util.state.get_log(
            actor_id=trainer._actor_id.hex(), tail=LOG_LINES, suffix="err", timeout=10
        )
        return "".join(lines)
    except Exception:  # a cluster without a dashboard serves none, and that is no reason to fail
        return ""


def root_cause(error: BaseException) -> BaseException:
    """The exception that a step raised, out of what Ray and Ray Train wrapped around it."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        return root_cause(error.cause)
    failures = getattr(error, "worker_failures", None)
    if failures:
        causes = [root_cause(failure) for failure in failures.values()]
        return next((cause for cause in causes if isinstance(cause, BtmError)), causes[0])
    inner = getattr(error, "_base_exc", None) or error.__cause__
    # A second of imports, which a run without failures has no use for.
    from ray.train import TrainingFailedError

    if isinstance(inner, BaseException) and isinstance(error, TrainingFailedError | RuntimeError):
        return root_cause(inner)
    return error
