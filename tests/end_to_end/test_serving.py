"""A forest on Ray Serve: replicas that share the work, and one that dies meanwhile."""

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import httpx2
import openai

from btm_cluster.forest import Forest
from btm_cluster.language_model.prompts import Prompt
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.ledger import Ledger
from btm_cluster.steps.mixture import mixture_of_store, open_engine
from btm_cluster.steps.stored import open_tokenizer
from tests.conftest import free_port
from tests.end_to_end.conftest import SESSION, Btm

CALLS = 200
OUR_LINES = ("INFO loading PyTorch",)


def test_of_two_hundred_requests_none_is_lost_though_a_replica_is_killed_and_all_end_with_the_server(
    btm: Callable[..., Btm], cluster: dict[str, str], long_fields: dict[str, Any], undisturbed: Forest
) -> None:
    store, port = long_fields["store"], free_port()
    options = ("--replicas", "2", "--cpus-per-replica", "0.5", "--port", str(port))
    server = btm("serve", "--store", store, *options)
    server.wait_until_said("answers at")
    first, *_ = replicas = _replicas(cluster)
    assert len(replicas) == 2

    found = asyncio.run(_ask(port, lambda: os.kill(first, signal.SIGKILL)))

    # Rounding, which depends on what shares a batch, decides a draw in some hundred runs of this test. Two
    # answers mixed up would be two differences.
    assert sum(one != other for one, other in zip(found, _expected(store), strict=True)) <= 1
    assert first not in _replicas(cluster)
    elsewhere = btm("serve", "--store", store, "--port", str(free_port()))
    assert elsewhere.exit_code() == 2
    assert "at another address" in elsewhere.said
    assert httpx2.get(f"http://127.0.0.1:{port}/healthz").json()["forest_version"] == undisturbed.version
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code() == 0
    told_by_ray = f"Worker PID: {first} "  # that the replica was killed
    said = [one for one in server.said.splitlines() if not one.endswith(OUR_LINES) and told_by_ray not in one]
    assert not [line for line in said if re.search(r"Traceback|INFO|\(raylet\)", line)], server.said
    assert not _replicas(cluster)


def _replicas(cluster: dict[str, str]) -> list[int]:
    command = ["pgrep", "-s", cluster[SESSION], "-f", r"^ray::ServeReplica:btm:forest"]
    return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]


def _prompt(number: int) -> list[int]:
    return [2 + number % 300, 2 + number % 7]


async def _ask(port: int, after_twenty: Callable[[], None]) -> list[str]:
    """All calls at once, by OpenAI's client, which asks again where a replica has gone."""
    url, answered = f"http://127.0.0.1:{port}/v1", 0
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=8) as client:

        async def ask(number: int) -> str:
            nonlocal answered
            found = await client.completions.create(
                model="ensemble", prompt=_prompt(number), max_tokens=12, seed=number, temperature=1
            )
            answered += 1
            if answered == 20:
                after_twenty()
            return str(found.choices[0].text)

        return list(await asyncio.gather(*(ask(number) for number in range(CALLS))))


def _expected(store: str) -> list[str]:
    ledger = Ledger.open(store)
    mixture = mixture_of_store(ledger)
    tokenizer = open_tokenizer(ledger, mixture.tokenizer)
    engine = open_engine(ledger, mixture, tokenizer, rows=32)
    prompts = [Prompt(_prompt(number), 12, Sampling(random_seed=number)) for number in range(CALLS)]
    return [str(one.text) for one in engine.generate(prompts)]
