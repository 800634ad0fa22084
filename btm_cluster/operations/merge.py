"""`btm merge`: one averaged model as a Hugging Face folder that
`AutoModelForCausalLM.from_pretrained` opens."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from btm_cluster.algorithm import Grown
from btm_cluster.data.tokenizer import compare_with_transformers
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedText
from btm_cluster.errors import UserError
from btm_cluster.evaluation.evaluate import forest_ensemble
from btm_cluster.evaluation.fitting import SEARCHES, average_request, scores_for, weight_requests
from btm_cluster.evaluation.systems import Ensemble, with_seed
from btm_cluster.language_model.averaging import average_files
from btm_cluster.language_model.folder import say_block_length
from btm_cluster.language_model.model import load_model
from btm_cluster.language_model.model_card import add_reading
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.operations.evaluate import TAKEN_OUT, check_text_is_known, find_grown
from btm_cluster.plan import Plan
from btm_cluster.steps.average import check_compatible
from btm_cluster.steps.stored import open_config, open_tokenizer
from btm_cluster.storage.new_folder import check_new_folder, new_folder
from btm_cluster.storage.scratch import scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER_FILES = ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""There in every folder; what came with a pretrained model and its tokenizer lies beside them."""


def check_merge_call(plan: Plan, weights: str, target: str | None, to: Path) -> None:
    """Refuses a call that cannot be met, before anything starts.

    Raises:
        UserError: saying what is wrong with it.
    """
    known = ("uniform", "argmax", "posterior", "greedy", "learned")
    if weights not in known:
        raise UserError("--weights is unknown", found=weights, expected=", ".join(known))
    if weights == "uniform" and target is not None:
        raise UserError(
            "--weights uniform is the same for every text",
            found=f"--for {target}",
            remedy="leave out one of the two",
        )
    if weights != "uniform" and not target:
        names = ", ".join(text.name for text in plan.texts)
        raise UserError(
            f"--weights {weights} needs a text to merge for", expected=f"--for TEXT, such as {names}"
        )
    check_new_folder(to)


def write_merged_model(
    plan: Plan, weights: str, target: str | None, to: Path, driver: Driver, version: int | None = None
) -> dict[str, float]:
    """Averages the experts of a version of the forest, by default the newest, and writes
    the model to the folder `to`. An average that is stored is not made again.

    Returns the weight of each domain's expert, and of the seed where it has a part, largest first.

    Raises:
        UserError: no forest yet, no such version, or a text that is unknown, was taken out, or has nothing to
        search weights on.
    """
    if target is not None:
        check_text_is_known(plan, target, driver.ledger, version)
    grown = find_grown(plan, driver, version)
    ensemble, name, text = _wanted(grown, weights, target)
    steps = weight_requests(grown.prepared, ensemble, name, text)
    scores = scores_for(grown.prepared, ensemble, text) if name != "greedy" and text is not None else []
    average = driver.require([*scores, *steps, average_request(grown.prepared, ensemble, name, text)])[-1]
    with new_folder(to) as folder:
        _write_folder(grown, average, folder, driver.ledger)
    called = {model.identity: called for called, model in ensemble.models}
    parts = {called[identity]: weight for identity, weight in average.facts["weights"].items()}
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def average_by_weights(
    ledger: Ledger, models: Mapping[str, Ref], weights: Mapping[str, float]
) -> "PreTrainedModel":
    """The average of stored models with weights that are given by name; nothing is stored.

    Raises:
        UserError: a name that no model has, or weights that do not sum to one.
        IncompatibleError: models of different origins, shapes or tokenizers.
    """
    _check_weights(weights, models)
    # In the order of identities, as the step has them: sums in float32 depend on it.
    used = sorted((models[name].identity, weight) for name, weight in weights.items() if weight)
    found = [ledger.get(Ref("model", identity)) for identity, _ in used]
    check_compatible(ledger, found)
    with scratch_folder() as folder:
        file = folder / "model.safetensors"
        average_files(
            [ledger.open_file(one, "model.safetensors") for one in found], [w for _, w in used], file
        )
        return load_model(open_config(ledger, found[0]), file)


def _check_weights(weights: Mapping[str, float], models: Mapping[str, Ref]) -> None:
    unknown = sorted(weights.keys() - models.keys())
    if unknown:
        raise UserError(
            "weights of models that the forest has not",
            found=", ".join(unknown),
            expected=f"some of {', '.join(models)}",
        )
    total = math.fsum(weights.values())
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise UserError("weights do not sum to one", found=f"{total:g}", remedy="divide them by their sum")


def _write_folder(grown: Grown, average: Artifact, folder: Path, ledger: Ledger) -> None:
    """The averaged model, its tokenizer, and what came with the pretrained model that is the seed."""
    seed, tokenizer = (
        ledger.get(Ref("model", grown.forest.foundation.seed)),
        ledger.get(grown.prepared.tokenizer),
    )
    came_with_it = {blob.name: seed for blob in seed.blobs if grown.prepared.pretrained is not None}
    files = came_with_it | {blob.name: tokenizer for blob in tokenizer.blobs}
    files |= dict.fromkeys(("README.md", "config.json", "model.safetensors"), average)
    for name, source in files.items():
        shutil.copyfile(ledger.open_file(source, name), folder / name)
    block_tokens = grown.prepared.plan.training.block_tokens
    if grown.prepared.pretrained is None:
        say_block_length(folder, block_tokens)
    tokens = open_tokenizer(ledger, grown.prepared.tokenizer)
    compare_with_transformers(folder, tokens)
    add_reading(
        folder / "README.md", block_tokens, tokens.name(tokens.first_token), str(seed.note.get("from", ""))
    )


def _wanted(grown: Grown, weights: str, target: str | None) -> tuple[Ensemble, str, PreparedText | None]:
    """The models to average, the name of their weights, and the text that these are for."""
    forest, prepared = grown.forest, grown.prepared
    experts = forest_ensemble(prepared, forest)
    if weights == "uniform":
        return experts, weights, None
    text = next((text for text in prepared.texts if text.name == target), None)
    if text is None:
        raise UserError(f"{target!r} was taken out of the forest", remedy=TAKEN_OUT)
    if weights in SEARCHES and not text.tokens["development"]:
        raise UserError(
            f"{target!r} has no development text to search weights on",
            remedy="name `development` files for it in the plan, or say --weights uniform",
        )
    if weights == "learned":
        return with_seed(experts), weights, text
    return experts, prepared.plan.merging.average_prior if weights == "posterior" else weights, text
