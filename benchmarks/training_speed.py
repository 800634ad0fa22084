"""Training speed on one GPU: this project's train loop beside transformers'
Trainer, on the same model and batch.

    python benchmarks/training_speed.py 125m            both, and their ratio
    python benchmarks/training_speed.py small --only ours

Random tokens, bf16, AdamW, blocks of 1,024 tokens, vocabulary 50,304. Tokens per second are the median over
the second half of the updates, so that compiling is left out. Needs a GPU; on CPU it runs a toy size to show
that it works.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {  # layers, width, heads, blocks per update, vocabulary, updates
    "toy": (1, 64, 2, 4, 512, 20),
    "small": (4, 256, 4, 8, 16_384, 1500),
    "125m": (12, 768, 12, 64, 50_304, 60),
    "350m": (24, 1024, 16, 32, 50_304, 60),
    "1.3b": (24, 2048, 32, 16, 50_304, 60),
}


def main() -> None:
    """Runs each contender in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--only", choices=("ours", "trainer"))
    parser.add_argument("--micro-batch", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.only:
        rate = {"ours": ours, "trainer": trainer}[arguments.only](arguments.size, arguments.micro_batch)
        print(json.dumps({"who": arguments.only, "size": arguments.size, "tokens_per_second": round(rate)}))
        return
    rates = {who: _in_process_of_its_own(who, arguments) for who in ("trainer", "ours")}
    print(
        f"{arguments.size}: Trainer {rates['trainer']:,} tokens/s, ours {rates['ours']:,} tokens/s, ", end=""
    )
    print(f"ratio {rates['ours'] / rates['trainer']:.2f}")


def ours(size: str, micro_batch: int) -> float:
    """The project's train loop, without a store."""
    import torch
    from bare_training import Shape, train_bare

    layers, width, heads, batch, vocabulary, updates = SIZES[size]
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        shape = Shape(config, vocabulary, batch, micro_batch)
        return train_bare(shape, updates, 1, Path(scratch), device).tokens_per_second


def trainer(size: str, micro_batch: int) -> float:
    """transformers' Trainer, compiled, with its fused AdamW."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    layers, width, heads, batch, vocabulary, updates = SIZES[size]
    on_gpu = torch.cuda.is_available()
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape, **no_dropout))
    blocks = torch.from_numpy(_random_blocks(vocabulary, 512).astype(np.int64))

    class Data(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return batch * updates

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"input_ids": blocks[i % len(blocks)], "labels": blocks[i % len(blocks)]}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if len(self.ends) % 10 == 0 and on_gpu:
                torch.cuda.synchronize()
            self.ends.append(time.monotonic())

    with tempfile.TemporaryDirectory() as scratch:
        micro = min(micro_batch, batch)
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            max_steps=updates,
            bf16=on_gpu,
            torch_compile=on_gpu,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            dataloader_num_workers=4 if on_gpu else 0,
            use_cpu=not on_gpu,
        )
        clock = Clock()
        Trainer(model=model, args=arguments, train_dataset=Data(), callbacks=[clock]).train()
    half = clock.ends[len(clock.ends) // 2 :]
    return batch * 1024 * (len(half) - 1) / (half[-1] - half[0])


def _random_blocks(vocabulary: int, blocks: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, vocabulary, (blocks, 1024))


def _in_process_of_its_own(who: str, arguments: argparse.Namespace) -> int:
    command = [
        sys.executable,
        __file__,
        arguments.size,
        "--only",
        who,
        "--micro-batch",
        str(arguments.micro_batch),
    ]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(finished.stdout.splitlines()[-1])["tokens_per_second"])


if __name__ == "__main__":
    main()
