"""Throughput of a served forest under load, beside its engine alone on the same prompts.

    python benchmarks/serving.py STORE --requests 256 --at-once 32 --max-tokens 128 [--precision bfloat16]

Starts `btm serve --store STORE --in-process`, sends requests by OpenAI's client, so many at once, each a prompt of
random tokens, and prints tokens per second, the time of a request (median and 95th percentile), and the ratio to
the engine without HTTP, with as many rows. Nothing ends a text early but its end-of-text token.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

import openai

from btm_cluster.language_model.prompts import Prompt
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.ledger import Ledger
from btm_cluster.steps.mixture import mixture_of_store, open_engine
from btm_cluster.steps.stored import open_tokenizer


def main() -> None:
    """Server and engine, one after the other, so that neither takes the other's memory or cores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    asked = parser.parse_args()
    ledger = Ledger.open(asked.store)
    mixture = mixture_of_store(ledger)
    tokenizer = open_tokenizer(ledger, mixture.tokenizer)
    rng = random.Random(0)
    prompts = [
        [rng.randrange(1, tokenizer.vocabulary) for _ in range(asked.prompt_tokens)]
        for _ in range(asked.requests)
    ]
    served = measure_server(asked, prompts)
    engine = open_engine(ledger, mixture, tokenizer, asked.at_once, asked.precision)
    waiting = [
        Prompt(ids, asked.max_tokens, Sampling(random_seed=number)) for number, ids in enumerate(prompts)
    ]
    engine.generate(waiting[: 2 * asked.at_once])
    started = time.perf_counter()
    tokens = sum(len(one.tokens) for one in engine.generate(waiting))
    alone = tokens / (time.perf_counter() - started)
    experts = len(mixture.models)
    found = served | {"experts": experts, "engine_tokens_per_second": round(alone)}
    print(json.dumps(found | {"ratio": round(served["tokens_per_second"] / alone, 3)}))


def measure_server(asked: argparse.Namespace, prompts: list[list[int]]) -> dict[str, float]:
    """Starts it, warms it up, and sends all requests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "btm_cluster", "serve", "--store", asked.store, "--in-process"]
    command += ["--port", str(port), "--rows", str(asked.at_once), "--precision", asked.precision]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz")
                break
            except OSError:
                time.sleep(0.2)
        asyncio.run(send(port, asked, prompts[: 2 * asked.at_once]))
        return asyncio.run(send(port, asked, prompts))
    finally:
        server.terminate()
        server.wait()


async def send(port: int, asked: argparse.Namespace, prompts: list[list[int]]) -> dict[str, float]:
    """All prompts, so many at once."""
    seconds: list[float] = []
    tokens = 0
    places = asyncio.Semaphore(asked.at_once)
    url = f"http://127.0.0.1:{port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def ask(number: int, prompt: list[int]) -> None:
            nonlocal tokens
            async with places:
                began = time.perf_counter()
                found = await client.completions.create(
                    model="ensemble", prompt=prompt, max_tokens=asked.max_tokens, seed=number, temperature=1
                )
                seconds.append(time.perf_counter() - began)
                tokens += found.usage.completion_tokens

        started = time.perf_counter()
        await asyncio.gather(*(ask(number, prompt) for number, prompt in enumerate(prompts)))
        took = time.perf_counter() - started
    return {
        "requests": len(prompts),
        "tokens_per_second": round(tokens / took),
        "median_s": round(statistics.median(seconds), 3),
        "p95_s": round(statistics.quantiles(seconds, n=20)[-1], 3),
    }


if __name__ == "__main__":
    main()
