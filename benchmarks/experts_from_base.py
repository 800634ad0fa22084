"""A base that is really trained, and experts grown from it: which of full, feed-forward and LoRA wins, at which cost.

    python benchmarks/experts_from_base.py CORPUS --targets CORPUS/eval_domains --to results
    python benchmarks/experts_from_base.py --toy --in-process --to results    a toy size, on CPU, in some minutes

First a llama-shaped model is trained on all domains together, its learning rate down to 0, and written as a folder
that transformers opens. Then `btm study` grows experts from that folder, each on its own domain: all weights, the
feed-forwards, LoRA of rank 8 and 64, each as ensemble, average and mixture of experts, beside the base's continued
pretraining on all domains. Passes are over the smallest domain, and five at most in all.

CORPUS has a folder for each text in CORPUS/train_domains, and TARGETS one for each target, with files train.*,
valid.* and test.*. Where CORPUS is not there, this says so and measures nothing. Both plans are kept beside the
results; the store and the base lie in --work. Killed and run again, it goes on where it was.

The 30m size, with --passes 2 --expert-passes 0.4 --scales 0.3 1, took about 25 minutes on one H200, not quite alone. Where a
command may not take that long, run it again.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from corpus_plan import texts, toy_texts

from btm_cluster.curve import CURVE_FILE
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.plan import Plan

MOST_PASSES = 5


@dataclass(frozen=True)
class Size:
    """A llama's shape, its recipe, and the ranks of LoRA that are tried."""

    config: Mapping[str, Any]
    vocabulary: int
    block_tokens: int
    blocks: int
    """Blocks of each domain in an update."""
    learning_rate: float
    """The base's. Not chosen by a trial; GPT-2s of 10M parameters did best with 0.008."""
    learning_rates: tuple[float, ...]
    """Learning rates, of which the continued pretraining chooses the one for all."""
    scales: tuple[float, ...]
    """Multiples of the experts' learning rate, tried on each kind of experts: LoRA's are ten times these, which is too much
    for a small model that likes a large rate."""
    ranks: tuple[int, ...]


