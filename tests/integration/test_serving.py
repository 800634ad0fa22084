"""A served forest, as its callers see it: a real HTTP server, and OpenAI's own client."""

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from btm_cluster.errors import ClosedError, ResourcesError
from btm_cluster.forest import take_out
from btm_cluster.language_model.document_scores import NamedText
from btm_cluster.language_model.prompts import Drawn
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.ledger import Ledger, artifact_key
from btm_cluster.ledger.versions import append_next
from btm_cluster.operations.generate import Continuation, generate
from btm_cluster.operations.score import scorer_of_plan
from btm_cluster.operations.serve import Endpoint, mixture_to_serve, newer_of_plan, serve_in_process
from btm_cluster.serving.app import build_app
from btm_cluster.serving.forest import LiveForest, LoadedForest, Served
from btm_cluster.serving.http_errors import digest_of
from btm_cluster.serving.settings import ServingSettings
from btm_cluster.steps.mixture import Mixture, mixture_of_store, newer_in_store
from btm_cluster.steps.stored import open_tokenizer
from tests.conftest import free_port
from tests.integration.conftest import GrownForest

KEY = "a-key-for-tests"


class Server:
    """A server in a thread of this process, and clients of it."""

    def __init__(self, live: LiveForest, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.live, self.url, self._loop = live, url, loop
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)

    def complete(self, **body: Any) -> Any:
        return self.client.completions.create(**{"model": "ensemble", "temperature": 1, **body})

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json=body, headers=headers, timeout=60)

    def post_text(self, path: str, body: str) -> httpx2.Response:
        headers = {"Content-Type": "application/json"}
        return httpx2.post(f"{self.url}{path}", content=body.encode(), headers=headers, timeout=60)

    def do(self, work: Any) -> Any:
        """Does something in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)


@contextmanager
def serving(store: str, mixture: Mixture, **settings: Any) -> Iterator[Server]:
    live = LiveForest(Ledger.open(store), ServingSettings(**settings))
    port, loops, ready = free_port(), list[asyncio.AbstractEventLoop](), threading.Event()
    config = uvicorn.Config(build_app(live), port=port, log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await live.change_to(mixture)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ready.set()
        await serving
        live.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(60)
        opened = Server(live, f"http://127.0.0.1:{port}", loops[0])
        with opened.client:
            yield opened
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def mixture(grown: GrownForest) -> Mixture:
    return mixture_to_serve(grown.prepared.plan, grown.driver, None)


@pytest.fixture(scope="module")
def server(grown: GrownForest, mixture: Mixture) -> Iterator[Server]:
    with serving(grown.prepared.plan.store, mixture, rows=8) as server:
        yield server


def prompts_of(count: int, tokens: int = 12) -> list[str]:
    """Beginnings of texts of the domains, in turn."""
    letters = ["kitchen", "harbour", "orchard"]
    return [(letters[i % 3][i % 5 :] + " ") * (tokens // 8) + "ab"[: i % 3] for i in range(count)]


def test_openais_client_gets_the_text_that_btm_generate_writes(server: Server, grown: GrownForest) -> None:
    plan, asked = grown.prepared.plan, Continuation(10, Sampling(random_seed=7))
    expected = generate(plan, "kitchen", ["hcti", "bour"], asked, grown.driver)
    found = server.complete(model="ensemble:kitchen", prompt=["hcti", "bour"], max_tokens=10, seed=7)
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    for choice, one in zip(found.choices, expected, strict=True):
        assert choice.experts == pytest.approx(dict(one.expert_weights), abs=1e-6)
    assert found.usage.completion_tokens == sum(one.tokens for one in expected)


def test_all_models_are_listed_and_answer(server: Server, grown: GrownForest) -> None:
    names = [model.id for model in server.client.models.list()]
    experts = [f"expert:{name}" for name in grown.grown.forest.domains]
    assert {"ensemble", "ensemble:market", "seed", "average:uniform", *experts} <= set(names)
    for name in names:
        answer = server.complete(model=name, prompt="hcti", max_tokens=3, echo=True).choices[0]
        assert answer.text.startswith("hcti")  # a drawn end of the document adds nothing
    assert server.client.models.retrieve("seed").id == "seed"


def test_an_expert_alone_writes_and_scores_as_that_model_does(server: Server, grown: GrownForest) -> None:
    found = server.complete(model="expert:harbour", prompt="bour hub", max_tokens=0, echo=True, logprobs=1)
    scorer = scorer_of_plan(grown.prepared.plan, None, grown.driver)
    ids = open_tokenizer(grown.driver.ledger, grown.prepared.tokenizer).encode("bour hub")
    place = list(scorer.names).index("harbour")
    (scores,) = scorer._score([ids])
    assert found.choices[0].logprobs.token_logprobs == pytest.approx(scores.logp_ET[place].tolist(), abs=1e-5)
    assert found.choices[0].experts["harbour"] == 1


def test_a_prompt_of_ids_is_echoed_with_scores_as_other_tools_ask_for_them(
    server: Server, grown: GrownForest
) -> None:
    tokenizer = open_tokenizer(grown.driver.ledger, grown.prepared.tokenizer)
    ids = tokenizer.encode("tchi nek hcti")
    asked = {"echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1, "seed": 1234}
    plain = server.complete(prompt=[ids], **asked).choices[0]
    begun = server.complete(prompt=[tokenizer.first_token, *ids], **asked).choices[0]
    (scores,) = scorer_of_plan(grown.prepared.plan, None, grown.driver)._score([ids])
    assert plain.logprobs.token_logprobs[:-1] == pytest.approx(scores.logp_T.tolist(), abs=1e-5)
    assert begun.logprobs.token_logprobs == [None, *plain.logprobs.token_logprobs]
    assert begun.logprobs.top_logprobs[0] is None
    for logp, top, token in zip(
        plain.logprobs.token_logprobs, plain.logprobs.top_logprobs, plain.logprobs.tokens, strict=True
    ):
        assert top[token] == logp
        assert max(top.values()) >= logp
    last = plain.logprobs
    assert last.token_logprobs[-1] == max(last.top_logprobs[-1].values())  # which temperature 0 takes
    assert plain.text == "".join(last.tokens)
    assert [plain.text[at:].startswith(text) for at, text in zip(last.text_offset, last.tokens, strict=True)]


@pytest.mark.parametrize("stop", [None, ["o", "u k"]])
def test_a_stream_gives_the_same_text_as_an_answer_at_once(server: Server, stop: list[str] | None) -> None:
    asked = {"prompt": ["hcti", "bour"], "max_tokens": 12, "seed": 3, "n": 2, "stop": stop, "logprobs": 2}
    whole = server.complete(**asked)
    texts, ends, tokens = dict[int, str](), dict[int, str](), dict[int, list[str]]()
    usage = None
    for part in server.complete(**asked, stream=True, stream_options={"include_usage": True}):
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens if choice.logprobs else [])
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert tokens == {choice.index: choice.logprobs.tokens for choice in whole.choices}
    assert usage == whole.usage
    if stop is not None:
        assert not any("o" in choice.text for choice in whole.choices)
        assert "stop" in ends.values()


def test_of_two_hundred_requests_at_once_none_is_lost_and_none_mixed_up(server: Server) -> None:
    prompts = prompts_of(200)

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        found = await client.completions.create(
            model="ensemble", prompt=prompts[number], max_tokens=6, seed=number, temperature=1
        )
        return str(found.choices[0].text)

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            return list(await asyncio.gather(*(ask(client, number) for number in range(200))))

    found = asyncio.run(ask_all())
    alone = [
        server.complete(prompt=prompts[number], max_tokens=6, seed=number).choices[0].text
        for number in range(0, 200, 7)
    ]
    assert found[::7] == alone
    assert len(set(found)) > 150


def test_a_texts_domain_is_the_one_that_btm_score_names(server: Server, grown: GrownForest) -> None:
    answer = server.post("/v1/domains", {"input": ["hcti nek tch", "rbou hub arb " * 20]}).json()
    scorer = scorer_of_plan(grown.prepared.plan, None, grown.driver)
    texts = [NamedText("", 0, "hcti nek tch"), NamedText("", 1, "rbou hub arb " * 20)]
    for row, (_, sums) in zip(answer["data"], scorer.score(texts), strict=True):
        expected = sums.scored(scorer.names, scorer.domains)
        assert row["domains"] == pytest.approx(dict(expected.posterior), abs=1e-6)
        assert row["tokens"] == expected.tokens


REFUSED: list[tuple[int, str, dict[str, Any]]] = [
    (404, "no model 'nope'", {"model": "nope"}),
    (400, "presence_penalty", {"presence_penalty": 1}),
    (400, "unknown token id", {"prompt": [10**6]}),
    (400, "too long", {"prompt": "abc " * 200}),
    (400, "at most 128", {"n": 129}),
    (400, "tempurature: there is no such field; did you mean temperature?", {"tempurature": 1}),
    (400, "echo cannot be streamed", {"echo": True, "stream": True}),
    (400, "max_tokens 0", {"max_tokens": 0}),
    (400, "stop string is empty", {"stop": [""]}),
    (400, "best_of", {"best_of": 3}),
    (400, "prompt", {"prompt": []}),
    (400, "logprobs", {"logprobs": 21}),
    (400, "one expert alone", {"draws_one_expert": True, "temperature": 0.5}),
    (400, "a list of token ids", {"prompt": [True]}),
    (400, "a list of token ids", {"prompt": ["ab", [1]]}),
    (400, "at most 64 stop strings", {"stop": ["x"] * 65}),
    (400, "4,097 characters", {"prompt": "a" * (32 * 128 + 1)}),
    (400, "temperature", {"temperature": -1}),
]


@pytest.mark.parametrize(("status", "message", "body"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_what_cannot_be_answered_is_refused_with_its_reason(
    server: Server, status: int, message: str, body: dict[str, Any]
) -> None:
    answer = server.post("/v1/completions", {"model": "ensemble", "prompt": "ab", **body})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", ['"prompt": "\\ud800"', '"prompt": "ab", "stop": ["\\ud800"]'])
def test_half_a_character_is_refused_and_the_engine_lives_on(server: Server, body: str) -> None:
    """JSON can name it, and Python holds it. As a stop string it ended the engine, for everybody."""
    answer = server.post_text("/v1/completions", f'{{"model": "ensemble", {body}}}')
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert "whole characters" in answer.text
    assert "whole characters" in server.post_text("/v1/domains", '{"input": "\\ud800"}').text
    assert server.complete(prompt="ab", max_tokens=2).choices


def test_null_stands_for_the_default_as_in_openais_api(server: Server) -> None:
    names = ("prompt", "max_tokens", "temperature", "n", "stop", "stream", "echo", "presence_penalty")
    body = {"model": "ensemble"} | dict.fromkeys(names)
    assert server.post("/v1/completions", body).json()["usage"]["completion_tokens"] <= 16


def test_a_fault_of_ours_is_told_as_openais_clients_read_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("it is ours")

    monkeypatch.setattr(server.live.current.ensemble.engine, "check", fail)
    answer = server.post("/v1/completions", {"model": "ensemble", "prompt": "ab"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")


def test_a_long_text_of_one_caller_is_not_too_much_and_is_given_up_with_its_caller(
    grown: GrownForest, mixture: Mixture
) -> None:
    with serving(grown.prepared.plan.store, mixture, rows=1, waiting=1) as server:
        text = "rbou hub arb " * 100
        assert server.post("/v1/domains", {"input": text}).json()["data"][0]["tokens"] > 10 * 32
        too_long = server.post("/v1/domains", {"input": "a" * 1_000_001})
        assert (too_long.status_code, "1,000,001" in too_long.text) == (400, True)

        engine, go_on, scored = server.live.current.ensemble.engine, threading.Event(), list[int]()
        score = engine.score

        def slowly(texts: Any, *arguments: Any) -> Any:
            scored.append(len(texts))
            go_on.wait(60)
            return score(texts, *arguments)

        engine.score = slowly  # type: ignore[method-assign]
        with calling(server, "/v1/domains", {"input": text}):
            wait_for(lambda: scored)
        wait_for(lambda: server.live.current._users == 0)
        go_on.set()
        for _ in range(3):
            assert server.complete(prompt="ab", max_tokens=2).choices
        assert len(scored) == 1


def test_a_body_that_is_no_json_or_too_long_or_at_another_address_is_refused(server: Server) -> None:
    post = httpx2.post
    assert "no JSON: Expecting property name" in server.post_text("/v1/completions", "{").text
    without = post(f"{server.url}/v1/completions", content=b'{"model": "ensemble"}')
    assert (without.status_code, "Content-Type" in without.json()["error"]["message"]) == (400, True)
    too_long = post(f"{server.url}/v1/completions", content=b" " * (9 * 2**20))
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (413, "too_large")
    in_parts = post(f"{server.url}/v1/completions", content=(b" " * 2**20 for _ in range(9)))
    assert in_parts.status_code == 413
    chat = post(f"{server.url}/v1/chat/completions", json={})
    assert (chat.status_code, "/v1/completions" in chat.json()["error"]["message"]) == (404, True)
    for wrong, takes in (
        (post(f"{server.url}/v1/models", json={}), "/v1/models takes GET, not POST"),
        (httpx2.get(f"{server.url}/v1/completions"), "/v1/completions takes POST, not GET"),
    ):
        assert (wrong.status_code, wrong.json()["error"]["message"]) == (405, takes)


def test_without_the_key_nothing_but_health_is_told(grown: GrownForest, mixture: Mixture) -> None:
    with serving(grown.prepared.plan.store, mixture, key_digest=digest_of(KEY), rows=1) as server:
        for path in ("/v1/models", "/metrics"):
            answer = httpx2.get(f"{server.url}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        wrong = server.post("/v1/completions", {"model": "ensemble"}, Authorization="Bearer other")
        assert wrong.status_code == 401
        assert httpx2.get(f"{server.url}/healthz").json()["status"] == "ok"
        assert server.complete(prompt="ab", max_tokens=2).choices


def test_a_server_in_process_ends_with_its_engine(grown: GrownForest, mixture: Mixture) -> None:
    live, endpoint = LiveForest(grown.driver.ledger, ServingSettings(rows=1)), Endpoint(port=free_port())

    def fail() -> dict[int, Drawn]:
        raise RuntimeError("the device is gone")

    def ask() -> None:
        live.current.ensemble.engine.step = fail  # type: ignore[method-assign, assignment]
        body = {"model": "ensemble", "prompt": "ab"}
        answers.append(httpx2.post(f"{endpoint.url}/v1/completions", json=body, timeout=60))

    answers: list[httpx2.Response] = []
    caller = threading.Thread(target=ask)
    with pytest.raises(ClosedError, match="the device is gone"):
        asyncio.run(serve_in_process(live, mixture, None, endpoint, caller.start))
    caller.join(60)
    assert answers[0].status_code == 500


@contextmanager
def held(server: Server) -> Iterator[threading.Event]:
    """The ensemble's engine does not step until the event is set."""
    engine, go_on = server.live.current.ensemble.engine, threading.Event()
    step = engine.step

    def wait(*arguments: Any) -> dict[int, Drawn]:
        go_on.wait(60)
        return step(*arguments)

    engine.step = wait  # type: ignore[method-assign]
    try:
        yield go_on
    finally:
        go_on.set()
        engine.step = step  # type: ignore[method-assign]


