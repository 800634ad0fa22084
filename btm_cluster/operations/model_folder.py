"""A forest's model as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens: weights,
tokenizer, what came with a pretrained seed, and the model card."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from btm_cluster.algorithm import Grown
from btm_cluster.data.tokenizer import (
    CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    compare_with_transformers,
    write_config,
)
from btm_cluster.driver.chat_template import chat_template_of
from btm_cluster.errors import UserError
from btm_cluster.evaluation.stored_results import stored_results
from btm_cluster.forest import Forest, Parent
from btm_cluster.language_model.adapter_files import ADAPTER_FILE, write_adapter_config
from btm_cluster.language_model.folder import say_block_length, write_model
from btm_cluster.language_model.model_card import Card, Part, Result, card_text
from btm_cluster.language_model.stored_weights import SHARD_BYTES, holds_whole_weights
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.plan import ChatTemplate, Plan
from btm_cluster.steps.stored import open_adapter_config, open_tokenizer, open_weights
from btm_cluster.storage.new_folder import new_folder

log = logging.getLogger(__name__)
CARD, CONFIG = "README.md", "config.json"
LICENCES = ("LICENSE", "NOTICE")
SEED = "the seed"
OTHER_VERSION = "an expert of an earlier version"
MIXTURE_OF_EXPERTS = "mixture-of-experts"


@dataclass(frozen=True)
class ForestModel:
    """A model of a forest, to be written."""

    name: str
    """`seed`, a domain, or an average by its weights."""
    model: Artifact
    results: Sequence[Result] = ()
    licence: str | None = None
    """For the card, as the hub spells it."""
    chat_template: ChatTemplate | None = None
    """Which it was trained with; without one, what came with the tokenizer."""


def chat_template_of_forest(forest: Forest, plan: Plan | None, ledger: Ledger) -> ChatTemplate | None:
    """The template that rendered the conversations of the forest's domains, where there are any.

    Only the plan names it. Without one a warning says so.
    """
    learned = {text for _, text in forest.foundation.domains} | {expert.text for expert in forest.experts}
    texts = ledger.find_all([Ref("text", text) for text in sorted(learned)])
    if not any(text is not None and text.facts.get("conversations") for text in texts):
        return None
    if plan is not None:
        return chat_template_of(plan)
    log.warning(
        "the forest learned from conversations, by a chat template that only its plan names: the export has the "
        "tokenizer's own, if any; name the plan instead of --store"
    )
    return None


def write_folder(
    ledger: Ledger, forest: Forest, called: str, one: ForestModel, to: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the folder `to`, which appears once all of it is there. `called` is the forest's name.

    Memory: one tensor.
    """
    block_tokens = forest.foundation.block_tokens
    seed = ledger.get(Ref("model", forest.foundation.seed))
    is_pretrained = seed.recipe["pretrained"] is not None
    with new_folder(to) as folder:
        files = _write_what_came(ledger, forest, seed, folder)
        write_chat_template(one.chat_template, folder)
        config, weights = ledger.open_file(one.model, CONFIG), open_weights(ledger, one.model)
        write_model(config, weights, folder, None if is_pretrained else block_tokens, shard_bytes)
        if not is_pretrained:
            say_block_length(folder, block_tokens)
        relation = "merge" if one.model.facts["role"] in ("average", MIXTURE_OF_EXPERTS) else "finetune"
        _finish(ledger, forest, called, one, seed, relation, files, folder)