def _llama(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return {"model_type": "llama", **sizes, **heads_of, "tie_word_embeddings": True}


SIZES = {
    "toy": Size(_llama(64, 96, 1, 2), 512, 64, 4, 0.01, (0.01, 0.005), (0.1, 1), (2, 8)),
    "30m": Size(_llama(512, 1408, 10, 8), 16_384, 1024, 32, 0.004, (0.001, 0.003), (0.1, 0.3, 1), (8, 64)),
}
"""30m has 29.5M parameters without embeddings, and 37.9M in all."""


def main() -> None:
    asked = _arguments()
    if not asked.toy and not (asked.corpus and asked.corpus.joinpath("train_domains").is_dir()):
        print(f"{asked.corpus}: there is no corpus here, and nothing is measured; --toy makes its own text")
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    size = SIZES["toy" if asked.toy else "30m"]
    common = {"store": "store", "cluster": _cluster(asked.gpus)}
    common |= toy_texts(asked.work) if asked.toy else _corpus_texts(asked.corpus, asked.targets)
    os.chdir(asked.work)
    blocks = _train_base(size, common, asked)
    updates = updates_for(asked.expert_passes, blocks, size)
    plan = study_plan(common, size, updates, asked.scales or size.scales)
    _write(plan, Path("study.yaml"))
    asked.to.mkdir(parents=True, exist_ok=True)
    for name in ("base.yaml", "study.yaml"):
        shutil.copyfile(name, asked.to / name)
    command = [sys.executable, "-m", "btm_cluster", "study", "study.yaml", "--to", str(asked.to)]
    # In the place of this process, so that whoever stops it stops the study, which saves.
    os.execv(sys.executable, [*command, *(["--in-process"] if asked.in_process else [])])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--targets", type=Path, help="a folder of targets; without it, there are none")
    parser.add_argument("--toy", action="store_true", help="text of this Python installation, and a toy size")
    parser.add_argument("--to", type=lambda to: Path(to).resolve(), required=True, help="for the results")
    parser.add_argument("--work", type=Path, default=Path("experts-from-base"), help="for the store")
    parser.add_argument("--passes", type=float, default=4.0, help="of the base")
    parser.add_argument("--expert-passes", type=float, default=0.5)
    parser.add_argument(
        "--scales", type=float, nargs="+", help="of the experts' learning rates, to be tried on each kind"
    )
    parser.add_argument("--gpus", type=int, default=0, help="1 for one GPU")
    parser.add_argument("--in-process", action="store_true", help="without Ray")
    asked = parser.parse_args()
    if asked.passes + asked.expert_passes > MOST_PASSES:
        parser.error(
            f"base and experts make {asked.passes + asked.expert_passes:g} passes; {MOST_PASSES} at most"
        )
    return asked


def _cluster(gpus: int) -> dict[str, Any]:
    if not gpus:
        return {"seed_cpus": 2, "cpus_per_expert": 1, "micro_batch_blocks": 64}
    sizes = {"seed_cpus": 4, "cpus_per_expert": 2, "micro_batch_blocks": 32}
    return {"seed_gpus": gpus, "gpus_per_expert": 0.125, "checkpoint_minutes": 2, **sizes}


def _corpus_texts(corpus: Path, targets: Path | None) -> dict[str, Any]:
    def all_of(folder: Path) -> list[dict[str, str]]:
        return texts(folder, sum(path.is_dir() for path in folder.glob("*")))

    return {"domains": all_of(corpus / "train_domains"), "targets": all_of(targets) if targets else []}


def base_plan(common: Mapping[str, Any], size: Size, updates: int) -> dict[str, Any]:
    """The base's recipe: it is this plan's Transformer-LM."""
    training = {"updates": updates, "learning_rate": size.learning_rate}
    return {
        "name": "base",
        **common,
        "tokenizer": {"train": {"vocabulary": size.vocabulary}},
        "model": {"config": dict(size.config)},
        "training": training | _blocks_of(size),
        "baselines": ["transformer-lm"],
    }


def study_plan(
    common: Mapping[str, Any], size: Size, updates: int, scales: Sequence[float]
) -> dict[str, Any]:
    """The study of experts from the folder `base`."""
    loras = [{"train": "lora", "lora": {"rank": rank}} for rank in size.ranks]
    study = {
        "trials": [{"learning_rate": rate} for rate in size.learning_rates],
        "learning_rate_scales": list(scales),
        "systems": ["mixture-of-experts"],
        "branching": [{"train": "all"}, {"train": "feed-forward"}, *loras],
    }
    training = {"updates": updates, "learning_rate": size.learning_rates[0]}
    return {
        "name": "experts-from-base",
        **common,
        "tokenizer": {"pretrained": "./base"},
        "model": {"pretrained": "./base"},
        "training": training | _blocks_of(size),
        "study": study,
    }


def _blocks_of(size: Size) -> dict[str, int]:
    return {"block_tokens": size.block_tokens, "blocks_per_domain_update": size.blocks}


def updates_for(passes: float, blocks: int, size: Size) -> int:
    """Updates for so many passes over a domain of so many blocks, at most."""
    return max(2, int(passes * blocks / size.blocks))


def _write(plan: Mapping[str, Any], file: Path) -> None:
    file.write_text(yaml.safe_dump(dict(plan), sort_keys=False), encoding="utf-8")


def _train_base(size: Size, common: Mapping[str, Any], asked: argparse.Namespace) -> int:
    """Trains the base and writes it to the folder `base`; the blocks of the smallest domain."""
    from btm_cluster.driver.preparation import prepare
    from btm_cluster.driver.recipes import seed_request, transformer_lm_request
    from btm_cluster.session import driving, opened_view

    plan = Plan.model_validate(base_plan(common, size, updates=2))
    with opened_view() as view, driving(view, plan, None, asked.in_process, command="base") as driver:
        prepared = prepare(plan, driver)
        counts = [
            sum(driver.ledger.get(ref).facts["blocks"] for ref in text.tokens["train"])
            for text in prepared.domains
        ]
        fields = base_plan(common, size, updates_for(asked.passes, min(counts), size))
        _write(fields, Path("base.yaml"))
        prepared = replace(prepared, plan=Plan.model_validate(fields))
        whole = transformer_lm_request(prepared, seed_request(prepared).ref)
        (model,) = driver.require([replace(whole, milestones=(), snapshots=())])
        _write_model(driver.ledger, model, Path("base"))
    return min(counts)


def _write_model(ledger: Ledger, model: Artifact, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for blob in model.blobs:
        if blob.name != CURVE_FILE:
            shutil.copyfile(ledger.open_file(model, blob.name), folder / blob.name)


if __name__ == "__main__":
    main()
