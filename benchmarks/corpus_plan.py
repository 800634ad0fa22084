"""A plan over the folders of a corpus, or over text of this Python installation. Knows the settings of docs/results;
runs nothing."""

import argparse
from contextlib import chdir
from pathlib import Path
from typing import Any

import yaml

MODEL_SIZES: dict[str, dict[str, int]] = {  # parameters without embeddings, as docs/results has 3m and 10m
    "tiny": {"n_layer": 1, "n_embd": 64, "n_head": 2, "block_tokens": 128, "vocabulary": 1024},
    "1m": {"n_layer": 2, "n_embd": 128, "n_head": 4, "block_tokens": 256, "vocabulary": 4096},
    "3m": {"n_layer": 4, "n_embd": 256, "n_head": 4, "block_tokens": 1024, "vocabulary": 16_384},
    "10m": {"n_layer": 6, "n_embd": 384, "n_head": 6, "block_tokens": 1024, "vocabulary": 16_384},
}
SPLITS = {"text": "train", "development": "valid", "test": "test"}


def corpus_plan(asked: argparse.Namespace) -> dict[str, Any]:
    """The plan that `plan_to_verdict.py --corpus` asks for: the first domains and targets by name.

    Raises:
        SystemExit: the corpus has fewer.
    """
    size = dict(MODEL_SIZES[asked.model_size])
    block_tokens, vocabulary = size.pop("block_tokens"), size.pop("vocabulary")
    return {
        "name": "plan-to-verdict",
        "domains": texts(asked.corpus / "train_domains", asked.domains),
        "targets": texts(asked.corpus / "eval_domains", asked.targets),
        "tokenizer": {"train": {"vocabulary": vocabulary}},
        "model": {"config": {"model_type": "gpt2", **size}},
        "training": {
            "block_tokens": block_tokens,
            "updates": asked.updates,
            "seed_share": asked.seed_share,
            "blocks_per_domain_update": asked.blocks,
            "learning_rate": 0.008,
        },
        "baselines": ["transformer-lm"],
        "cluster": {
            "seed_gpus": asked.seed_gpus,
            "gpus_per_expert": asked.gpus_per_expert,
            "seed_cpus": 4 if asked.seed_gpus else 2,
            "cpus_per_expert": 1,
            "micro_batch_blocks": 64,
        },
    }


def texts(folder: Path, count: int) -> list[dict[str, str]]:
    """The first folders there by name, as texts of a plan, with the splits that each has a file for.

    Raises:
        SystemExit: there are fewer.
    """
    folders = sorted(path for path in folder.glob("*") if path.is_dir())
    if len(folders) < count:
        raise SystemExit(f"{folder} has {len(folders)} texts, and {count} are asked for")
    return [{"name": text.name, **_files(text)} for text in folders[:count]]


def toy_texts(work: Path) -> dict[str, Any]:
    """A plan's fields of the quickstart's texts, which are written below `work`."""
    from btm_cluster.operations.quickstart import PLAN_FILE, write_quickstart

    if not (work / PLAN_FILE).exists():
        with chdir(work):
            list(write_quickstart())
    fields = yaml.safe_load((work / PLAN_FILE).read_text(encoding="utf-8"))
    return {name: fields[name] for name in ("domains", "targets", "reading") if name in fields}


def _files(text: Path) -> dict[str, str]:
    """A plan's fields of the splits that are there."""
    found = {field: sorted(text.glob(f"{split}.*")) for field, split in SPLITS.items()}
    return {field: str(files[0].resolve()) for field, files in found.items() if files}