def write_adapter_folder(ledger: Ledger, forest: Forest, called: str, one: ForestModel, to: Path) -> None:
    """Writes the adapter of a LoRA expert to the folder `to`, as PEFT opens it over its base.

    It names the base where that is a pretrained model.

    Raises:
        UserError: the expert has no adapter.
    """
    if one.model.facts.get("trains") != "lora":
        raise UserError(
            f"the expert of {one.name} has no adapter to export",
            found=f"an expert that trained {one.model.facts.get('trains', 'all')}",
            expected="one that was trained with `branching: {train: lora}`",
            remedy="leave --adapter out: the whole model is written",
        )
    seed = ledger.get(Ref("model", forest.foundation.seed))
    is_over_pretrained = one.model.inputs["start"] == (seed.ref,) and seed.recipe["pretrained"] is not None
    config = open_adapter_config(ledger, one.model)
    config["base_model_name_or_path"] = seed.note.get("from") if is_over_pretrained else None
    with new_folder(to) as folder:
        files = _write_what_came(ledger, forest, seed, folder)
        write_chat_template(one.chat_template, folder)
        shutil.copyfile(ledger.open_file(one.model, ADAPTER_FILE), folder / ADAPTER_FILE)
        write_adapter_config(config, folder)
        _finish(ledger, forest, called, one, seed, "adapter", files, folder)


def _write_what_came(ledger: Ledger, forest: Forest, seed: Artifact, folder: Path) -> list[str]:
    """Writes the files of the tokenizer, and what came with a pretrained seed; returns their names."""
    tokenizer = ledger.get(Ref("tokenizer", forest.foundation.tokenizer))
    # What came with a pretrained model lies beside its weights, what came with a tokenizer beside that.
    files = {blob.name: seed for blob in seed.blobs} if seed.recipe["pretrained"] is not None else {}
    files |= {blob.name: tokenizer for blob in tokenizer.blobs}
    for name, source in files.items():
        if name not in (CARD, CONFIG) and not holds_whole_weights(name):
            shutil.copyfile(ledger.open_file(source, name), folder / name)
    return list(files)


def write_chat_template(template: ChatTemplate | None, folder: Path) -> None:
    """Puts a template in the place of all that came with the tokenizer."""
    if template is None:
        return
    config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    if config.pop("chat_template", None) is not None:
        write_config(config, folder)
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / CHAT_TEMPLATE).write_text(template.source, encoding="utf-8")


def _finish(
    ledger: Ledger,
    forest: Forest,
    called: str,
    one: ForestModel,
    seed: Artifact,
    relation: str,
    files: Sequence[str],
    folder: Path,
) -> None:
    """Checks the tokenizer as transformers opens it, and writes the card."""
    tokens = open_tokenizer(ledger, Ref("tokenizer", forest.foundation.tokenizer))
    compare_with_transformers(folder, tokens)
    licences = sorted(name for name in files if name.startswith(LICENCES))
    card = _card(forest, called, one, seed, relation, tokens.name(tokens.first_token), licences)
    (folder / CARD).write_text(card_text(card), encoding="utf-8")


def _card(
    forest: Forest,
    called: str,
    one: ForestModel,
    seed: Artifact,
    relation: str,
    first_token: str,
    licence_files: Sequence[str],
) -> Card:
    model = one.model
    rounded = "float32" if relation == "adapter" else stored_type(seed)  # adapters are never rounded
    return Card(
        title=f"{called}: {one.name}",
        what=_what(forest, one) + ("" if rounded == "float32" else f" Its weights are rounded to {rounded}."),
        identity=model.identity,
        relation=None if model.identity == seed.identity else relation,
        parts=parts_of(forest, model),
        domains=_domains(forest, model, seed.recipe["pretrained"] is not None),
        pretrained=str(seed.note.get("from", "")),
        block_tokens=forest.foundation.block_tokens,
        first_token=first_token,
        licence=one.licence,
        licence_files=licence_files,
        results=one.results,
    )


def stored_type(seed: Artifact) -> str:
    """The type in which a forest's weights are stored, by its seed: `training.weights`."""
    return str(seed.recipe["training"].get("weights", "float32"))


def results_of(grown: Grown, model: Ref, ledger: Ledger) -> tuple[Result, ...]:
    """A model's test perplexities on the plan's texts, beside the seed's and the Transformer-LM's, as far as
    the store has scores."""
    systems = {"this model": model, SEED: Ref("model", grown.forest.foundation.seed)}
    systems |= {"Transformer-LM": grown.baseline} if grown.baseline is not None else {}
    return stored_results(grown.prepared, systems, ledger)


