"""The verb *train*: token blocks to a model, committed with what a branch from it needs."""

import gc
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from btm_cluster.errors import TrainingError
from btm_cluster.language_model.blocks import Blocks
from btm_cluster.language_model.checkpoint import write_state
from btm_cluster.language_model.model import write_config
from btm_cluster.language_model.pretrained import import_model
from btm_cluster.language_model.tokenizer import TOKENIZER_FILES
from btm_cluster.language_model.training import Trained
from btm_cluster.language_model.training import train as train_model
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.steps.prepare import open_tokenizer
from btm_cluster.workers import Control, Progress, TrainingText, TrainRequest

log = logging.getLogger(__name__)


def train(request: TrainRequest, ledger: Ledger, control: Control) -> Artifact:
    """Trains, and commits on the group's first rank; all ranks return the committed artifact.

    Raises:
        Stopped: asked to stop; the state is saved and the same request continues from it.
        UserError: the model was purged once.
    """
    done = ledger.find(request.ref)
    if done is not None:
        if _is_first_rank():
            ledger.clear_training(request.ref.identity)  # a crash may have come between commit and clearing
        return done
    ledger.check_not_purged(request.ref)
    tokenizer = ledger.get(request.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        end_of_text = open_tokenizer(ledger, request.tokenizer).eos_token_id
        if request.pretrained is not None:
            files, facts, note = import_model(request, folder)
        else:
            texts = [open_blocks(ledger, text) for text in request.texts]
            trained = _train_within_memory(request, ledger, control, texts, end_of_text)
            if not _is_first_rank():
                return _await_commit(ledger, request)
            control.report(Progress(request.label, "storing", request.last_update, 0, request.last_update))
            keeps_optimizer = request.last_update < request.training.updates
            files = write_state(trained.model, trained.optimizer if keeps_optimizer else None, folder)
            facts, note = trained.facts, trained.note
        files["config.json"] = write_config(request.model, end_of_text, folder)
        files |= {name: ledger.open_file(tokenizer, name) for name in TOKENIZER_FILES}
        committed = ledger.commit(request.ref, request.recipe, files, facts, note)
    ledger.clear_training(request.ref.identity)
    if dist.is_initialized():
        dist.barrier()
    return committed


def _train_within_memory(
    request: TrainRequest, ledger: Ledger, control: Control, texts: Sequence[Blocks], end_of_text: int
) -> Trained:
    """Trains; where memory runs out, once more from the last checkpoint, since a neighbour on the GPU may have taken it.

    Raises:
        TrainingError: out of memory again, or in a group, whose other ranks wait for this one.
    """
    try:
        return train_model(request, ledger, control, texts, end_of_text)
    except (torch.OutOfMemoryError, MemoryError) as exc:
        if dist.is_initialized():
            raise _out_of_memory(request, exc) from exc
        log.warning("%s: out of memory, starts again from its last checkpoint: %s", request.label, exc)
    gc.collect()  # what the failed training held
    torch.cuda.empty_cache()
    try:
        return train_model(request, ledger, control, texts, end_of_text)
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise _out_of_memory(request, exc) from exc


def _out_of_memory(request: TrainRequest, exc: BaseException) -> TrainingError:
    return TrainingError(
        f"{request.label}: out of memory",
        found=(str(exc) or type(exc).__name__).splitlines()[0],
        remedy="lower cluster.micro_batch_blocks, or give it more of a GPU; the last training checkpoint is kept",
    )


def open_blocks(ledger: Ledger, text: TrainingText) -> Blocks:
    """A training text's blocks, memory-mapped."""
    return Blocks([ledger.open_file(ledger.get(ref), "tokens.npy") for ref in text.tokens])


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _await_commit(ledger: Ledger, request: TrainRequest) -> Artifact:
    dist.barrier()
    return ledger.get(Ref(request.kind, request.ref.identity))