def wait_for(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it does not come")


def test_too_many_callers_are_told_so_at_once_and_a_late_answer_is_given_up(
    grown: GrownForest, mixture: Mixture
) -> None:
    with (
        serving(grown.prepared.plan.store, mixture, rows=1, waiting=1, timeout_seconds=2) as server,
        held(server),
    ):
        body = {"model": "ensemble", "prompt": "ab", "max_tokens": 4}
        answers: list[httpx2.Response] = []
        late = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
        late.start()
        wait_for(lambda: server.live.current.ensemble.under_way == 1)
        busy = server.post("/v1/completions", body | {"n": 2})
        assert (busy.status_code, busy.headers["Retry-After"]) == (429, "1")
        late.join(30)
        assert answers[0].status_code == 408


@contextmanager
def calling(server: Server, path: str, body: object) -> Iterator[None]:
    """Sends a request, and hangs up without reading the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    said = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as caller:
        caller.sendall(f"{head}Content-Length: {len(said)}\r\n\r\n{said}".encode())
        yield


def test_the_row_of_a_caller_who_hangs_up_is_given_to_the_next_and_nothing_is_logged(
    grown: GrownForest, mixture: Mixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(grown.prepared.plan.store, mixture, rows=1) as server:
        engine = server.live.current.ensemble
        for stream in (False, True):
            with held(server) as go_on:
                body = {"model": "ensemble", "prompt": "ab", "max_tokens": 20, "stream": stream}
                with calling(server, "/v1/completions", body):
                    wait_for(lambda: engine.under_way == 1)
                (gone,) = engine._rows.values()
                wait_for(lambda gone=gone: gone.is_cancelled)
                go_on.set()
                wait_for(lambda: engine.under_way == 0)
        assert server.complete(prompt="ab", max_tokens=2).choices[0].finish_reason == "length"
        wait_for(
            lambda: 'btm_serve_calls_total{status="499"} 2.0' in httpx2.get(f"{server.url}/metrics").text
        )
        assert 'btm_serve_calls_total{status="200"} 1.0' in httpx2.get(f"{server.url}/metrics").text
    assert "Exception" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve's import
def test_a_mixture_reaches_replicas_as_ray_serve_takes_it_and_tells_it(mixture: Mixture) -> None:
    from ray.serve.schema import DeploymentSchema

    from btm_cluster.serving.on_ray import config_of, mixture_of

    schema = DeploymentSchema(name="forest", user_config=json.loads(json.dumps(config_of(mixture))))
    found = mixture_of(schema.user_config)
    assert (found.version, found.models, found.tokenizer) == (
        mixture.version,
        mixture.models,
        mixture.tokenizer,
    )
    assert {text: gate.log_prior_E.tolist() for text, gate in found.gates.items()} == {
        text: gate.log_prior_E.tolist() for text, gate in mixture.gates.items()
    }


def test_a_plans_newer_version_that_was_not_evaluated_is_not_served_yet(
    grown: GrownForest, tmp_path: Path
) -> None:
    plan = grown.prepared.plan.model_copy(update={"store": str(tmp_path / "store")})
    shutil.copytree(grown.prepared.plan.store, plan.store)
    ledger = Ledger.open(plan.store)
    forest = ledger.log.newest()
    assert forest is not None
    assert ledger.log.append(take_out(forest, "orchard", "its licence ended"))
    for scores in ledger.list_artifacts("scores"):
        ledger.storage.delete(artifact_key(scores.ref))
    with pytest.raises(ResourcesError, match="btm evaluate"):
        newer_of_plan(plan, 1)
    assert newer_of_plan(plan, 2) is None


@pytest.mark.parametrize("by_plan", [True, False], ids=["by its plan", "by its store alone"])
def test_a_newer_version_takes_over_while_requests_are_under_way(
    grown: GrownForest, tmp_path: Path, by_plan: bool
) -> None:
    plan = grown.prepared.plan.model_copy(update={"store": str(tmp_path / "store")})
    shutil.copytree(grown.prepared.plan.store, plan.store)
    ledger = Ledger.open(plan.store)
    first = mixture_of_store(ledger)

    def newer(served: int) -> Mixture | None:
        return newer_of_plan(plan, served) if by_plan else newer_in_store(ledger, served)

    with serving(plan.store, first, rows=4) as server:
        before = server.live.current
        answers: list[str] = []

        def ask(number: int) -> None:
            answers.append(server.complete(prompt="hcti", max_tokens=12, seed=number).system_fingerprint)

        with held(server) as go_on:
            callers = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
            for caller in callers:
                caller.start()
            wait_for(lambda: before.ensemble.under_way + before.ensemble.waiting == 12)
            forest = ledger.log.newest()
            assert forest is not None
            assert ledger.log.append(take_out(forest, "orchard", "its licence ended"))
            mixture = newer(first.version)
            assert mixture is not None
            server.do(server.live.change_to(mixture))
            assert server.complete(prompt="hcti", max_tokens=1).system_fingerprint == "forest-version-2"
            go_on.set()
        for caller in callers:
            caller.join(60)
        assert answers == ["forest-version-1"] * 12
        before.ensemble.join(30)  # its engine has ended with the last of them
        assert "expert:orchard" not in [model.id for model in server.client.models.list()]
        now = server.live.current.shared
        unchanged = [ref for ref in first.models.values() if now.find(ref)]
        assert unchanged
        assert all(now.find(ref) is before.shared.find(ref) for ref in unchanged)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve's import
def test_a_replica_told_which_version_to_serve_no_longer_follows_the_newest(
    grown: GrownForest, tmp_path: Path
) -> None:
    from btm_cluster.serving.on_ray import ForestServer, config_of

    store = str(tmp_path / "store")
    shutil.copytree(grown.prepared.plan.store, store)
    ledger = Ledger.open(store)
    append_next(ledger, lambda forest: take_out(forest, "orchard", "its licence ended"))

    async def serve() -> None:
        replica_class = ForestServer.func_or_class.__mro__[
            1
        ]  # without the wrapper that hands it HTTP requests
        replica = replica_class(store, asdict(ServingSettings()), follow_seconds=0.01)
        live = replica._live
        await replica.reconfigure({"forest_version": None})
        assert live.current.mixture.version == 2
        for pinned in ({"forest_version": 1}, config_of(mixture_of_store(ledger, 1))):
            await replica.reconfigure(pinned)
            await asyncio.sleep(0.5)
            assert live.current.mixture.version == 1
        await replica.reconfigure({"forest_version": None})
        append_next(ledger, lambda forest: take_out(forest, "harbour", "its licence ended"))
        while live.current.mixture.version != 3:
            await asyncio.sleep(0.01)
        replica._following.cancel()
        live.close()

    asyncio.run(asyncio.wait_for(serve(), 60))


def test_a_model_that_is_loaded_while_its_caller_hangs_up_is_kept_and_ends_with_its_version(
    grown: GrownForest, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, load = threading.Event(), threading.Event(), LoadedForest._open_other

    def held_load(forest: LoadedForest, name: str) -> Served:
        begun.set()
        assert go_on.wait(60)
        return load(forest, name)

    monkeypatch.setattr(LoadedForest, "_open_other", held_load)
    live = LiveForest(grown.driver.ledger, ServingSettings(rows=2))

    async def hang_up() -> Served:
        await live.change_to(mixture)
        forest = live.current
        asked = asyncio.create_task(forest.model("average:uniform"))
        assert await asyncio.to_thread(begun.wait, 60)
        asked.cancel()
        live.close()  # another version is served from now on
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asked
        return forest._others["average:uniform"]

    other = asyncio.run(hang_up())
    other.engine.join(60)
    assert not other.engine._thread.is_alive()
