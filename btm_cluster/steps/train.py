"""Trains a model on token blocks, and commits it with what a branch from it needs."""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from btm_cluster.curve import CURVE_FILE
from btm_cluster.data.tokenizer import TOKENIZER_FILES
from btm_cluster.errors import MissingError, StoreError, TrainingError
from btm_cluster.language_model.adapter_files import ADAPTER_CONFIG, write_adapter_config
from btm_cluster.language_model.compute import device_name, device_of
from btm_cluster.language_model.demix import DensePart, count_demix_parameters
from btm_cluster.language_model.lora import adapter_config
from btm_cluster.language_model.model import fresh_on_meta, layout_of, write_config
from btm_cluster.language_model.model_import import import_model
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.stored_weights import StoredWeights, tensors_of, write_weights
from btm_cluster.language_model.training_spec import TextBlocks
from btm_cluster.language_model.training_state import help_to_write, write_state
from btm_cluster.ledger import Artifact, Ledger, blob_key
from btm_cluster.requests import DemixPart, TraceOf, TrainRequest
from btm_cluster.requests.progress import Control, Progress
from btm_cluster.steps.resuming import AlreadyTrained
from btm_cluster.steps.stored import open_blocks, open_tokenizer, open_weights
from btm_cluster.steps.training_run import AtMilestone, Trained, run_training
from btm_cluster.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
TRACE_FILE = "trace.json.gz"
"""Of a profiler's trace."""


def train(request: TrainRequest, ledger: Ledger, control: Control) -> Artifact:
    """Trains, and commits on the group's first rank; all ranks return the committed artifact.

    Raises:
        Stopped: asked to stop; the state is saved and the same request continues from it.
        UserError: the model was purged once.
    """
    group = ProcessGroup.joined(device_of(request.how.gpus_per_worker))
    done = ledger.find(request.ref)
    if done is not None:
        _fill_in_snapshots(request, ledger, control)
        if group.is_first:
            ledger.clear_training(request.ref.identity)  # a crash may have come between commit and clearing
        return done
    ledger.check_not_purged(request.ref)
    tokenizer = ledger.get(request.tokenizer)
    with scratch_folder() as traces:
        tokens = open_tokenizer(ledger, request.tokenizer)

        def commit(
            made: TrainRequest | DemixPart,
            folder: Path,
            files: dict[str, Path],
            facts: Mapping[str, Any],
            note: Mapping[str, Any],
        ) -> Artifact:
            files["config.json"] = write_config(request.model, tokens, folder, request.training.weights)
            files |= {name: ledger.open_file(tokenizer, name) for name in TOKENIZER_FILES}
            return ledger.commit(made, files, {**facts, "origin": _origin(made, ledger)}, note)

        def commit_trained(made: TrainRequest, trained: Trained) -> Artifact | None:
            """On the group's first rank, the committed artifact; the others help to gather it."""
            found = group.made_by_first(lambda: made.ref != request.ref and ledger.find(made.ref) is not None)
            if any(group.any(bool(found))):
                return None  # an attempt before this one has passed it
            if group.is_first:
                control.report(Progress(request.label, "storing"))
            if made.is_demix:
                return _commit_demix(made, trained, ledger, commit) if group.is_first else None
            keeps_optimizer = made.last_update < made.training.updates and not made.weights_only
            # An adapter is small, and its factors' product would be rounded twice.
            dtype = torch.float32 if made.trains.lora is not None else getattr(torch, made.training.weights)
            if not group.is_first:
                help_to_write(trained.state, keeps_optimizer, dtype)
                return None
            with scratch_folder() as folder:  # one for each, since the store may link the files
                files = write_state(trained.state, folder, keeps_optimizer, dtype)
                files |= _write_curve(trained, folder) | _write_adapter_config(made, folder)
                return commit(made, folder, files, trained.facts, trained.note)

        if request.pretrained is not None:
            with scratch_folder() as folder:
                committed = commit(request, folder, *import_model(request, tokens, folder))
        else:
            texts = [open_blocks(ledger, text) for text in request.texts]
            try:
                trace = traces / TRACE_FILE if request.profile else None
                trained = _train_within_memory(
                    request, ledger, control, texts, tokens.first_token, commit_trained, trace
                )
            except AlreadyTrained:
                return ledger.get(request.ref)
            stored = commit_trained(request, trained)
            if stored is None:
                return _await_commit(ledger, request)
            committed = stored
        ledger.clear_training(request.ref.identity)
        if (traces / TRACE_FILE).exists():
            _commit_trace(request, ledger, traces / TRACE_FILE)
    if dist.is_initialized():
        dist.barrier()
    return committed


def _commit_trace(request: TrainRequest, ledger: Ledger, trace: Path) -> None:
    """Commits the profiler's trace of a training whose model is committed, which is worth having without it."""
    facts = {"device": device_name(device_of(request.how.gpus_per_worker)), "torch": torch.__version__}
    try:
        made = ledger.commit(TraceOf(request.ref), {TRACE_FILE: trace}, facts)
    except StoreError as exc:
        log.warning("%s: the trace of its updates could not be stored: %s", request.label, exc)
        return
    key = blob_key(made.ref, made.blob(TRACE_FILE).sha256)
    log.info("%s: a trace of its updates is %s", request.label, key)


