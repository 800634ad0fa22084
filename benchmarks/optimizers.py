"""Muon beside AdamW: development loss at equal tokens, each at the best of its learning rates.

    python benchmarks/optimizers.py CORPUS --updates 1500 --record
    python benchmarks/optimizers.py CORPUS --domains 4 --updates 6000 --rates 0.001 0.002 0.004 0.008

One model is trained on the first `--domains` texts of the corpus together (a folder as `plan_to_verdict.py` reads it,
with `train_domains/NAME/`), once for each optimiser and learning rate, from the same random weights and with the same
blocks. The passes over the smallest text are printed: what is asked is few passes over much text. On a GPU in bf16 and
compiled. The store (`--store`) keeps the models, so that a run that was stopped goes on.
"""

import argparse
import json
import math
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus_plan import MODEL_SIZES, texts
from results import Result, finish, parse, this_machine, today

from btm_cluster.driver.driver import Driver, step_error
from btm_cluster.driver.port import Failure
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import seed_request, transformer_lm_request
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.curves import read_curve
from btm_cluster.plan import Plan
from btm_cluster.workers.in_process import InProcess, LocalControl

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Trained:
    """A training's last development loss, in nats per token, and what it took."""

    optimizer: str
    rate: float
    loss: float
    tokens_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--domains", type=int, default=4)
    parser.add_argument("--model-size", choices=MODEL_SIZES, default="10m")
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--blocks", type=int, default=16, help="of each text in an update")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.001, 0.002, 0.004, 0.008])
    parser.add_argument("--store", help="default: a temporary folder")
    asked = parse(parser)
    with tempfile.TemporaryDirectory() as scratch:
        store = asked.store or str(Path(scratch, "store"))
        found = [train(asked, store, optimizer, rate) for optimizer in OPTIMIZERS for rate in asked.rates]
    best = {name: min((one for one in found if one.optimizer == name), key=_loss) for name in OPTIMIZERS}
    for name, one in best.items():
        if one.loss == math.inf:
            raise SystemExit(f"{name} diverged at each of its rates: try lower ones")
        if len(asked.rates) > 1 and one.rate in (min(asked.rates), max(asked.rates)):
            print(f"{name} is best at the end of its rates, {one.rate:g}: try more", file=sys.stderr)
    finish([_row(asked, best)], asked)


def _loss(one: Trained) -> float:
    return one.loss


def train(asked: argparse.Namespace, store: str, optimizer: str, rate: float) -> Trained:
    """Trains one model, or finds it in the store; of one that diverges the loss is infinite.

    Raises:
        StepError: the training failed otherwise.
    """
    plan = Plan.model_validate(_plan(asked, store, optimizer, rate))
    ledger = Ledger.open(store)
    driver = Driver(ledger, InProcess(ledger, LocalControl(lambda _: None, threading.Event())))
    prepared = prepare(plan, driver)
    request = transformer_lm_request(prepared, seed_request(prepared).ref)
    began = time.monotonic()
    (model,) = driver.obtain([request])
    if isinstance(model, Failure):
        if not model.has_diverged:
            raise step_error([model])
        print(f"{optimizer}, learning rate {rate:g}: diverged", flush=True)
        return Trained(optimizer, rate, math.inf, 0.0)
    curve = read_curve(ledger, model)
    assert curve is not None
    loss = curve.development.loss[-1]
    seconds = float(model.note.get("seconds") or time.monotonic() - began)
    print(
        f"{optimizer}, learning rate {rate:g}: {loss:.4f} nats per token after {request.tokens:,} tokens, "
        f"{seconds:.0f} s",
        flush=True,
    )
    return Trained(optimizer, rate, loss, request.tokens / seconds)


def _plan(asked: argparse.Namespace, store: str, optimizer: str, rate: float) -> dict[str, Any]:
    size = dict(MODEL_SIZES[asked.model_size])
    block_tokens, vocabulary = size.pop("block_tokens"), size.pop("vocabulary")
    gpus = min(1, torch.cuda.device_count())
    return {
        "name": "optimizers",
        "store": store,
        "domains": texts(asked.corpus / "train_domains", asked.domains),
        "tokenizer": {"train": {"vocabulary": vocabulary}},
        "model": {"config": {"model_type": "gpt2", **size}},
        "training": {
            "block_tokens": block_tokens,
            "updates": asked.updates,
            "seed_share": 0.5,
            "blocks_per_domain_update": asked.blocks,
            "learning_rate": rate,
            "optimizer": optimizer,
        },
        "cluster": {
            "seed_gpus": gpus,
            "gpus_per_expert": gpus,
            "micro_batch_blocks": asked.domains * asked.blocks,
        },
    }


def _row(asked: argparse.Namespace, best: dict[str, Trained]) -> Result:
    shown = {
        name: f"{one.loss:.4f} nats at {one.rate:g}, {one.tokens_per_second:,.0f} tokens/s"
        for name, one in best.items()
    }
    return Result(
        name="optimizer",
        what=f"development loss of a {asked.model_size} GPT-2 shape on {asked.domains} texts, {asked.updates:,} updates "
        f"of {asked.domains * asked.blocks} blocks, each at the best of the learning rates {json.dumps(asked.rates)}",
        machine=this_machine(),
        measured=today(),
        unit="nats/token",
        better="lower",
        ours=best["muon"].loss,
        theirs=best["adamw"].loss,
        peer="AdamW",
        goal=None,
        limit=None,
        limit_is=None,
        beside={"best learning rates and speed, " + name: words for name, words in shown.items()},
    )


if __name__ == "__main__":
    main()