def parts_of(forest: Forest, model: Artifact) -> tuple[Part, ...]:
    """The models that a model of the forest is made of, the largest weight first, and then by name; the
    experts of a mixture by number."""
    names = {forest.foundation.seed: SEED} | {one.identity: one.domain for one in forest.experts}
    if model.facts["role"] == MIXTURE_OF_EXPERTS:
        return tuple(
            Part(f"expert {number}: {names.get(one.identity, OTHER_VERSION)}", one.identity, None)
            for number, one in enumerate(model.inputs["models"])
        )
    weights: Mapping[str, float | None]
    weights = {parent.identity: parent.weight for parent in _expert_parents(forest, model)}
    if "models" in model.inputs:
        weights = model.facts.get("weights") or dict.fromkeys(model.parents)
    parts = [
        Part(names.get(identity, OTHER_VERSION), identity, weight) for identity, weight in weights.items()
    ]
    return tuple(sorted(parts, key=lambda part: (-(part.weight or 0.0), part.name)))


def _expert_parents(forest: Forest, model: Artifact) -> tuple[Parent, ...]:
    return next((one.parents for one in forest.experts if one.identity == model.identity), ())


def _what(forest: Forest, one: ForestModel) -> str:
    method = "after Branch-Train-Merge (Li, Gururangan et al., 2022)."
    model = one.model
    if model.identity == forest.foundation.seed:
        return f"The seed of a forest of experts, {method}"
    if model.facts["role"] == MIXTURE_OF_EXPERTS:
        return _what_mixture(forest, model, method)
    if model.facts["role"] != "average":
        tokens = model.facts["tokens"]
        how = {"lora": " with LoRA", "feed-forward": ", its feed-forwards alone"}.get(
            str(model.facts.get("trains")), ""
        )
        return f"The expert of the domain {one.name}, trained{how} on {tokens:,} tokens of it, {method}"
    if "base" not in model.inputs:
        return (
            f"A parameter average of experts that branched from one seed, {method} It was summed in float32."
        )
    recipe = model.recipe
    if recipe["method"] == "ties":
        return (
            "A merge of experts that branched from one seed by TIES-Merging (Yadav et al., 2023), of density "
            f"{recipe['density']:g} in each tensor and scale {recipe['scale']:g}, {method}"
        )
    return (
        "A merge of experts that branched from one seed by task arithmetic (Ilharco et al., 2022), of scale "
        f"{recipe['scale']:g}, {method}"
    )


def _what_mixture(forest: Forest, model: Artifact, method: str) -> str:
    (rest,) = model.inputs["rest"]
    whose = "the seed's" if rest.identity == forest.foundation.seed else "those of their uniform average"
    close = (
        "The experts differ in feed-forwards alone: where a token goes to one expert in every layer, it is "
        "predicted as by that expert."
        if model.facts["is_exact"]
        else "It approximates the experts, whose attention, embeddings and norms differ too."
    )
    return (
        f"A mixture of the feed-forwards of {len(model.inputs['models'])} experts that branched from one seed, "
        f"{method} In every layer a router sends each token to {model.recipe['experts_per_token']} of them, by "
        f"its largest scores. Attention, embeddings and norms are {whose}. {close}"
    )


def _domains(forest: Forest, model: Artifact, is_pretrained: bool) -> list[str]:
    """The domains whose text a model learned from, through whatever it started from."""
    experts = {one.identity: one for one in forest.experts}
    found = set() if is_pretrained else {name for name, _ in forest.foundation.domains}
    waiting = [model.identity, *(part.identity for part in parts_of(forest, model))]
    while waiting:
        expert = experts.pop(waiting.pop(), None)
        if expert is not None:
            found.add(expert.domain)
            waiting += [parent.identity for parent in expert.parents]
    return sorted(found)
