"""The state of a training: model, optimiser and update.

It is built, filled from files, and read out to be saved.

Knows no store: files are local, and the caller has found and checked them.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from btm_cluster.errors import IntegrityError, UserError
from btm_cluster.language_model.block_check import check_reads
from btm_cluster.language_model.demix import own_moments, split_feed_forwards
from btm_cluster.language_model.demix_group import Share, gather_domains, share_of
from btm_cluster.language_model.model import build_model, layout_of, load_weights, weights_of
from btm_cluster.language_model.optimizer import build_optimizer
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.recording import Recording
from btm_cluster.language_model.sharding import (
    build_sharded,
    gather,
    hand_out,
    is_sharded,
    like,
    load_own,
    own_part,
)
from btm_cluster.language_model.stored_weights import StoredWeights, write_weights
from btm_cluster.language_model.tensor_files import Header, layout, names_in_order, write_tensors
from btm_cluster.language_model.training_spec import TrainingSpec

OPTIMIZER_FILE = "optimizer.safetensors"
CAUSAL_TOKENS = 8
"""Enough to see whether a model reads from left to right."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "master."


@dataclass
class TrainingState:
    """A model in the making, as this rank holds it. The train loop changes it in place."""

    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    update: int
    """Updates made so far."""
    share: Share | None = None
    """The domains of a DEMix that this rank trains; None for another model."""
    recording: Recording = field(default_factory=Recording)
    """The training's curve so far."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole model's weights by name. Every rank of a group exhausts it."""
        return self._gathered(weights_of(self.model))

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Adam's moments of the whole model by parameter name, and its step count.

        Every rank of a group exhausts it.
        """
        return self._gathered(self.held_moments())

    def held_moments(self) -> dict[str, torch.Tensor]:
        """The moments as this rank holds them."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in sorted(self.model.named_parameters()):
            kept = self.optimizer.state.get(parameter)
            if kept:
                tensors |= {f"{moment}.{name}": kept[moment] for moment in _MOMENTS}
                tensors["step"] = torch.as_tensor(kept["step"], dtype=torch.float32)
        return tensors

    def has_finite_weights(self) -> bool:
        """Whether every weight that this rank holds is a finite number."""
        held = [own_part(tensor) for tensor in weights_of(self.model).values()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in held]).all())

    def _gathered(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        return gather(tensors) if self.share is None else gather_domains(tensors, self.share)


def build_state(spec: TrainingSpec, group: ProcessGroup, draws_weights: bool = True) -> TrainingState:
    """A model with the weights that the random seed draws, and an optimiser that has made no step.

    Without `draws_weights`, those of a sharded model are undefined: they are loaded next.

    Raises:
        UserError: an architecture that does not read from left to right, or of which no DEMix can be made.
    """
    if spec.compute.is_sharded:
        model = build_sharded(spec.model, spec.compute, group)
        if draws_weights:
            _draw_sharded(model, spec, group)
        return TrainingState(model, build_optimizer(model, spec.training), spec.first_update)
    model = build_model(spec.model, spec.training.random_seed)
    if spec.from_scratch:
        check_reads(model, CAUSAL_TOKENS, f"a {spec.model['model_type']}")
    share = share_of(group.rank, group.world, len(spec.texts)) if spec.is_demix else None
    if share is not None:
        split_feed_forwards(model, share.domains)
    model = model.to(spec.compute.device)
    return TrainingState(
        model, build_optimizer(model, spec.training, spec.is_demix), spec.first_update, share
    )


def _draw_sharded(model: PreTrainedModel, spec: TrainingSpec, group: ProcessGroup) -> None:
    """Gives a sharded model the weights that the random seed draws for one process: the first rank draws them in
    its host's memory, and hands them out."""
    whole: PreTrainedModel | None = None
    wrong: UserError | None = None
    if group.is_first:
        whole = build_model(spec.model, spec.training.random_seed)
        try:
            if spec.from_scratch:
                check_reads(whole, CAUSAL_TOKENS, f"a {spec.model['model_type']}")
        except UserError as exc:
            wrong = exc
    wrong = group.from_first(wrong)  # the others would wait for weights
    if wrong is not None:
        raise wrong
    hand_out(model, whole, group)


def load_state(
    state: TrainingState, update: int, weights: StoredWeights, optimizer: StoredWeights | None, name: str
) -> None:
    """Fills `state` with the whole model's stored weights and moments;
    without `optimizer`, that starts anew.

    Weights that the optimiser holds in float32 go before those that were rounded to be stored.

    In a group each rank takes its own domains of a DEMix; a dense model's feed-forwards are copied for each
    domain.

    Raises:
        IncompatibleError: weights of another model.
        IntegrityError: moments of another model, which `name` names.
        FileNotFoundError: a file was deleted meanwhile.
    """
    exact = optimizer and _Masters(optimizer)
    load = load_own if is_sharded(state.model) else load_weights
    load(state.model, exact if exact and names_in_order(exact.header) else weights)
    if optimizer is not None:
        tensors = {name: optimizer.read(name) for name in names_in_order(optimizer.header)}
        _load_moments(state, tensors, name)
    state.update = update


def _load_moments(state: TrainingState, tensors: Mapping[str, torch.Tensor], name_of_state: str) -> None:
    for name, parameter in state.model.named_parameters():
        stored = {moment: own_moments(state.model, name, moment, tensors) for moment in _MOMENTS}
        moments = {moment: tensor for moment, tensor in stored.items() if tensor is not None}
        if not moments:
            continue
        if "step" not in tensors or any(tensor.shape != parameter.shape for tensor in moments.values()):
            raise does_not_fit(name_of_state, f"the optimiser's state of {name}")
        fused_device = parameter.device if state.optimizer.defaults.get("fused") else torch.device("cpu")
        own = {moment: like(parameter, tensor) for moment, tensor in moments.items()}
        state.optimizer.state[parameter] = {"step": tensors["step"].clone().to(fused_device), **own}


def does_not_fit(name: str, found: str) -> IntegrityError:
    """The error of a stored state that is another model's."""
    return IntegrityError(
        f"{name} does not fit the model",
        found=found,
        expected="the names and shapes that this version of transformers gives its parameters",
        remedy="go back to the version that stored it, or delete it, and training starts again",
    )


def write_state(
    state: TrainingState, folder: Path, with_optimizer: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Path]:
    """Writes weights in a dtype, and the optimiser's state where asked, as files below `folder`; returns them by
    name. In a group the first rank does, and the others `help_to_write`.

    Where the weights are rounded, that state holds them in float32 too: training goes on from those. Memory: one
    tensor.
    """
    files = write_weights(layout_of(state.model, dtype), state.weights(), folder)
    if with_optimizer:
        held = state.held_moments()
        if dtype != torch.float32:
            held |= {f"{_MASTER}{name}": tensor for name, tensor in weights_of(state.model).items()}
        files[OPTIMIZER_FILE] = folder / OPTIMIZER_FILE
        write_tensors(layout(held), _optimizer_tensors(state, dtype), files[OPTIMIZER_FILE])
    return files


def help_to_write(state: TrainingState, with_optimizer: bool, dtype: torch.dtype) -> None:
    """What every other rank does while the first one writes: it takes part in gathering."""
    deque(state.weights(), maxlen=0)
    if with_optimizer:
        deque(_optimizer_tensors(state, dtype), maxlen=0)


def _optimizer_tensors(state: TrainingState, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    yield from state.moments()
    if dtype != torch.float32:
        for name, tensor in state.weights():
            yield f"{_MASTER}{name}", tensor


class _Masters:
    """The weights that a stored optimiser holds in float32; none where the model itself is stored so."""

    def __init__(self, optimizer: StoredWeights) -> None:
        self._optimizer = optimizer

    @property
    def header(self) -> Header:
        whole = self._optimizer.header
        return {n.removeprefix(_MASTER): entry for n, entry in whole.items() if n.startswith(_MASTER)}

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        return self._optimizer.read(f"{_MASTER}{name}", device)

    def __str__(self) -> str:
        return str(self._optimizer)
