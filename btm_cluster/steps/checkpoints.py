"""Training checkpoints in the store: read back, and written in the background.

Training stops only for the copy out of the model; hashing and storing overlap with it. A failed intermediate
checkpoint warns: the next one is due soon. The final one is stored by the caller, and fails loudly.
"""

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from btm_cluster.curve import CURVE_FILE, Curve
from btm_cluster.errors import MissingError, StoreError, UserError, one_line
from btm_cluster.language_model.host_copy import HostCopy
from btm_cluster.language_model.model import save_weights
from btm_cluster.language_model.recording import Recording
from btm_cluster.language_model.stored_weights import TensorFiles
from btm_cluster.language_model.tensor_files import OPTIMIZER_FILE, WEIGHTS
from btm_cluster.language_model.training_state import (
    TrainingState,
    does_not_fit,
    load_base_optimizer,
    load_state,
)
from btm_cluster.ledger import Artifact, Ledger, Named
from btm_cluster.ledger.curves import read_curve
from btm_cluster.steps.stored import open_stored
from btm_cluster.storage.scratch import scratch_folder

log = logging.getLogger(__name__)


def load_stored(
    state: TrainingState, update: int, ledger: Ledger, source: Artifact, keep_optimizer: bool
) -> None:
    """Fills `state`, which then stands at `update`, with a stored model's
    weights, or with what is trained of them, and its optimiser where asked.

    A state that is built over `source`, of which it trains a part, has its weights already: as they are stored,
    or what is trained in float32 where the optimiser holds it.

    Raises:
        MissingError: a file is gone, perhaps while it was read.
        IntegrityError: a file is damaged, or of another model.
    """
    keep_optimizer = keep_optimizer and source.has(OPTIMIZER_FILE)
    name = f"{source.kind} {source.identity[:12]}"
    try:
        # All files are known to be whole before one is loaded.
        weights = open_stored(ledger, source)
        optimizer = TensorFiles([ledger.open_file(source, OPTIMIZER_FILE)]) if keep_optimizer else None
        if not state.trains.is_delta or source.is_delta:
            load_state(state, update, weights, optimizer, name)
        elif optimizer is not None:
            load_base_optimizer(state, optimizer, name)
    except FileNotFoundError as exc:
        what = f"{name}: a file was deleted while it was read"
        raise MissingError(what, found=str(exc), remedy="run the plan again") from exc
    except (UserError, RuntimeError) as exc:
        if source.kind != "training" or not (isinstance(exc, UserError) or "size mismatch" in str(exc)):
            raise
        raise does_not_fit(name, one_line(exc)) from exc


def load_curve(state: TrainingState, ledger: Ledger, source: Artifact, label: str) -> None:
    """Goes on with the curve that a stored state of this training has. One that cannot be read costs a warning:
    it begins anew, and no training waits for it."""
    try:
        state.recording = Recording(read_curve(ledger, source))
    except (StoreError, UserError) as exc:
        log.warning("%s: its curve begins anew at update %d: %s", label, state.update, exc)


class TrainingCheckpoints:
    """Saves a model in the making, at most one save under way at a time."""

    def __init__(
        self,
        ledger: Ledger,
        model: Named,
        label: str,
        passed_over: Collection[str] = (),
        weights_file: str = WEIGHTS,
    ) -> None:
        self.stalled_seconds = 0.0
        """How long training stood still for all saves."""
        self.stall_seconds: float | None = None
        """How long it stood still for the last save."""
        self.upload_seconds: float | None = None
        """How long the last save that was stored took for that, meanwhile."""
        self._ledger, self._model, self._label = ledger, model, label
        self._passed_over, self._weights_file = passed_over, weights_file
        self._weights, self._moments = HostCopy(), HostCopy()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def save(
        self,
        update: int,
        weights: Iterable[tuple[str, torch.Tensor]],
        moments: Iterable[tuple[str, torch.Tensor]],
        curve: Curve,
        facts: Mapping[str, Any],
        wait: bool,
    ) -> None:
        """Copies the state out, by name, and stores it in the background; with
        `wait`, only returns once it is stored.

        Raises:
            StoreError: only with `wait`; without, a failure is logged and the next save tries again.
        """
        started = time.monotonic()
        self._finish_previous()  # a slow store holds training up here, and it shows as a stall
        weights_now, moments_now = self._weights.take(weights), self._moments.take(moments)
        self.stall_seconds = time.monotonic() - started
        self.stalled_seconds += self.stall_seconds
        self._saving = self._pool.submit(self._store, update, weights_now, moments_now, curve, dict(facts))
        if wait:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Waits for the save under way."""
        self._finish_previous()
        self._pool.shutdown()
        self._weights.close()
        self._moments.close()

    def _finish_previous(self) -> None:
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except (StoreError, OSError) as exc:
            log.warning(
                "%s: a training checkpoint was not stored, the next one will be tried: %s", self._label, exc
            )

    def _store(
        self,
        update: int,
        weights: dict[str, torch.Tensor],
        moments: dict[str, torch.Tensor],
        curve: Curve,
        facts: dict[str, Any],
    ) -> None:
        started = time.monotonic()
        with scratch_folder() as scratch:
            files = {name: scratch / name for name in (self._weights_file, OPTIMIZER_FILE, CURVE_FILE)}
            save_weights(weights, files[self._weights_file])
            save_weights(moments, files[OPTIMIZER_FILE])
            files[CURVE_FILE].write_text(curve.model_dump_json(), encoding="utf-8")
            self._ledger.save_training(self._model, update, files, facts, self._passed_over)
        self.upload_seconds = time.monotonic() - started
