"""A forest of up to a thousand LoRA experts in one engine, as `btm serve` opens it: seconds to open, memory, and
tokens per second, on a CPU.

    python benchmarks/many_adapters.py                    8, 64, 256 and 1,000 experts, about 10 minutes on two cores
    python benchmarks/many_adapters.py --experts 8,64     a quick look

A llama of 0.7M parameters is trained for some updates, and three adapters of rank 16 over it; further experts are
copies of one with noise. All else is the product's own code. Each size is measured in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stand_ins import without_waiting_for_disk
from synthetic_text import write_jsonl

from btm_cluster.algorithm import grow
from btm_cluster.forest import Expert, Forest, merge_into
from btm_cluster.identity import Ref, identity_by
from btm_cluster.language_model.adapter_files import ADAPTER_FILE
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.prompts import Prompt
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.ledger import Artifact, Ledger, Origin
from btm_cluster.plan import Plan
from btm_cluster.session import driving, opened_view
from btm_cluster.steps.mixture import mixture_of_store, open_engine
from btm_cluster.steps.stored import open_tokenizer

ROWS, NEW_TOKENS, NOISE = 4, 16, 1e-3
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Cost:
    """The cost of an engine that was opened in this process."""

    seconds_to_open: float
    megabytes: float
    """By which memory rose: weights, keys and values of all rows, module trees."""
    tokens_per_second: dict[str, float]
    """By what was asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", default="8,64,256,1000")
    asked = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="many-adapters-") as folder:
        ledger, forest = _grown(Path(folder))
        for size in sorted(int(size) for size in asked.experts.split(",")):
            with without_waiting_for_disk():
                forest = _multiplied(ledger, forest, size)
            with ProcessPoolExecutor(1, spawn) as pool:
                cost = pool.submit(measure, ledger.storage.location, forest.version).result()
            print(json.dumps({"experts": len(forest.experts), **vars(cost)}), flush=True)


def measure(store: str, version: int) -> Cost:
    """The cost of an engine for a version of the forest, of ROWS rows."""
    ledger = Ledger.open(store)
    mixture = mixture_of_store(ledger, version)
    tokenizer = open_tokenizer(ledger, mixture.tokenizer)
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    engine = open_engine(ledger, mixture, tokenizer, ROWS, device="cpu")
    seconds = time.perf_counter() - began
    prompts = [Prompt(list(range(5, 25)), NEW_TOKENS, Sampling(random_seed=number)) for number in range(ROWS)]
    rates = {
        "one prompt": _rate(engine, prompts[:1]),
        f"{ROWS} prompts": _rate(engine, prompts),
        "one prompt by its two likeliest experts": _rate(engine, [replace(prompts[0], top_k_experts=2)]),
    }
    return Cost(seconds, (process.memory_info().rss - before) / 1e6, rates)


def _rate(engine: EnsembleEngine, prompts: list[Prompt]) -> float:
    """Tokens per second, after the prompts were read."""
    rows = engine.admit(prompts)
    began, tokens = time.perf_counter(), 0
    while drawn := engine.step():
        tokens += len(drawn)
    seconds = time.perf_counter() - began
    for row in rows:
        engine.release(row)
    return tokens / seconds


def _grown(folder: Path) -> tuple[Ledger, Forest]:
    for number in range(3):
        write_jsonl(folder / f"text-{number}.jsonl", 300_000, number)
    fields = {
        "name": "many-adapters",
        "store": str(folder / "store"),
        "domains": [
            {"name": f"d{number}", "text": str(folder / f"text-{number}.jsonl")} for number in range(3)
        ],
        "targets": [],
        "tokenizer": {"train": {"vocabulary": 1024}},
        "model": {"config": LLAMA},
        "training": {"updates": 8, "block_tokens": 256, "blocks_per_domain_update": 4, "learning_rate": 1e-3},
        "branching": {"train": "lora"},
        "cluster": {"seed_cpus": 1, "cpus_per_expert": 1},
    }
    plan = Plan.model_validate(fields)
    with opened_view() as view, driving(view, plan, None, True, command="grow") as driver:
        return driver.ledger, grow(plan, driver).forest


def _multiplied(ledger: Ledger, forest: Forest, count: int) -> Forest:
    """A version with so many experts, of which further ones are the first with noise."""
    first = forest.experts[0]
    model = ledger.get(Ref("model", first.identity))
    new, manifests = list[Expert](), dict[str, str]()
    for number in range(len(forest.experts), count):
        made = _copy(ledger, model, number)
        new.append(replace(first, domain=f"x{number:04}", identity=made.identity))
        manifests[made.identity] = made.manifest_hash
    forest = merge_into(forest, new, manifests, f"{len(new)} copies")
    ledger.log.append(forest)
    return forest


def _copy(ledger: Ledger, model: Artifact, number: int) -> Artifact:
    recipe = {**model.recipe, "copy": number}
    files = {blob.name: ledger.open_file(model, blob.name) for blob in model.blobs}
    with tempfile.TemporaryDirectory() as folder:
        noisy = Path(folder, ADAPTER_FILE)
        with safe_open(files[ADAPTER_FILE], "pt") as stored:
            metadata = stored.metadata()
        generator = torch.Generator().manual_seed(number)
        tensors = load_file(files[ADAPTER_FILE])
        drawn = {
            name: one + NOISE * torch.randn(one.shape, generator=generator) for name, one in tensors.items()
        }
        save_file(drawn, noisy, metadata=metadata)
        made = Origin(Ref("model", identity_by("model", recipe, model.inputs)), recipe, model.inputs)
        return ledger.commit(made, {**files, ADAPTER_FILE: noisy}, model.facts)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
