"""The state of a training: model, optimiser and update.

It is built, filled from files, and read out to be saved.

Knows no store: files are local, and the caller has found and checked them.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from btm_cluster.errors import IntegrityError
from btm_cluster.language_model.block_check import CAUSAL_TOKENS, check_reads
from btm_cluster.language_model.deltas import (
    FILES,
    freeze,
    hold_frozen_in,
    load_base,
    load_trained,
    trained_names,
)
from btm_cluster.language_model.demix import own_moments, split_feed_forwards
from btm_cluster.language_model.demix_group import Share, gather_domains, share_of
from btm_cluster.language_model.model import (
    build_model,
    fresh_without_values,
    layout_of,
    load_weights,
    model_of_undefined_values,
    weights_of,
)
from btm_cluster.language_model.optimizer import TrainingOptimizer, build_optimizer
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.recording import Recording
from btm_cluster.language_model.sharding import (
    gather,
    hand_out,
    is_sharded,
    like,
    load_own,
    own_part,
    shard,
)
from btm_cluster.language_model.stored_weights import StoredWeights, write_weights
from btm_cluster.language_model.tensor_files import (
    OPTIMIZER_FILE,
    Header,
    layout,
    names_in_order,
    write_tensors,
)
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.plan import ALL, Trains

_MASTER = "master."


@dataclass
class TrainingState:
    """A model in the making, as this rank holds it. The train loop changes it in place."""

    model: PreTrainedModel
    optimizer: TrainingOptimizer
    update: int
    """Updates made so far."""
    share: Share | None = None
    """The domains of a DEMix that this rank trains; None for another model."""
    trains: Trains = ALL
    """The weights that change: all that is stored is of these."""
    recording: Recording = field(default_factory=Recording)
    """The training's curve so far."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that are stored, by name: all, or those that change. Every rank of a group exhausts it."""
        return self._gathered(self.held_weights())

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimiser's moments of all that is trained, by the name that a parameter is stored by, and AdamW's step
        count.

        Every rank of a group exhausts it.
        """
        return self._gathered(self.held_moments())

    def held_moments(self) -> dict[str, torch.Tensor]:
        """The moments as this rank holds them."""
        tensors: dict[str, torch.Tensor] = {}
        parameters = dict(self.model.named_parameters())
        for name, stored in trained_names(self.model, self.trains).items():
            kept = self.optimizer.state_of(parameters[name])
            tensors |= {f"{moment}.{stored}": kept[moment] for moment in kept if moment != "step"}
            if "step" in kept:
                tensors["step"] = torch.as_tensor(kept["step"], dtype=torch.float32)
        return tensors

    def has_finite_weights(self) -> bool:
        """Whether every weight that this rank holds, and that may have changed, is a finite number."""
        held = [own_part(tensor) for tensor in self.held_weights().values()]
        return bool(torch.stack([tensor.isfinite().all() for tensor in held]).all())

    def held_weights(self) -> dict[str, torch.Tensor]:
        """The weights that are stored, as this rank holds them."""
        if not self.trains.is_delta:
            return weights_of(self.model)
        parameters = dict(self.model.named_parameters())
        names = trained_names(self.model, self.trains).items()
        return {stored: parameters[name].detach() for name, stored in names}

    def _gathered(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        return gather(tensors) if self.share is None else gather_domains(tensors, self.share)


def build_state(
    spec: TrainingSpec, group: ProcessGroup, base: StoredWeights | None = None, draws_weights: bool = True
) -> TrainingState:
    """A model with the weights that the random seed draws, or those of `base`, and an optimiser that has made no
    step.

    `base` are the weights to train a part of; without them, the same part of a drawn model is trained. Without
    `draws_weights`, those of a model that is trained as a whole are undefined: they are loaded next.

    Raises:
        UserError: an architecture that does not read from left to right, or of which no DEMix can be made.
    """
    share: Share | None = None
    if spec.compute.is_sharded:
        model = _sharded(spec, group, base, draws_weights)
    else:
        model = _whole(spec, base, draws_weights, spec.compute.device)
        if spec.is_demix:
            share = share_of(group.rank, group.world, len(spec.texts))
            split_feed_forwards(model, share.domains)
        model = model.to(spec.compute.device)
    optimizer = build_optimizer(model, spec.training, spec.is_demix, spec.trains)
    return TrainingState(model, optimizer, spec.first_update, share, spec.trains)


def _whole(
    spec: TrainingSpec,
    base: StoredWeights | None,
    draws_weights: bool = True,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model on a device; drawn weights are on the CPU, which draws the same everywhere."""
    random_seed = spec.training.random_seed
    if base is not None:
        return load_base(spec.model, base, spec.trains, random_seed, spec.compute.precision, device)
    if not draws_weights:
        model = model_of_undefined_values(spec.model, device)
    else:
        model = build_model(spec.model, random_seed)
        if spec.from_scratch:
            check_reads(model, CAUSAL_TOKENS, f"a {spec.model['model_type']}")
    if spec.trains.is_delta:
        freeze(model, spec.trains, random_seed)
        hold_frozen_in(model, spec.compute.precision)
    return model


