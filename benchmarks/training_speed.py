"""Training speed on one GPU: this project's train loop beside transformers' Trainer with torch.compile, on the same
model and batch.

    python benchmarks/training_speed.py 125m 350m 1.3b --record       both, and a row for each size
    python benchmarks/training_speed.py 125m --only ours --attention flash
    python benchmarks/training_speed.py 125m --only ours --compile layers --count-synchronisations

Random tokens, bf16, fused AdamW, blocks of 1,024 tokens, vocabulary 50,304. Each contender runs in a process of its
own, with an empty cache of compiled code. Tokens per second are the median over the second half of the updates, so
that compiling is left out; seconds to the first update begin with the process. The limit is the GPU's peak over the
operations of a token. On a CPU it runs a toy size to show that it works.

`--attention`, `--compile`, `--optimizer`, `--residual` and `--inductor` change ours alone, to see what each is worth:
`--residual float32` has hidden states between layers in float32, as autocast leaves them, and `--inductor
coordinate_descent_tuning=1` sets a field of torch._inductor.config. `--count-synchronisations` says how often an update
of the second half waits for the GPU, as torch counts it.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import Result, finish, parse, this_machine, today

SIZES = {  # layers, width, heads, blocks per update, vocabulary, updates
    "toy": (1, 64, 2, 4, 512, 20),
    "small": (4, 256, 4, 8, 16_384, 1500),
    "125m": (12, 768, 12, 64, 50_304, 60),
    "350m": (24, 1024, 16, 32, 50_304, 60),
    "1.3b": (24, 2048, 32, 16, 50_304, 40),
}
GOALS = {"125m": 1.25, "350m": 1.25, "1.3b": 1.15}
CONTENDERS = ("trainer", "ours")
TRAINERS_BLOCKS = 32
"""Of a forward pass, where ours takes what fits."""


@dataclass(frozen=True)
class Measured:
    """One contender's run."""

    tokens_per_second: float
    seconds_to_first_update: float
    peak_gb: float
    synchronisations_per_update: float | None = None


