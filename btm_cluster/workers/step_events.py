"""Words a step as an event of its run."""

from typing import Any

from btm_cluster.ledger.timelines import Event, What
from btm_cluster.requests import FindOverlap, ReadText, StepRequest, Tokenize, TrainRequest
from btm_cluster.steps.registry import STEPS


def event_of(request: StepRequest, what: What, began: float, ended: float, **known: Any) -> Event:
    """An event of a request's step; `known` are further fields."""
    role = request.role if isinstance(request, TrainRequest) else None
    is_of_domain = role == "expert" or isinstance(request, ReadText | Tokenize | FindOverlap)
    return Event(
        what=what,
        kind=STEPS[type(request)].function,
        label=request.label,
        domain=request.label if is_of_domain else None,
        role=role,
        began=began,
        ended=max(began, ended),
        **known,
    )
