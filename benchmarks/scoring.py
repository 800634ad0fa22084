"""Scoring: log-probability and entropy of every token, written to files, beside transformers' forward pass with labels,
which gives one mean and no entropy.

    python benchmarks/scoring.py 125m --record
    python benchmarks/scoring.py 125m --uncompiled

Random tokens, bf16, blocks of 1,024 tokens, vocabulary 50,304. Each takes all blocks in turn, ours first, `--rounds`
times; the best round counts, and the first one, in which code is compiled, is told beside. The peer takes 32 blocks at
once, by `model(input_ids, labels=input_ids)` under autocast; `--compiled-peer` compiles it. On a CPU it runs a toy
size.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bare_training import GPT2, gpt2
from results import Result, finish, parse, this_machine, today
from transformers import PreTrainedModel

from btm_cluster.data.blocks import Blocks
from btm_cluster.language_model.compute import autocast
from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.model import build_model
from btm_cluster.language_model.scoring import ScorePasses, set_up_scoring
from btm_cluster.language_model.utilisation import peak_flops
from btm_cluster.plan import ModelPlan
from btm_cluster.requests import Resources

SIZES = {  # layers, width and heads; blocks; vocabulary
    "toy": ((1, 64, 2), 16, 512),
    "125m": (GPT2["125m"], 2048, 50_304),
    "350m": (GPT2["350m"], 1024, 50_304),
    "1.3b": (GPT2["1.3b"], 512, 50_304),
}
PEERS_BLOCKS, BLOCK_TOKENS = 32, 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--uncompiled", action="store_true", help="ours without torch.compile")
    parser.add_argument("--compiled-peer", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    asked = parse(parser)
    shape, count, vocabulary = SIZES[asked.size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    precision = "bfloat16" if on_gpu else "float32"
    how = Resources(1, float(on_gpu), 1, 16, precision, compile=on_gpu and not asked.uncompiled)
    set_up_scoring(how)
    model = {
        who: build_model(full_config(ModelPlan(config=gpt2(*shape)), vocabulary, BLOCK_TOKENS), 0)
        .to(device)
        .eval()
        for who in ("ours", "theirs")
    }
    with tempfile.TemporaryDirectory() as scratch:
        tokens = np.random.default_rng(0).integers(1, vocabulary, (count, BLOCK_TOKENS))
        np.save(Path(scratch, "tokens.npy"), tokens.astype(np.uint16))
        blocks = Blocks([Path(scratch, "tokens.npy")])
        passes = ScorePasses(model["ours"], how, BLOCK_TOKENS, [count])
        run = {
            "ours": lambda: passes.write(blocks, 0, Path(scratch)),
            "theirs": lambda: forward_with_labels(model["theirs"], blocks, device, precision),
        }
        if asked.compiled_peer:
            model["theirs"].compile()
        seconds = {who: [_seconds(run[who]) for _ in range(asked.rounds)] for who in run}
    print(
        {who: [round(one, 2) for one in took] for who, took in seconds.items()},
        passes.is_compiled,
        passes.at_once,
    )
    rate = {who: count * BLOCK_TOKENS / min(took) for who, took in seconds.items()}
    parameters = sum(parameter.numel() for parameter in model["ours"].parameters())
    flops = 2 * parameters + 4 * shape[0] * shape[1] * BLOCK_TOKENS
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    finish([_row(asked, count, rate, seconds, None if peak is None else peak / flops)], asked)


def forward_with_labels(
    model: PreTrainedModel, blocks: Blocks, device: torch.device, precision: str
) -> float:
    """The mean loss over all blocks, as transformers computes it."""
    total = torch.zeros((), device=device)
    with torch.inference_mode(), autocast(device, precision):
        for start in range(0, len(blocks), PEERS_BLOCKS):
            rows = np.arange(start, min(start + PEERS_BLOCKS, len(blocks)))
            read = torch.from_numpy(blocks.take(rows)).to(device)
            total += model(input_ids=read, labels=read, use_cache=False).loss
    return total.item()


def _seconds(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _row(
    asked: argparse.Namespace,
    count: int,
    rate: dict[str, float],
    seconds: dict[str, list[float]],
    limit: float | None,
) -> Result:
    compiled = ", compiled" if asked.compiled_peer else ""
    return Result(
        name="scoring",
        what=f"{count:,} blocks of 1,024 random tokens under a GPT-2 shape of {asked.size}, bf16, to files",
        machine=this_machine(),
        measured=today(),
        unit="tokens/s",
        better="higher",
        ours=rate["ours"],
        theirs=rate["theirs"],
        peer=f"transformers {transformers.__version__}, forward pass with labels{compiled}, 32 blocks at once",
        goal=1.5,
        limit=limit,
        limit_is="the operations of a forward pass at the data sheet's dense bf16 peak",
        beside={
            "seconds of the first round, ours and the peer's": " and ".join(
                f"{seconds[who][0]:.1f}" for who in ("ours", "theirs")
            )
        },
    )


if __name__ == "__main__":
    main()
