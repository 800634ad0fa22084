"""Makes one model of several, an ordinary one: averages them, or merges their task vectors.

Averages of the same models are made in one pass over these.
"""

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from btm_cluster.data.tokenizer import TOKENIZER_FILES
from btm_cluster.equations.task_vectors import task_arithmetic, ties
from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.averaging import AveragesTogether, MergedWeights
from btm_cluster.language_model.stored_weights import ShardWriter, write_shards
from btm_cluster.language_model.tensor_files import Header, names_in_order, size_of
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.mixing.fitting import one_thread_each
from btm_cluster.requests import AverageRequest, FittedWeights, MergeRequest, TaskVectorRequest
from btm_cluster.requests.progress import Control, Counter, Phase
from btm_cluster.steps.stored import open_config, open_streamed, open_weights
from btm_cluster.storage.open_files import allow_open_files
from btm_cluster.storage.scratch import scratch_folder

STREAMED_FROM_SHARE = 0.5
"""Share of what a node keeps of a bucket's files: models that take more are streamed, so as not to drive each
other out."""
READ_AT_ONCE = 8
"""Chunks of all models that are read and checked while others are summed."""
READ_AHEAD_MODELS = 64
"""Models at most of which a bucket's next chunk is read before it is needed: two of 8 MiB each are 1 GiB in all,
and up to four for a moment where several threads sum. Of more models one chunk is in memory, one thread sums, and each
model waits for its next chunk, which is slower."""
SUMS_AT_ONCE = 16
"""Averages at most of one pass: each has a sum of 512 KiB in memory, and its files on disk until all are summed."""
SCRATCH_SHARE = 0.125
"""Share of the free disk below the temporary folder that the averages of one pass may take, if they are several: a merge
actor makes four passes at a time."""
SUMMED_BY = 4
"""Threads at most that sum averages of one pass, each some of their elements, and store them."""


def average(requests: Sequence[AverageRequest], ledger: Ledger, control: Control) -> Iterator[Artifact]:
    """Averages the models with the weights of each request; all requests name the same models.

    What is made already is left out, and a model is read only if it has a weight other than zero in what is
    not. The facts of an average hold `weights` by model identity, and `origin` as those of any model.

    Raises:
        IncompatibleError: models of different origins, shapes or tokenizers; before a weight is read.
    """
    found = ledger.find_all([request.ref for request in requests])
    lacking = [request for request, one in zip(requests, found, strict=True) if one is None]
    with closing(_averages(lacking, ledger, control)) as made:
        for one in found:
            yield next(made) if one is None else one


def _averages(
    requests: Sequence[AverageRequest], ledger: Ledger, control: Control
) -> Generator[Artifact, None, None]:
    if not requests:
        return
    weights = [weights_of(request, ledger) for request in requests]
    # In the order of identities: sums in float32 depend on it.
    refs = [ref for ref in requests[0].inputs["models"] if any(ref.identity in one for one in weights)]
    models = [ledger.get(ref) for ref in refs]
    check_compatible(ledger, models, requests[0].unrelated)
    allow_open_files()  # a mapped file stays open
    is_ahead = len(models) <= READ_AHEAD_MODELS
    threads = min(SUMMED_BY, os.cpu_count() or 1) if is_ahead else 1
    with (
        # Torch without threads of its own: others read and hash meanwhile.
        one_thread_each(),
        ThreadPoolExecutor(READ_AT_ONCE, thread_name_prefix="read") as readers,
        ThreadPoolExecutor(threads, thread_name_prefix="sum") as summers,
    ):
        streamed = partial(open_streamed, pool=readers, ahead=is_ahead)
        opened = streamed if _is_streamed(ledger, models) else open_weights
        stored = [opened(ledger, model) for model in models]
        at_once = _sums_at_once(stored[0].header)
        for first in range(0, len(requests), at_once):
            some, of_some = requests[first : first + at_once], weights[first : first + at_once]
            weights_AM = [[one.get(model.identity, 0.0) for model in models] for one in of_some]
            together = AveragesTogether(stored, weights_AM)
            with scratch_folder() as folder:
                counter = _counter(control, some[0], stored[0].header)
                files = _written(together, folder, summers, threads, counter)
                yield from summers.map(partial(_commit_average, ledger, models), some, of_some, files)


def _commit_average(
    ledger: Ledger,
    models: Sequence[Artifact],
    request: AverageRequest,
    weights: Mapping[str, float],
    files: Mapping[str, Path],
) -> Artifact:
    first = next(model for model in models if model.identity in weights)
    by_identity = {model.identity: weights[model.identity] for model in models if model.identity in weights}
    return _commit(request, first, files, {"weights": by_identity}, ledger)


