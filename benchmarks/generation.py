"""Generation speed of an ensemble on one device, beside transformers' `generate` of one of its experts.

    python benchmarks/generation.py --device cuda           # eight experts of 124M, about 3 minutes
    python benchmarks/generation.py --device cpu --experts 2 --model-size toy --new-tokens 16

Random weights, GPT-2's shape, no end of text. Tokens per second are new tokens over the time of a whole call,
reading of the prompts included; the calls before it captured what it needs. Prints a line for each part as it
is done, and all figures as one JSON object at the end. A part that fails prints its error, and the rest goes
on. After `--limit-seconds` it ends whatever runs.
"""

import argparse
import faulthandler
import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from generation_parts import SIZES, Bench

BARS = {"tokens_per_second_1": 250, "tokens_per_second_many": 5000}
"""For eight experts of 124M on one H200."""
FIGURES: dict[str, Any] = {}


def main() -> None:
    """Runs the parts one after the other, in one process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--model-size", choices=SIZES, default="124m")
    parser.add_argument("--prompts", type=int, default=32, help="of the part with many prompts")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--limit-seconds", type=float, default=270)
    parser.add_argument("--only", help="parts whose name contains this")
    arguments = parser.parse_args()
    watch = threading.Timer(arguments.limit_seconds, give_up)
    watch.daemon = True
    watch.start()
    import torch
    import transformers

    if arguments.device == "cpu":
        torch.set_num_threads(1)  # models that a CPU can show are too small to be spread over several
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    note("setting", vars(arguments) | {"device_name": name, **versions})
    bench = Bench(arguments)
    for part, run in bench.parts().items():
        if arguments.only is None or arguments.only in part:
            measure(part, run)
    finish()
    os._exit(0)  # without waiting for CUDA's or the profiler's own ends


def note(name: str, figures: Any) -> None:
    """Prints a part's figures at once, and keeps them."""
    FIGURES[name] = figures
    print(f"{name}: {json.dumps(figures)}", flush=True)


def measure(part: str, run: Callable[[], Any]) -> None:
    """Runs one part; its error is a figure too."""
    start = time.monotonic()
    try:
        figures = run()
    except Exception as exc:
        traceback.print_exc(file=sys.stdout)
        figures = {"error": f"{type(exc).__name__}: {exc}"[:300]}
    note(part, figures | {"part_seconds": round(time.monotonic() - start, 1)})
    gc.collect()


def finish() -> None:
    """Prints everything, with the ratios that matter."""
    ours, peer = FIGURES.get("captured bfloat16", {}), FIGURES.get("transformers generate, one expert", {})
    for name, bar in BARS.items():
        if name in ours:
            FIGURES.setdefault("summary", {})[name] = {"ours": ours[name], "bar": bar, "peer": peer.get(name)}
            if peer.get(name):
                FIGURES["summary"][name]["ratio_to_peer_with_one_expert"] = round(ours[name] / peer[name], 2)
    print(json.dumps(FIGURES), flush=True)


def give_up() -> None:
    """Ends the process, with what there is."""
    print("the time is up; stacks follow", flush=True)
    faulthandler.dump_traceback(file=sys.stdout, all_threads=True)
    finish()
    os._exit(3)


if __name__ == "__main__":
    main()