def main() -> None:
    """Runs each contender in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="+", choices=SIZES)
    parser.add_argument("--only", choices=CONTENDERS)
    parser.add_argument("--micro-batch", default="32", help="blocks of a forward pass, or auto (ours alone)")
    parser.add_argument("--attention", choices=("chosen", "flash", "cudnn"), default="chosen")
    parser.add_argument("--compile", choices=("chosen", "whole", "layers"), default="chosen")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--residual", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--inductor", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--count-synchronisations", action="store_true")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    asked = parse(parser)
    if asked.began is not None:
        print(json.dumps(asdict({"ours": ours, "trainer": trainer}[asked.only](asked.sizes[0], asked))))
        return
    rows = []
    for size in asked.sizes:
        contenders = (asked.only,) if asked.only else CONTENDERS
        found = {who: _in_process_of_its_own(who, size) for who in contenders}
        for who, measured in found.items():
            print(f"{size}, {who}: {json.dumps(asdict(measured))}", flush=True)
        if len(found) == len(CONTENDERS) and size in GOALS:
            rows.append(_row(size, found["ours"], found["trainer"]))
    if rows:
        finish(rows, asked)


def _row(size: str, ours: Measured, trainer: Measured) -> Result:
    import torch
    import transformers
    from bare_training import GPT2, gpt2

    from btm_cluster.language_model.configuration import full_config
    from btm_cluster.language_model.model import count_parameters
    from btm_cluster.language_model.utilisation import flops_per_token, peak_flops
    from btm_cluster.plan import ModelPlan

    vocabulary, batch = SIZES[size][4], SIZES[size][3]
    model = full_config(ModelPlan(config=gpt2(*GPT2[size])), vocabulary, 1024)
    flops = flops_per_token(model, count_parameters(model)[0], 1024)
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return Result(
        name=f"train-{size}",
        what=f"bf16, {batch} blocks of 1,024 tokens per update, vocabulary {vocabulary:,}, random tokens",
        machine=this_machine(),
        measured=today(),
        unit="tokens/s",
        better="higher",
        ours=ours.tokens_per_second,
        theirs=trainer.tokens_per_second,
        peer=f"transformers {transformers.__version__}, Trainer with torch_compile and fused AdamW",
        goal=GOALS[size],
        limit=None if peak is None else peak / flops,
        limit_is=f"{flops / 1e6:,.0f} MFLOP per token at the data sheet's dense bf16 peak: the share is the MFU",
        beside={
            "seconds to the first update, ours and the Trainer's": f"{ours.seconds_to_first_update:.0f} and "
            f"{trainer.seconds_to_first_update:.0f}",
            "peak memory, ours and the Trainer's": f"{ours.peak_gb:.1f} and {trainer.peak_gb:.1f} GB",
        },
    )


def ours(size: str, asked: argparse.Namespace) -> Measured:
    """The project's train loop, without a store."""
    import torch
    from bare_training import Shape, train_bare

    layers, width, heads, batch, vocabulary, updates = SIZES[size]
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _change(asked)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        shape = Shape(config, vocabulary, batch, 0 if asked.micro_batch == "auto" else int(asked.micro_batch))
        at_half = _watch_waits if asked.count_synchronisations and device.type == "cuda" else None
        pace = train_bare(shape, updates, 1, Path(scratch), device, asked.optimizer, at_half)
    assert pace.first_update is not None
    waits = sum("synchroniz" in str(one.message) for one in seen) / (updates - updates // 2)
    waits_counted = waits if asked.count_synchronisations else None
    return Measured(pace.tokens_per_second, pace.first_update - asked.began, _peak_gb(), waits_counted)


def _watch_waits() -> None:
    """Has torch warn, each time, of an operation that waits for the GPU."""
    import torch

    torch.set_warn_always(True)
    torch.cuda.set_sync_debug_mode("warn")


def _change(asked: argparse.Namespace) -> None:
    """Has ours do otherwise than it would."""
    import torch
    import torch._inductor.config
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from btm_cluster.language_model import update
    from btm_cluster.language_model.attention_kernels import cudnn_first

    if asked.attention == "flash" and torch.cuda.is_available():
        update.kernels_for = lambda *_: lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)  # type: ignore[assignment]
    if asked.attention == "cudnn":
        update.kernels_for = lambda *_: cudnn_first
    if asked.residual == "float32":
        update.hand_on_in_bfloat16 = lambda _: None
    for setting in asked.inductor:
        name, _, value = setting.partition("=")
        setattr(torch._inductor.config, name, type(getattr(torch._inductor.config, name))(int(value)))
    if asked.compile != "chosen":
        update.is_compiled_whole = lambda *_: asked.compile == "whole"


def trainer(size: str, asked: argparse.Namespace) -> Measured:
    """transformers' Trainer, compiled, with its fused AdamW."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    layers, width, heads, batch, vocabulary, updates = SIZES[size]
    on_gpu = torch.cuda.is_available()
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024}
    same = {"activation_function": "gelu", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape, **same))
    blocks = torch.from_numpy(np.random.default_rng(0).integers(1, vocabulary, (512, 1024)))

    class Data(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return batch * updates

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"input_ids": blocks[i % len(blocks)], "labels": blocks[i % len(blocks)]}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.synchronised: list[int] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if len(self.ends) % 10 == 0:
                if on_gpu:
                    torch.cuda.synchronize()
                self.synchronised.append(len(self.ends))
            self.ends.append(time.monotonic())

    with tempfile.TemporaryDirectory() as scratch:
        micro = min(TRAINERS_BLOCKS if asked.micro_batch == "auto" else int(asked.micro_batch), batch)
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            max_steps=updates,
            bf16=on_gpu,
            torch_compile=on_gpu,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            dataloader_num_workers=4 if on_gpu else 0,
            use_cpu=not on_gpu,
        )
        clock = Clock()
        Trainer(model=model, args=arguments, train_dataset=Data(), callbacks=[clock]).train()
    late = [step for step in clock.synchronised if step >= updates // 2 or step == clock.synchronised[-2]]
    rates = [
        batch * 1024 * (later - earlier) / (clock.ends[later] - clock.ends[earlier])
        for earlier, later in itertools.pairwise(late)
    ]
    return Measured(statistics.median(rates), clock.ends[0] - asked.began, _peak_gb())


def _peak_gb() -> float:
    """Most memory that torch held on the GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def _in_process_of_its_own(who: str, size: str) -> Measured:
    """A contender's run, with an empty cache of compiled code: what the others made does not hasten it."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", who, "--began", str(time.monotonic())]
        command = [part for part in command if part not in SIZES or part == size]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Measured(**json.loads(finished.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
