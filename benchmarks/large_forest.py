"""A forest over a base of real size, by the commands that people use, on GPUs of one host.

    python benchmarks/large_forest.py adapters qwen-7b --gpus 2 --work W    three LoRA experts, averaged, scored, generated
    python benchmarks/large_forest.py resume qwen-3b --gpus 2 --work W      an expert, killed, resumed on half the GPUs
    python benchmarks/large_forest.py adapters toy --work W                 a toy size, on CPU

The base has random weights in bfloat16 in a shape of large_models.py, and a tokenizer of as many entries; the text is
made up. Prints the seconds of each command, and the bytes of each kind of artifact. `adapters` grows the forest without
the evaluation of `btm run`, which would write a whole model for each average. `resume` kills `btm run` with all its
processes once the expert has a training checkpoint in the store, and grows the forest with half the GPUs. Wants about
80 GB below --work for a base of 7 billion parameters, and 120 GB for the training checkpoints of 3 billion.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from bare_training import Shape
from large_models import SIZES
from synthetic_text import write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from btm_cluster.algorithm import grow
from btm_cluster.language_model.configuration import config_from, full_config
from btm_cluster.plan import ModelPlan, Plan
from btm_cluster.session import driving, opened_view

TEXT_BYTES, END_OF_TEXT = 4_000_000, "<|endoftext|>"
LEARNED_ENTRIES = 8192
"""Entries of the tokenizer that text is encoded by; it has more, up to the model's vocabulary."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("adapters", "resume"))
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="default: all")
    parser.add_argument("--gpus-per-expert", type=float, help="of `adapters`; default: all experts at once")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    os.chdir(asked.work)
    shape = SIZES[asked.size]
    _timed("base and text", lambda: _inputs(shape, asked.experts))
    if asked.what == "adapters":
        adapters(shape, asked)
    else:
        resume(shape, asked)


