"""Steps of a preview, and the costs of trainings and of a mixture of experts: hours, and bytes that are stored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from btm_cluster.driver.gpu_memory import training_memory
from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.driver.rates import FORWARD_SHARE, RECOMPUTED_SHARE, Rates
from btm_cluster.driver.room import Room, devices
from btm_cluster.equations.budget import stored_bytes
from btm_cluster.language_model.deltas import count_trained
from btm_cluster.language_model.mixture_of_experts import Size, size_of_mixture
from btm_cluster.language_model.training_size import count_by_muon
from btm_cluster.ledger import Ref
from btm_cluster.plan import Plan
from btm_cluster.requests import MixtureOfExpertsRequest, Resources, StepRequest, TrainRequest
from btm_cluster.workers.dry_walk import DONE, DryWalk


@dataclass(frozen=True)
class Step:
    """One line of the preview."""

    name: str
    state: str
    updates: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    device_hours: float = 0.0
    """GPU-hours, or CPU-hours where it runs without a GPU, of what is still to be made."""
    on_gpus: bool = False
    hours: float = 0.0
    """Hours that it takes."""
    share: float = 1.0
    """Share of the machines that it holds."""


@dataclass(frozen=True)
class Costs:
    """Inputs of the cost of a step."""

    plan: Plan
    walk: DryWalk
    room: Room
    rates: Rates

    def of(self, how: Resources, tokens: float) -> dict[str, Any]:
        """Fields of a step whose group passes as much through whole models as an update of so many tokens."""
        return self._fields(how, self.rates.whole[how.gpus_per_worker > 0].hours(tokens))

    def of_training(self, request: TrainRequest, tokens: float) -> dict[str, Any]:
        """Fields of a training on so many tokens."""
        is_expert = request.role == "expert"
        rates = self.rates.experts if is_expert else self.rates.whole
        rate = rates[request.how.gpus_per_worker > 0]
        memory = training_memory(request)
        recomputes = (
            request.how.activation_checkpointing == "on"
            if memory is None
            else memory.settled(self.room.gpu_bytes).recomputes
        )
        # What was measured or stated is as the user's own trainings went.
        twice = RECOMPUTED_SHARE if recomputes and rate.is_estimate else 1.0
        at_once = self.plan.cluster.concurrent_experts if is_expert else None
        return self._fields(request.how, twice * rate.hours(tokens), at_once)

    def _fields(self, how: Resources, spent: float, at_once: int | None = None) -> dict[str, Any]:
        on_gpus = how.gpus_per_worker > 0
        share = max(self.room.share(how, len(self.plan.domains)), 1 / at_once if at_once else 0.0)
        return {"device_hours": spent, "on_gpus": on_gpus, "hours": spent / devices(how), "share": share}


def training_step(request: TrainRequest, state: str, costs: Costs) -> Step:
    """The line of a training."""
    first = max([request.first_update, *request.milestones])  # up to a milestone it is another step's
    tokens_per_update = request.blocks_per_update * request.training.block_tokens
    resumed = costs.walk.dry_run.asked.get(request.ref)
    saved_at = resumed.saved_at if isinstance(resumed, TrainRequest) else None
    to_come = 0 if state == DONE else request.last_update - max(first, saved_at or 0)
    return Step(
        f"{request.role} {request.label}" if request.role == "expert" else request.label,
        state,
        request.last_update - first,
        (request.last_update - first) * tokens_per_update,
        _stored_bytes(request),
        **costs.of_training(request, to_come * tokens_per_update),
    )


def _stored_bytes(request: TrainRequest) -> int:
    """Bytes of all that a training stores: what changes of a model, in the type of its weights; adapters are
    float32."""
    is_rounded = request.training.weights != "float32" and request.trains.lora is None
    keeps_moments = request.role == "seed" and request.pretrained is None
    trained, by_muon = count_trained(request.model, request.trains)[0], _by_muon(request)
    one = stored_bytes(trained, keeps_moments, is_rounded, by_muon)
    return one * (max(1, len(request.parts)) + len(request.snapshots))


def _by_muon(request: TrainRequest) -> int:
    return count_by_muon(request.model, request.trains, request.by_muon)


def checkpoint_bytes(requests: Iterable[StepRequest]) -> int:
    """Most that training checkpoints take together, with two of each training while one takes another's place: of
    the seed, or of all trainings after it at once."""
    trainings = [r for r in requests if isinstance(r, TrainRequest) and r.last_update > r.first_update]
    sizes = {True: 0, False: 0}
    for request in trainings:
        trained = count_trained(request.model, request.trains)[0]
        sizes[request.role == "seed"] += 2 * stored_bytes(
            trained, with_optimizer=True, by_muon=_by_muon(request)
        )
    return max(sizes.values())


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts that a run asks for."""

    request: MixtureOfExpertsRequest
    size: Size
    tokens: float
    """Development tokens that a dense model reads to fit the routers."""


def mixtures_of(
    walk: DryWalk, prepared: PreparedPlan, tokens_of: Mapping[tuple[Ref, ...], float]
) -> list[Mixture]:
    """The mixtures of a run; `tokens_of` are the tokens of a text's split, by its blocks."""
    found = []
    for request in walk.all_of(MixtureOfExpertsRequest):
        assert isinstance(request, MixtureOfExpertsRequest)
        most = request.blocks * prepared.plan.training.block_tokens
        tokens = sum(min(most, tokens_of.get(blocks, 0)) for blocks in request.tokens)
        size = size_of_mixture(prepared.model, len(request.models), request.experts_per_token)
        found.append(Mixture(request, size, tokens))
    return found


def mixture_step(mixture: Mixture, costs: Costs) -> Step:
    """The line of a mixture: its hours are those of fitting the routers."""
    request = mixture.request
    state = costs.walk.state(request)
    is_rounded = costs.plan.training.weights != "float32"
    return Step(
        request.label,
        state,
        stored_bytes=stored_bytes(mixture.size.parameters, with_optimizer=False, is_rounded=is_rounded),
        **costs.of(request.how, 0 if state == DONE else FORWARD_SHARE * mixture.tokens),
    )