def _sums_at_once(header: Header) -> int:
    """How many averages are made in one pass: what the temporary folder's disk has room for, one at least."""
    size = sum(size_of(header[name]) for name in names_in_order(header))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return max(1, min(SUMS_AT_ONCE, int(SCRATCH_SHARE * free) // max(size, 1)))


def _written(
    together: AveragesTogether, folder: Path, summers: Executor, threads: int, counter: Counter
) -> list[dict[str, Path]]:
    """The files of each average, by name."""
    with ExitStack() as stack:
        writers = []
        for number, header in enumerate(together.headers):
            own = folder / str(number)
            own.mkdir()
            writers.append(stack.enter_context(ShardWriter(header, own)))
        together.write(writers, summers, threads, counter.add)
    return [writer.files for writer in writers]


def _is_streamed(ledger: Ledger, models: Sequence[Artifact]) -> bool:
    """Whether models are read from the store piece by piece: where that is a folder, or where they are too
    large for the node's copies of files, which other averages would use too."""
    total = sum(blob.size_bytes for model in models for blob in model.blobs)
    return total > STREAMED_FROM_SHARE * ledger.storage.copies_bytes


def merge_task_vectors(request: TaskVectorRequest, ledger: Ledger, control: Control) -> Artifact:
    """Merges the models' differences to their common ancestor.

    Its facts hold `origin` as those of any model; of task arithmetic also `weights` by model identity: it is
    an average in which the ancestor has what is left to one.

    Raises:
        IncompatibleError: as for averages; the ancestor is one of the models then.
    """
    base = ledger.get(request.base)
    models = [ledger.get(model) for model in request.inputs["models"]]
    check_compatible(ledger, [base, *models])
    facts = {"weights": task_weights(request)} if request.method == "task-arithmetic" else {}

    def method(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        start, *others = tensors
        if request.method == "ties":
            return ties(start, others, request.density, request.scale)
        return task_arithmetic(start, others, request.scale)

    merged = MergedWeights([open_weights(ledger, model) for model in (base, *models)], method)
    with scratch_folder() as folder:
        counter = _counter(control, request, merged.header)
        return _commit(request, base, write_shards(merged, folder, count=counter.add), facts, ledger)


def task_weights(request: TaskVectorRequest) -> dict[str, float]:
    """The weights of task arithmetic by model identity: θ_0 + λ Σ (θ_i − θ_0) = (1 − kλ) θ_0 + λ Σ θ_i."""
    shares = dict.fromkeys((model.identity for model in request.inputs["models"]), request.scale)
    return {request.base.identity: 1 - len(shares) * request.scale} | shares


def _counter(control: Control, request: MergeRequest, header: Header) -> Counter:
    phase: Phase = "averaging" if isinstance(request, AverageRequest) else "merging"
    return Counter(control, request.shown, phase, len(names_in_order(header)), "tensors")


def _commit(
    request: MergeRequest,
    first: Artifact,
    weights: Mapping[str, Path],
    facts: Mapping[str, Any],
    ledger: Ledger,
) -> Artifact:
    """Stores files of weights, as a model that is like the first otherwise."""
    files = {**weights, **{name: ledger.open_file(first, name) for name in ("config.json", *TOKENIZER_FILES)}}
    facts = {"role": "average", **facts, "origin": first.facts["origin"]}
    return ledger.commit(request, files, facts, {"name": request.label})


def weights_of(request: AverageRequest, ledger: Ledger) -> dict[str, float]:
    """The weight of each model that has one, by identity: as given, or as the fit found them."""
    if isinstance(request.weights, FittedWeights):
        fitted: dict[str, float] = ledger.get(request.weights.fit).facts["weights"][request.weights.name]
        return {identity: weight for identity, weight in fitted.items() if weight}
    pairs = zip(request.models, request.weights, strict=True)
    return {model.identity: weight for model, weight in pairs if weight}


def check_compatible(ledger: Ledger, models: list[Artifact], unrelated: bool = False) -> None:
    """Refuses models whose average would be noise: their configurations,
    tokenizers and origin must be the same.

    With `unrelated`, origins may differ.
    """
    first = models[0]
    for other in models[1:]:
        if not _are_alike(ledger, first, other):
            remedy = "average only models of one architecture"
            raise _incompatible(first, other, "another config.json", "the same config.json", remedy)
        if other.blob("tokenizer.json").sha256 != first.blob("tokenizer.json").sha256:
            remedy = "average only models that share a tokenizer"
            raise _incompatible(first, other, "another tokenizer.json", "the same tokenizer.json", remedy)
        if not unrelated and other.facts["origin"] != first.facts["origin"]:
            raise _incompatible(
                first,
                other,
                f"a model that goes back to initialisation {other.facts['origin'][:12]}",
                f"one that goes back to {first.facts['origin'][:12]}",
                "average only experts that branched from one seed; experts without a common ancestor can be "
                "ensembled",
            )


def _are_alike(ledger: Ledger, first: Artifact, other: Artifact) -> bool:
    """Whether two models have the same configuration, whichever transformers wrote it."""
    if first.blob("config.json").sha256 == other.blob("config.json").sha256:
        return True
    configs = [open_config(ledger, model) for model in (first, other)]
    for config in configs:
        config.pop("transformers_version", None)
    return configs[0] == configs[1]


def _incompatible(
    first: Artifact, other: Artifact, found: str, expected: str, remedy: str
) -> IncompatibleError:
    return IncompatibleError(
        f"the models {first.identity[:12]} and {other.identity[:12]} cannot be averaged",
        found=found,
        expected=expected,
        remedy=remedy,
    )
