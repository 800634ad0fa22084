"""Messages on what a stopped run has saved."""

from collections.abc import Iterable

from btm_cluster.errors import BtmError, Stopped
from btm_cluster.ledger import Ledger
from btm_cluster.requests import StepRequest, TrainRequest


def saved_points(requests: Iterable[StepRequest], ledger: Ledger) -> str:
    """The updates from which unfinished trainings go on: `seed at update 80, code at update 12`."""
    trainings = [request for request in requests if isinstance(request, TrainRequest)]
    saved = [(one.label, ledger.latest_training(one.ref.identity)) for one in trainings]
    return ", ".join(f"{label} at update {one.recipe['update']:,}" for label, one in saved if one)


def stopped_run(steps_done: int, unfinished: Iterable[StepRequest], ledger: Ledger) -> Stopped:
    """The error of a run that was stopped by a signal, once all that could be saved is."""
    try:
        points = saved_points(unfinished, ledger)
    except BtmError:  # the stop itself is what there is to tell
        points = ""
    finished = (
        f"{steps_done} finished step{'s' * (steps_done != 1)}" if steps_done else "what was stored before"
    )
    return Stopped(
        "the run was stopped",
        found=f"saved: {finished}" + (f"; trainings under way: {points}" if points else ""),
        remedy="the same command goes on from there",
    )
