"""`btm merge`: one averaged model as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens."""

import shutil
from pathlib import Path

from btm_cluster.algorithm import Grown
from btm_cluster.driver import Driver
from btm_cluster.equations.averaging import uniform_weights
from btm_cluster.errors import UserError
from btm_cluster.evaluation import fit_text
from btm_cluster.language_model.folder import say_block_length
from btm_cluster.language_model.model_card import add_reading
from btm_cluster.language_model.tokenizer import compare_with_transformers
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.new_folder import check_new_folder, new_folder
from btm_cluster.plan import Plan
from btm_cluster.recipes import average_request
from btm_cluster.requests import AverageRequest
from btm_cluster.run import TAKEN_OUT, check_text_is_known, find_grown
from btm_cluster.soups import soup_average_request, soup_request
from btm_cluster.steps.prepare import open_tokenizer

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
            "--weights uniform is the same for every text", found=f"--for {target}", remedy="leave out one of the two"
        )
    if weights != "uniform" and not target:
        names = ", ".join(text.name for text in plan.texts)
        raise UserError(f"--weights {weights} needs a text to merge for", expected=f"--for TEXT, such as {names}")
    check_new_folder(to)


def write_merged_model(plan: Plan, weights: str, target: str | None, to: Path, driver: Driver) -> dict[str, float]:
    """Averages the forest's experts (by the merge actor, if that was not done) and writes the model to the folder `to`.

    Returns the weight of each domain's expert, and of the seed where it has a part, largest first.

    Raises:
        UserError: no forest yet, or a text that is unknown, was taken out, or has nothing to search weights on.
    """
    if target is not None:
        check_text_is_known(plan, target, driver.ledger)
    grown = find_grown(plan, driver)
    request = _average(grown, weights, target, driver)
    average = driver.require(driver.workers.average, [request])[0]
    with new_folder(to) as folder:
        _write_folder(grown, average, folder, driver.ledger)
    parts = {request.card[parent.identity]: parent.weight for parent in request.parents}
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def _write_folder(grown: Grown, average: Artifact, folder: Path, ledger: Ledger) -> None:
    """The averaged model, its tokenizer, and what came with the pretrained model that is the seed."""
    seed, tokenizer = ledger.get(Ref("model", grown.forest.foundation.seed)), ledger.get(grown.ground.tokenizer)
    came_with_it = {blob.name: seed for blob in seed.blobs if grown.ground.pretrained is not None}
    files = came_with_it | {blob.name: tokenizer for blob in tokenizer.blobs}
    files |= dict.fromkeys(("README.md", "config.json", "model.safetensors"), average)
    for name, source in files.items():
        shutil.copyfile(ledger.open_file(source, name), folder / name)
    block_tokens = grown.ground.plan.training.block_tokens
    if grown.ground.pretrained is None:
        say_block_length(folder, block_tokens)
    tokens = open_tokenizer(ledger, grown.ground.tokenizer)
    compare_with_transformers(folder, tokens)
    add_reading(folder / "README.md", block_tokens, tokens.name(tokens.first_token), str(seed.note.get("from", "")))


def _average(grown: Grown, weights: str, target: str | None, driver: Driver) -> AverageRequest:
    """Which average is wanted: by given weights, or by those that a search on the text's development blocks finds."""
    forest, ground = grown.forest, grown.ground
    if weights == "uniform":
        return average_request(ground, weights, forest, uniform_weights(len(forest.experts)))
    text = next((text for text in ground.texts if text.name == target), None)
    if text is None:
        raise UserError(f"{target!r} was taken out of the forest", remedy=TAKEN_OUT)
    label = f"{weights} for {target}"
    if weights not in ("greedy", "learned"):
        experts = [Ref("model", expert.identity) for expert in forest.experts]
        fit = fit_text(ground, experts, text, driver)
        chosen = fit.argmax_weights if weights == "argmax" else fit.average_weights
        return average_request(ground, label, forest, chosen)
    if not text.tokens["development"]:
        raise UserError(
            f"{target!r} has no development text to search weights on",
            remedy="name `development` files for it in the plan, or say --weights uniform",
        )
    called = {expert.identity: expert.domain for expert in forest.experts}
    if weights == "learned":  # the seed may have a part in it
        called[forest.foundation.seed] = "the seed"
    models = [Ref("model", identity) for identity in called]
    search = soup_request(ground, "greedy" if weights == "greedy" else "learned", models, text)
    return soup_average_request(ground, label, driver.require(driver.workers.soup, [search])[0], called)
