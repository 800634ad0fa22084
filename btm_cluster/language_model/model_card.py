"""The README.md of a model's folder: what the model is made of, how it reads, and how well it predicts, in
words and for the hub.

Pure: takes values and returns text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Part:
    """A model that another one is made of."""

    name: str
    """The domain of an expert, or `the seed`."""
    identity: str
    weight: float | None
    """None where it has no weight of its own."""


@dataclass(frozen=True)
class Figures:
    """How well a model predicts a text."""

    perplexity: float
    interval: tuple[float, float]
    """The perplexity's, at 95 % over documents."""
    bits_per_byte: float


@dataclass(frozen=True)
class Result:
    """Figures on the test split of a text, by system."""

    text: str
    tokens: int
    figures: Mapping[str, Figures]


@dataclass(frozen=True)
class Card:
    """All that a card says."""

    title: str
    what: str
    """A sentence or two that say what the model is."""
    identity: str
    relation: str | None
    """To its base model, in the hub's words: `finetune`, `adapter` or `merge`; None where it is that model."""
    parts: Sequence[Part]
    domains: Sequence[str]
    """Domains whose text it learned from."""
    pretrained: str
    """The pretrained model that is the seed, by its name on the hub or its folder; else empty."""
    block_tokens: int
    first_token: str
    """The token that every block is read after."""
    licence: str | None
    """As the hub spells it, such as apache-2.0."""
    licence_files: Sequence[str]
    """Files beside the card that came with the pretrained model."""
    results: Sequence[Result] = ()


def card_text(card: Card) -> str:
    """The card in Markdown."""
    fields = yaml.safe_dump(_fields(card), sort_keys=False, allow_unicode=True)
    parts = [
        f"# {card.title}",
        f"{card.what} The identity of this model is `{card.identity}`.",
        _made_of(card),
        _reading(card),
        _licence(card),
        _results(card.results),
    ]
    return f"---\n{fields}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _fields(card: Card) -> dict[str, Any]:
    """The metadata that the hub reads."""
    library = "peft" if card.relation == "adapter" else "transformers"
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    fields["tags"] = ["branch-train-merge", *(["merge"] if card.relation == "merge" else [])]
    if card.pretrained and is_hub_name(card.pretrained):
        fields["base_model"] = card.pretrained
        fields |= {"base_model_relation": card.relation} if card.relation else {}
    if card.licence is not None:
        fields["license"] = card.licence
    elif card.licence_files:
        fields |= {"license": "other", "license_name": "of-the-base-model"}
        fields["license_link"] = card.licence_files[0]
    return fields


def is_hub_name(source: str) -> bool:
    """Whether a pretrained model's source is its name on the hub, and no folder."""
    return HUB_NAME.fullmatch(source) is not None


def _made_of(card: Card) -> str:
    lines = [f"It learned from text of: {', '.join(card.domains)}."] if card.domains else []
    if card.pretrained:
        known = (
            card.pretrained if is_hub_name(card.pretrained) else card.pretrained.rstrip("/").split("/")[-1]
        )
        lines.append(f"Its seed is the pretrained model {known}.")
    if card.parts:
        lines += ["", "| model | identity | weight |", "|---|---|---|"]
        lines += [
            f"| {part.name} | `{part.identity}` | {'–' if part.weight is None else f'{part.weight:.6f}'} |"
            for part in card.parts
        ]
    return "\n".join(lines)


def _reading(card: Card) -> str:
    return (
        f"It was trained on blocks of {card.block_tokens} tokens, each read after `{card.first_token}`: text "
        "beyond a block's length is new to it.\n\n"
        "Its perplexity is exp of the mean negative log-probability of all tokens, each document's "
        "end-of-text token among them; bits per byte are of the text in UTF-8, without these. Documents follow each "
        "other in blocks of that length, and each block is read by itself."
    )


def _licence(card: Card) -> str:
    if card.licence is not None:
        return f"Licence: {card.licence}."
    files = f" Files that came with the base model: {', '.join(card.licence_files)}."
    stated = "No licence is stated here: see those of the domains' texts and of any base model."
    return stated + (files if card.licence_files else "")


def _results(results: Sequence[Result]) -> str:
    if not results:
        return ""
    systems = list(dict.fromkeys(system for result in results for system in result.figures))
    lines = [
        "## Test perplexity, and bits per byte",
        "",
        f"| text | tokens | {' | '.join(systems)} |",
        f"|---|---|{'---|' * len(systems)}",
    ]
    for result in results:
        cells = [_words(result.figures[system]) if system in result.figures else "" for system in systems]
        lines.append(f"| {result.text} | {result.tokens:,} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "In brackets is the perplexity's 95 % interval over documents, from a bootstrap."]
    )


def _words(figures: Figures) -> str:
    low, high = figures.interval
    return f"{figures.perplexity:.2f} ({low:.2f} to {high:.2f}), {figures.bits_per_byte:.4f}"