def adapters(shape: Shape, asked: argparse.Namespace) -> None:
    """LoRA experts, their uniform average, scores and a text."""
    together = 1 / -(-asked.experts // asked.gpus) if asked.gpus else 0
    cluster = {"gpus_per_expert": asked.gpus_per_expert or together, "micro_batch_blocks": "auto"}
    plan = _plan(shape, asked.experts, asked.updates, cluster) | {"branching": {"train": "lora"}}
    _write(plan)
    _timed("seed and experts", _grown)
    _btm("merge", "plan.yaml", "--weights", "uniform", "--to", "average")
    Path("mine.txt").write_text(" ".join(["bada nuku lamo"] * 2000), encoding="utf-8")
    _btm("score", "mine.txt", "--plan", "plan.yaml")
    _btm("generate", "plan.yaml", "--prompt", "bada nuku", "--max-new-tokens", "64", "--temperature", "0")
    stored = Counter[str]()
    for manifest in Path("store/artifacts").rglob("*.json"):
        blobs = json.loads(manifest.read_text(encoding="utf-8"))["body"]["blobs"]
        stored[manifest.parent.name] += sum(blob["size_bytes"] for blob in blobs)
    print({kind: f"{size / 1e9:.3f} GB" for kind, size in stored.items()})


def resume(shape: Shape, asked: argparse.Namespace) -> None:
    """An expert that trains all weights on all GPUs, sharded; killed, and resumed on half of them."""
    sharding = "full" if asked.gpus > 1 else "auto"
    cluster: dict[str, Any] = {
        "gpus_per_expert": asked.gpus,
        "sharding": sharding,
        "checkpoint_minutes": 0.25,
    }
    plan = _plan(shape, 1, asked.updates, cluster) | {"targets": []}
    _write(plan)
    killed = _killed_at_checkpoint(time.monotonic())
    print(f"killed after {killed:.0f} s; checkpoints at updates {_saved_updates()}", flush=True)
    plan["cluster"] |= {"gpus_per_expert": asked.gpus // 2, "sharding": "auto"}
    _write(plan)
    _timed("resumed", lambda: _grown(new_resources=True))
    (timeline,) = Path("store/logs").glob("*/timeline.json")
    for event in json.loads(timeline.read_text(encoding="utf-8"))["events"]:
        if event["kind"] == "train":
            seconds = event["ended"] - event["began"]
            print(f"{event['what']} on {event['gpus']:g} GPUs: {seconds:.1f} s {event.get('cause') or ''}")


def _grown(new_resources: bool = False) -> None:
    plan = Plan.model_validate(yaml.safe_load(Path("plan.yaml").read_text(encoding="utf-8")))
    with (
        opened_view() as view,
        driving(view, plan, None, False, new_resources=new_resources, command="grow") as driver,
    ):
        print([expert.domain for expert in grow(plan, driver).forest.experts])


def _plan(shape: Shape, experts: int, updates: int, cluster: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "large",
        "store": "store",
        "domains": [{"name": f"domain-{n}", "text": f"text-{n}.jsonl"} for n in range(experts)],
        "targets": [{"name": "target", "text": "text-target.jsonl"}],
        "tokenizer": {"pretrained": "./base"},
        "model": {"pretrained": "./base"},
        "training": {
            "updates": updates,
            "block_tokens": shape.block_tokens,
            "blocks_per_domain_update": shape.blocks,
            "learning_rate": 2e-5,
            "weights": "bfloat16",
        },
        "cluster": {"micro_batch_blocks": shape.micro_batch, **cluster},
    }


def _write(plan: dict[str, Any]) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")


def _inputs(shape: Shape, experts: int) -> None:
    """The base as a folder that transformers opens, and texts; kept where they are there."""
    for number, name in enumerate([*map(str, range(experts)), "target"]):
        file = Path(f"text-{name}.jsonl")
        if not file.exists():
            write_jsonl(file, TEXT_BYTES, number)
    if Path("base").exists():
        return
    _tokenizer(Path("text-0.jsonl"), shape.vocabulary).save_pretrained("base")
    config = full_config(ModelPlan(config=dict(shape.config)), shape.vocabulary, shape.block_tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_from(config), dtype=torch.bfloat16)
    model.save_pretrained("base")
    del model
    torch.cuda.empty_cache()  # for the commands, which are other processes


def _tokenizer(text: Path, entries: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(LEARNED_ENTRIES, entries),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    with text.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    # Entries of the vocabulary that no merge leads to: as added tokens, each process would take 20 s to load them.
    state = json.loads(tokenizer.to_str())
    known = state["model"]["vocab"]
    known.update({f"<|unused-{n}|>": n for n in range(len(known), entries)})
    whole = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token=END_OF_TEXT)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "btm_cluster", *arguments]


def _btm(*arguments: str) -> None:
    """Runs a command, and prints its seconds, with the last lines of what it said."""
    began = time.monotonic()
    done = subprocess.run(
        _command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print("\n".join(done.stdout.splitlines()[-12:]))
    print(f"btm {arguments[0]}: exit {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        raise SystemExit(1)


def _killed_at_checkpoint(began: float) -> float:
    """Runs the plan until a training checkpoint is stored, and kills all its processes; the seconds it ran."""
    with open("killed.log", "w", encoding="utf-8") as log:
        child = psutil.Popen(_command("run", "plan.yaml"), stdout=log, stderr=subprocess.STDOUT)
        while not _saved_updates():
            if child.poll() is not None:
                raise SystemExit(f"ended before a checkpoint: {Path('killed.log').read_text()[-2000:]}")
            time.sleep(0.2)
    for process in [*child.children(recursive=True), child]:
        process.kill()
    child.wait()
    return time.monotonic() - began


def _saved_updates() -> list[int]:
    return sorted(int(file.stem) for file in Path("store/training").glob("*/*.json"))


def _timed(what: str, act: Any) -> None:
    began = time.monotonic()
    act()
    print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