def _fill_in_snapshots(request: TrainRequest, ledger: Ledger, control: Control) -> None:
    """Trains once more up to the snapshots that an earlier training of the same model was not asked for."""
    missing = [one for one in request.at_snapshots if ledger.find(one.ref) is None]
    if missing:
        last = missing[-1]
        seeds = tuple(update for update in request.milestones if update <= last.last_update)
        train(
            replace(last, milestones=seeds, snapshots=tuple(one.last_update for one in missing[:-1])),
            ledger,
            control,
        )


Commit: TypeAlias = Callable[
    [DemixPart, Path, dict[str, Path], Mapping[str, Any], Mapping[str, Any]], Artifact
]


def _commit_demix(request: TrainRequest, trained: Trained, ledger: Ledger, commit: Commit) -> Artifact:
    """Commits a DEMix as the ordinary models that it is for each domain, and then, by name, as a whole.

    All are cut from the state that training stored at its end: it has every domain, which a rank of a group
    has not.
    """
    header = layout_of(fresh_on_meta(request.model), getattr(torch, request.training.weights))
    try:
        weights = _last_state(request, ledger)
        for domain, part in enumerate(request.parts):
            with scratch_folder() as folder:
                files = write_weights(header, tensors_of(DensePart(weights, domain)), folder)
                commit(part, folder, files, {"role": "demix-part"}, {})
    except (MissingError, FileNotFoundError):
        # By another driver, which cleared what this one had stored.
        if (done := ledger.find(request.ref)) is not None:
            return done
        raise
    total, non_embedding = count_demix_parameters(request.model, len(request.parts))
    facts = {
        "parameters": total,
        "non_embedding_parameters": non_embedding,
        "origin": _origin(request, ledger),
    }
    parts = [part.ref for part in request.parts]
    with scratch_folder() as folder:
        files = _write_curve(trained, folder)
        return ledger.commit(request, files, {**trained.facts, **facts}, trained.note, parts)


def _write_curve(trained: Trained, folder: Path) -> dict[str, Path]:
    """Writes the curve below `folder`; returns the file by name."""
    file = folder / CURVE_FILE
    file.write_text(trained.curve.model_dump_json(), encoding="utf-8")
    return {CURVE_FILE: file}


def _write_adapter_config(made: TrainRequest, folder: Path) -> dict[str, Path]:
    """Writes the configuration of an adapter, where one was trained; returns the file by name."""
    if made.trains.lora is None:
        return {}
    return {ADAPTER_CONFIG: write_adapter_config(adapter_config(made.trains.lora, made.model), folder)}


def _origin(made: TrainRequest | DemixPart, ledger: Ledger) -> str:
    """The initialisation that a model goes back to, over all starts: only
    models of one origin can be averaged."""
    if isinstance(made, DemixPart):
        return made.ref.identity
    return made.trajectory if made.start is None else str(ledger.get(made.start.model).facts["origin"])


def _last_state(request: TrainRequest, ledger: Ledger) -> StoredWeights:
    last = ledger.latest_training(request.ref.identity)
    if last is None or last.recipe["update"] != request.last_update:
        raise MissingError(
            f"{request.label}: the state of its last update is not in the store", remedy="run it again"
        )
    return open_weights(ledger, last)


def _train_within_memory(
    request: TrainRequest,
    ledger: Ledger,
    control: Control,
    texts: Sequence[TextBlocks],
    first_token: int,
    at_milestone: AtMilestone,
    trace: Path | None,
) -> Trained:
    """Trains; where memory runs out, once more from the last checkpoint, since a
    neighbour on the GPU may have taken it.

    Raises:
        TrainingError: out of memory again, or in a group, whose other ranks wait for this one.
    """
    try:
        return run_training(request, ledger, control, texts, first_token, at_milestone, trace)
    except (RuntimeError, MemoryError) as exc:
        if not _is_out_of_memory(exc):
            raise
        if dist.is_initialized():
            raise _out_of_memory(request, exc) from exc
        log.warning("%s: out of memory, starts again from its last checkpoint: %s", request.label, exc)
    if request.how.compile:
        torch.compiler.reset()  # CUDA graphs hold memory of their own, those of models before this one too
    gc.collect()  # what the failed training held
    torch.cuda.empty_cache()
    try:
        return run_training(request, ledger, control, texts, first_token, at_milestone, trace)
    except (RuntimeError, MemoryError) as exc:
        if not _is_out_of_memory(exc):
            raise
        raise _out_of_memory(request, exc) from exc


def _is_out_of_memory(exc: RuntimeError | MemoryError) -> bool:
    """On a CPU, torch's allocator raises a plain RuntimeError."""
    return isinstance(exc, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(exc)


def _out_of_memory(request: TrainRequest, exc: BaseException) -> TrainingError:
    return TrainingError(
        f"{request.label}: out of memory",
        found=(str(exc) or type(exc).__name__).splitlines()[0],
        remedy="lower cluster.micro_batch_blocks, set cluster.activation_checkpointing: on, or give it more of a "
        "GPU, and go on by --new-resources; the last training checkpoint is kept",
    )


def _await_commit(ledger: Ledger, request: TrainRequest) -> Artifact:
    dist.barrier()
    return ledger.get(request.ref)
