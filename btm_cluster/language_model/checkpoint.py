"""Model and optimiser state to files and back, and training checkpoints written in the background.

Training stops only for the copy out of the model; hashing and storing overlap with it. A failed intermediate checkpoint
warns: the next one is due soon. The final one is stored by the caller, and fails loudly.
"""

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from btm_cluster.errors import IntegrityError, MissingError, StoreError, UserError, one_line
from btm_cluster.language_model.demix import own_moments
from btm_cluster.language_model.model import load_weights, save_weights, weights_of
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Adam's moments by parameter name, and its step count: what a branch continues from."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in sorted(model.named_parameters()):
        state = optimizer.state.get(parameter)
        if state:
            tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS}
            tensors["step"] = torch.as_tensor(state["step"], dtype=torch.float32)
    return tensors


def load_training(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, ledger: Ledger, source: Artifact, keep_optimizer: bool
) -> None:
    """Puts a stored model's weights, and its optimiser where asked, into `model` and `optimizer`.

    Raises:
        MissingError: a file is gone, perhaps while it was read.
        IntegrityError: a file is damaged, or of another model.
    """
    keep_optimizer = keep_optimizer and source.has(OPTIMIZER_FILE)
    files = {name: ledger.open_file(source, name) for name in (MODEL_FILE, *([OPTIMIZER_FILE] * keep_optimizer))}
    try:
        load_weights(model, files[MODEL_FILE])  # only once both files are known to be whole
        if keep_optimizer:
            _load_moments(model, optimizer, load_file(files[OPTIMIZER_FILE]), source)
    except FileNotFoundError as exc:
        what = f"{source.kind} {source.identity[:12]}: a file was deleted while it was read"
        raise MissingError(what, found=str(exc), remedy="run the plan again") from exc
    except (UserError, RuntimeError) as exc:
        if source.kind != "training" or not (isinstance(exc, UserError) or "size mismatch" in str(exc)):
            raise
        raise _misfit(source, one_line(exc)) from exc


def _load_moments(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, tensors: Mapping[str, torch.Tensor], source: Artifact
) -> None:
    for name, parameter in model.named_parameters():
        stored = {moment: own_moments(model, name, moment, tensors) for moment in _MOMENTS}
        moments = {moment: tensor.to(parameter.device) for moment, tensor in stored.items() if tensor is not None}
        if not moments:
            continue
        if "step" not in tensors or any(tensor.shape != parameter.shape for tensor in moments.values()):
            raise _misfit(source, f"the optimiser's state of {name}")
        fused_device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
        optimizer.state[parameter] = {"step": tensors["step"].clone().to(fused_device), **moments}


def _misfit(source: Artifact, found: str) -> IntegrityError:
    return IntegrityError(
        f"{source.kind} {source.identity[:12]} does not fit the model",
        found=found,
        expected="the names and shapes that this version of transformers gives its parameters",
        remedy="go back to the version that stored it, or delete it, and training starts again",
    )


def write_state(model: PreTrainedModel, optimizer: torch.optim.AdamW | None, folder: Path) -> dict[str, Path]:
    """Writes weights, and the optimiser's state if given, as files below `folder`."""
    files = {MODEL_FILE: folder / MODEL_FILE}
    save_weights(weights_of(model), files[MODEL_FILE])
    if optimizer is not None:
        files[OPTIMIZER_FILE] = folder / OPTIMIZER_FILE
        save_weights(optimizer_tensors(model, optimizer), files[OPTIMIZER_FILE])
    return files


class TrainingCheckpoints:
    """Saves a model in the making, at most one save under way at a time."""

    def __init__(self, ledger: Ledger, identity: str, label: str, passed_over: Collection[str] = ()) -> None:
        self.stalled_seconds = 0.0
        """Standstill of training for all saves."""
        self.stall_seconds: float | None = None
        """Standstill for the last save."""
        self.upload_seconds: float | None = None
        """How long the last save that was stored took for that, meanwhile."""
        self._ledger, self._identity, self._label = ledger, identity, label
        self._passed_over = passed_over
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(
        self,
        update: int,
        weights: Iterable[tuple[str, torch.Tensor]],
        moments: Iterable[tuple[str, torch.Tensor]],
        facts: Mapping[str, Any],
        wait: bool,
    ) -> None:
        """Copies the state out, by name, and stores it in the background; with `wait`, only returns once it is stored.

        Raises:
            StoreError: only with `wait`; without, a failure is logged and the next save tries again.
        """
        started = time.monotonic()
        self._finish_previous()  # a slow store holds training up here, and it shows as a stall
        weights_now = {name: t.to("cpu", copy=True) for name, t in weights}
        moments_now = {name: t.to("cpu", copy=True) for name, t in moments}
        self.stall_seconds = time.monotonic() - started
        self.stalled_seconds += self.stall_seconds
        self._saving = self._pool.submit(self._store, update, weights_now, moments_now, dict(facts))
        if wait:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Waits for the save under way."""
        self._finish_previous()
        self._pool.shutdown()

    def _finish_previous(self) -> None:
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except (StoreError, OSError) as exc:
            log.warning("%s: a training checkpoint was not stored, the next one will be tried: %s", self._label, exc)

    def _store(
        self, update: int, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], facts: dict[str, Any]
    ) -> None:
        started = time.monotonic()
        with scratch_folder() as scratch:
            files = {MODEL_FILE: scratch / MODEL_FILE, OPTIMIZER_FILE: scratch / OPTIMIZER_FILE}
            save_weights(weights, files[MODEL_FILE])
            save_weights(moments, files[OPTIMIZER_FILE])
            self._ledger.save_training(self._identity, update, files, facts, self._passed_over)
        self.upload_seconds = time.monotonic() - started
