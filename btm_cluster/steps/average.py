"""The verb *average*: models to one model, as a Hugging Face folder whose card says what it is made of."""

import json
from typing import Any

from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.averaging import average_files
from btm_cluster.language_model.model_card import write_card
from btm_cluster.language_model.tokenizer import TOKENIZER_FILES
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import AverageRequest, way_of
from btm_cluster.storage.scratch import scratch_folder
from btm_cluster.workers import Control, Progress


def average(request: AverageRequest, ledger: Ledger, control: Control) -> Artifact:
    """Averages the parents with their weights.

    Raises:
        IncompatibleError: parents without a common ancestor, or of other shapes or tokenizers; before a weight is read.
    """
    control.report(Progress(request.label, "averaging"))
    # In the recipe's order: sums in float32 depend on it.
    ordered = sorted(request.parents, key=lambda parent: parent.identity)
    parents = [ledger.get(Ref("model", parent.identity)) for parent in ordered]
    check_compatible(ledger, parents, request.unrelated)
    with scratch_folder() as folder:
        files = {"model.safetensors": folder / "model.safetensors", "README.md": folder / "README.md"}
        weights = [parent.weight for parent in ordered]
        average_files(
            [ledger.open_file(parent, "model.safetensors") for parent in parents], weights, files["model.safetensors"]
        )
        write_card(request, files["README.md"])
        for name in ("config.json", *TOKENIZER_FILES):
            files[name] = ledger.open_file(parents[0], name)
        return ledger.commit(request.ref, request.recipe, files, {"role": "average"}, {"name": request.label})


def open_config(ledger: Ledger, model: Artifact) -> dict[str, Any]:
    """A stored model's configuration."""
    return dict(json.loads(ledger.open_file(model, "config.json").read_text(encoding="utf-8")))


def check_compatible(ledger: Ledger, models: list[Artifact], unrelated: bool = False) -> None:
    """Refuses models whose average would be noise: their configurations, tokenizers and ancestor must be the same.

    With `unrelated`, ancestors may differ.
    """
    first = models[0]
    for other in models[1:]:
        if not _are_alike(ledger, first, other):
            remedy = "average only models of one architecture"
            raise _incompatible(first, other, "another config.json", "the same config.json", remedy)
        if other.blob("tokenizer.json").sha256 != first.blob("tokenizer.json").sha256:
            remedy = "average only models that share a tokenizer"
            raise _incompatible(first, other, "another tokenizer.json", "the same tokenizer.json", remedy)
        if not unrelated and _origin(ledger, other) != _origin(ledger, first):
            raise _incompatible(
                first,
                other,
                f"branched from {ancestor(ledger, other)[:12]}",
                f"branched from {ancestor(ledger, first)[:12]}",
                "average only experts that branched from one seed; experts without a common ancestor can be ensembled",
            )


def _are_alike(ledger: Ledger, first: Artifact, other: Artifact) -> bool:
    """Whether two models have the same configuration, whichever transformers wrote it."""
    if first.blob("config.json").sha256 == other.blob("config.json").sha256:
        return True
    configs = [open_config(ledger, model) for model in (first, other)]
    for config in configs:
        config.pop("transformers_version", None)
    return configs[0] == configs[1]


def ancestor(ledger: Ledger, model: Artifact) -> str:
    """Identity of the seed that a model descends from, through purged models too; its own, if it has no parents."""
    seen, parents = model.identity, model.parents
    while parents:
        seen, parents = parents[0], ledger.parents_of(parents[0])
    return seen


def _origin(ledger: Ledger, model: Artifact) -> str:
    """The same for models that come from one initialisation: a Transformer-LM is no descendant of the seeds that it passed."""
    root = ancestor(ledger, model)
    found = ledger.find(Ref("model", root))
    return root if found is None else way_of(found.recipe)


def _incompatible(first: Artifact, other: Artifact, found: str, expected: str, remedy: str) -> IncompatibleError:
    return IncompatibleError(
        f"the models {first.identity[:12]} and {other.identity[:12]} cannot be averaged",
        found=found,
        expected=expected,
        remedy=remedy,
    )