def _sharded(
    spec: TrainingSpec, group: ProcessGroup, base: StoredWeights | None, draws_weights: bool
) -> PreTrainedModel:
    """A sharded model with the weights of `_whole`, which the first rank makes in its host's memory, and hands
    out."""
    model = fresh_without_values(spec.model)
    freeze(model, spec.trains, spec.training.random_seed)
    if spec.trains.is_delta:
        hold_frozen_in(model, spec.compute.precision)
    shard(model, spec.compute, group)
    if base is None and not draws_weights:
        return model
    whole = group.made_by_first(lambda: _whole(spec, base))
    hand_out(model, whole, group)
    return model


def load_state(
    state: TrainingState, update: int, weights: StoredWeights, optimizer: StoredWeights | None, name: str
) -> None:
    """Fills `state` with stored weights and moments of all that is trained;
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
    stored = exact if exact and names_in_order(exact.header) else weights
    if state.trains.is_delta:
        load_trained(state.model, state.trains, stored)
    else:
        load = load_own if is_sharded(state.model) else load_weights
        load(state.model, stored)
    if optimizer is not None:
        load_moments(state, optimizer, name)
    state.update = update


def load_base_optimizer(state: TrainingState, optimizer: StoredWeights, name: str) -> None:
    """Fills a state that is built over a stored model, and trains a part of it, by that model's optimiser: the
    part's moments, and its weights in float32 where they were rounded to be stored.

    Raises:
        IntegrityError: moments of another model, which `name` names.
    """
    exact = _Masters(optimizer, trained_names(state.model, state.trains).values())
    if names_in_order(exact.header):
        load_trained(state.model, state.trains, exact)
    load_moments(state, optimizer, name)


def load_moments(state: TrainingState, optimizer: StoredWeights, name_of_state: str) -> None:
    """Fills the optimiser with stored moments of all that is trained; what has none starts without.

    Raises:
        IntegrityError: moments of another model, which `name_of_state` names.
    """
    tensors = {name: optimizer.read(name) for name in names_in_order(optimizer.header)}
    parameters = dict(state.model.named_parameters())
    for name, stored_as in trained_names(state.model, state.trains).items():
        parameter = parameters[name]
        stored = {
            moment: tensors.get(f"{moment}.{stored_as}")
            if state.trains.is_delta
            else own_moments(state.model, name, moment, tensors)
            for moment in state.optimizer.moments_of(parameter)
        }
        moments = {moment: tensor for moment, tensor in stored.items() if tensor is not None}
        if not moments:
            continue
        step = tensors.get("step")
        is_uncounted = step is None and state.optimizer.counts_steps(parameter)
        if is_uncounted or any(tensor.shape != parameter.shape for tensor in moments.values()):
            raise does_not_fit(name_of_state, f"the optimiser's state of {name}")
        own = {moment: like(parameter, tensor) for moment, tensor in moments.items()}
        state.optimizer.set_state(parameter, own, step)


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
    if state.trains.is_delta:
        name = FILES[state.trains.part]
        files = {name: folder / name}
        held = state.held_weights()
        rounded = {n: torch.empty(t.shape, dtype=dtype, device="meta") for n, t in held.items()}
        write_tensors(layout(rounded), state.weights(), files[name])
    else:
        files = write_weights(layout_of(state.model, dtype), state.weights(), folder)
    if with_optimizer:
        held = state.held_moments()
        if dtype != torch.float32:
            held |= {f"{_MASTER}{name}": tensor for name, tensor in state.held_weights().items()}
        files[OPTIMIZER_FILE] = folder / OPTIMIZER_FILE
        write_tensors(layout(held), _optimizer_tensors(state, dtype), files[OPTIMIZER_FILE])
    return files


def help_to_write(state: TrainingState, with_optimizer: bool, dtype: torch.dtype) -> None:
    """Takes part in gathering, on every other rank, while the first one writes."""
    deque(state.weights(), maxlen=0)
    if with_optimizer:
        deque(_optimizer_tensors(state, dtype), maxlen=0)


def _optimizer_tensors(state: TrainingState, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    yield from state.moments()
    if dtype != torch.float32:
        for name, tensor in state.weights():
            yield f"{_MASTER}{name}", tensor


class _Masters:
    """The weights that a stored optimiser holds in float32, or some of them; none where the model itself is
    stored so."""

    def __init__(self, optimizer: StoredWeights, names: Collection[str] | None = None) -> None:
        self._optimizer, self._names = optimizer, names

    @property
    def header(self) -> Header:
        whole = self._optimizer.header.items()
        held = {name.removeprefix(_MASTER): entry for name, entry in whole if name.startswith(_MASTER)}
        return {n: entry for n, entry in held.items() if self._names is None or n in self._names}

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        return self._optimizer.read(f"{_MASTER}{name}", device)

    def __str__(self) -> str:
        return str(self._optimizer)
