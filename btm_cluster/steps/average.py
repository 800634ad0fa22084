"""Makes one model of several, an ordinary one: averages them, or merges their task vectors."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from btm_cluster.data.tokenizer import TOKENIZER_FILES
from btm_cluster.equations.task_vectors import task_arithmetic, ties
from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.averaging import MergedWeights, average_models
from btm_cluster.language_model.stored_weights import StoredWeights, write_shards
from btm_cluster.language_model.tensor_files import names_in_order
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
"""Models at most of which a bucket's next chunk is read before it is needed: two of 8 MiB each are 1 GiB in all.
Of more models one chunk is in memory, and each waits for its next one, which is slower."""


def average(request: AverageRequest, ledger: Ledger, control: Control) -> Artifact:
    """Averages the models with their weights; those of weight zero are not read.

    Its facts hold `weights` by model identity, and `origin` as those of any model.

    Raises:
        IncompatibleError: models of different origins, shapes or tokenizers; before a weight is read.
    """
    # In the order of identities: sums in float32 depend on it.
    weights = dict(sorted(weights_of(request, ledger).items()))
    models = [ledger.get(model) for model in request.inputs["models"] if model.identity in weights]
    check_compatible(ledger, models, request.unrelated)
    allow_open_files()  # a mapped file stays open
    # Summed by one thread: others read and hash meanwhile.
    with one_thread_each(), ThreadPoolExecutor(READ_AT_ONCE, thread_name_prefix="read") as pool:
        streamed = partial(open_streamed, pool=pool, ahead=len(models) <= READ_AHEAD_MODELS)
        opened = streamed if _is_streamed(ledger, models) else open_weights
        average = average_models([opened(ledger, model) for model in models], list(weights.values()))
        return _commit(request, models[0], average, {"weights": weights}, ledger, control)


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
    return _commit(request, base, merged, facts, ledger, control)


def task_weights(request: TaskVectorRequest) -> dict[str, float]:
    """The weights of task arithmetic by model identity: θ_0 + λ Σ (θ_i − θ_0) = (1 − kλ) θ_0 + λ Σ θ_i."""
    shares = dict.fromkeys((model.identity for model in request.inputs["models"]), request.scale)
    return {request.base.identity: 1 - len(shares) * request.scale} | shares


def _commit(
    request: MergeRequest,
    first: Artifact,
    merged: StoredWeights,
    facts: Mapping[str, Any],
    ledger: Ledger,
    control: Control,
) -> Artifact:
    with scratch_folder() as folder:
        phase: Phase = "averaging" if isinstance(request, AverageRequest) else "merging"
        tensors = len(names_in_order(merged.header))
        counter = Counter(control, request.label, phase, tensors, "tensors")
        files = write_shards(merged, folder, count=counter.add)
        for name in ("config.json", *TOKENIZER_FILES):
            files[name] = ledger.open_file(first, name)
        facts = {"role": "average", **facts, "origin": first.facts["origin"]}
        return ledger.commit(request, files, facts, {"name": request.label}, keep=False)


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
