"""The README.md of a merged model: what it is made of, in words and for the hub."""

from collections.abc import Mapping
from pathlib import Path

from btm_cluster.requests import AverageRequest


def write_card(request: AverageRequest, weights: Mapping[str, float], file: Path) -> None:
    """Writes the card of an average: its plan, its models and their weights, by identity."""
    rows = [
        f"| {request.card.get(identity, '')} | `{identity}` | {weight:.6f} |"
        for identity, weight in sorted(weights.items(), key=lambda item: -item[1])
    ]
    file.write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [branch-train-merge]
---

# {request.card.get("plan", "forest")}: {request.label}

A parameter average of experts that branched from one seed model, after Branch-Train-Merge (Li et al., 2022). Weights
were summed in float32. The identity of this average is `{request.ref.identity}`.

| domain | expert | weight |
|---|---|---|
"""
        + "\n".join(rows)
        + "\n",
        encoding="utf-8",
    )


def add_reading(file: Path, block_tokens: int, first_token: str, pretrained: str) -> None:
    """Adds to a card how much the model reads at once and after which token, and
    from which pretrained model it comes."""
    origin = f" Its seed is the pretrained model {pretrained}." if pretrained else ""
    with file.open("a", encoding="utf-8") as card:
        card.write(
            f"\nIt was trained on blocks of {block_tokens} tokens, each read after `{first_token}`: text "
            "beyond a block's length "
            f"is new to it.{origin}\n"
        )
