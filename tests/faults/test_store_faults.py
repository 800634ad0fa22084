"""Whole runs on a real S3 server that turns a run away, falls silent, or is shared with another driver.

One process each.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import botocore.auth
import pytest

from btm_cluster.algorithm import grow
from btm_cluster.cli import app, run_command
from btm_cluster.ledger import Ledger
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from tests.conftest import in_process, plan_fields
from tests.end_to_end.conftest import plain
from tests.fault_proxy import Fault, FaultProxy, Policy, no_faults
from tests.forked import ForkedProcess

CODE, SAID = 0, 1


def small_fields(texts: dict[str, Path], store: str) -> dict[str, Any]:
    """A plan of two domains whose training saves after each update."""
    fields = plan_fields(texts, Path("unused"))
    fields |= {"domains": fields["domains"][:2], "targets": [], "store": store}
    fields["training"] |= {"updates": 6}
    fields["cluster"] |= {"checkpoint_minutes": 1e-9}
    return fields


@pytest.fixture(scope="module")
def undisturbed(
    texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The experts of that plan when nothing happens."""
    plan = Plan.model_validate(small_fields(texts, str(tmp_path_factory.mktemp("undisturbed"))))
    return plain(grow(plan, in_process(plan)).forest)


@pytest.fixture
def proxy(
    object_store: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultProxy]:
    """Between this process and the server, where a bucket is ready."""
    monkeypatch.setenv("BTM_CACHE_FOLDER", str(tmp_path / "cache"))
    for name, value in object_store.items():
        monkeypatch.setenv(name, value)
    boto3.session.Session().client("s3").create_bucket(Bucket="runs")
    with FaultProxy(object_store["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def btm(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command line in this process: exit code, and everything said."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = run_command(lambda: app([str(argument) for argument in arguments]))
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def experts_in(store: str) -> dict[str, dict[str, Any]]:
    forest = Ledger.open(store).log.newest()
    assert forest is not None
    return plain(forest)


def from_first_checkpoint(act: Callable[[int], Fault]) -> Policy:
    """What `act` says of each request, by its number from the first training checkpoint on."""
    count = 0

    def policy(method: str, path: str, tries: int) -> Fault:  # noqa: ARG001 - a Policy
        nonlocal count
        if not count and not (method == "PUT" and "/training/" in path):
            return Fault.NONE
        count += 1
        return act(count)

    return policy


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("ExpiredToken", "renew the credentials; the same command goes on"),
        ("RequestTimeTooSkewed", "set this machine's clock"),
    ],
)
def test_a_run_that_is_turned_away_in_its_midst_says_why_and_the_same_command_goes_on(
    proxy: FaultProxy,
    btm: Callable[..., tuple[int, str]],
    texts: dict[str, Path],
    write_plan: Callable[[dict[str, Any]], Path],
    undisturbed: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    remedy: str,
) -> None:
    store = f"s3://runs/{code}"
    plan = write_plan(small_fields(texts, store))
    now: Callable[..., datetime] = botocore.auth.get_current_datetime
    is_off = False

    def turn_away(number: int) -> Fault:  # noqa: ARG001 - all of them
        nonlocal is_off
        is_off = True  # this machine's clock: the server itself refuses what is signed an hour ago
        return Fault.EXPIRED if code == "ExpiredToken" else Fault.NONE

    def clock(*arguments: Any, **options: Any) -> datetime:
        return now(*arguments, **options) - timedelta(hours=is_off and code == "RequestTimeTooSkewed")

    monkeypatch.setattr(botocore.auth, "get_current_datetime", clock)
    proxy.follow(from_first_checkpoint(turn_away))
    ended = btm("run", "--in-process", plan)
    assert ended[CODE] == 1, ended
    assert ended[SAID].count("error: ") == 1
    assert "seed: " in ended[SAID]
    for part in (code, remedy, "the same command"):
        assert part in ended[SAID]
    for secret in ("Traceback", "btmkey", "btmsecret"):
        assert secret not in ended[SAID]
    asked_again = btm("run", "--in-process", plan)
    assert asked_again[CODE] == 2, asked_again  # before anything is begun
    assert remedy in asked_again[SAID]
    is_off = False
    proxy.follow(no_faults)
    ended = btm("run", "--in-process", plan)
    assert ended[CODE] == 0, ended
    assert experts_in(store) == undisturbed


def test_a_run_from_whom_the_store_is_cut_off_without_a_word_goes_on_when_it_answers(
    proxy: FaultProxy,
    btm: Callable[..., tuple[int, str]],
    texts: dict[str, Path],
    write_plan: Callable[[dict[str, Any]], Path],
    undisturbed: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("btm_cluster.storage.s3_client.ANSWER_SECONDS", 0.5)
    store = "s3://runs/silent"
    proxy.follow(from_first_checkpoint(lambda number: Fault.SILENCE if number <= 4 else Fault.NONE))
    ended = btm("run", "--in-process", write_plan(small_fields(texts, store)))
    assert ended[CODE] == 0, ended
    assert [fault for _, _, fault in proxy.seen].count(Fault.SILENCE) == 4
    assert experts_in(store) == undisturbed


def test_two_drivers_without_a_cluster_in_common_race_for_every_model_and_end_in_one_forest(
    proxy: FaultProxy,  # noqa: ARG001 - which leads to the server
    texts: dict[str, Path],
    undisturbed: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    store = "s3://runs/shared"
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(small_fields(texts, store)))
    logs = [(tmp_path / f"out-{i}", tmp_path / f"err-{i}") for i in range(2)]
    drivers = [
        ForkedProcess(
            "tests.faults.racing_driver",
            [str(plan), str(tmp_path), str(i)],
            dict(os.environ) | {"BTM_CACHE_FOLDER": str(tmp_path / f"cache-{i}")},
            *logs[i],
        )
        for i in range(2)
    ]
    codes = [driver.wait() for driver in drivers]
    said = [(out.read_text(), err.read_text()) for out, err in logs]
    assert codes == [0, 0], said
    assert experts_in(store) == undisturbed
    assert {out for out, _ in said} == {
        json.dumps([expert["weights_sha256"] for expert in undisturbed.values()]) + "\n"
    }
    assert {path.name for path in tmp_path.glob("*-[01]")} >= {
        f"{name}-{i}" for name in undisturbed for i in range(2)
    }
    ledger = Ledger.open(store)
    assert ledger.log.versions() == [0, 1]
    assert verify(ledger).problems == ()
    assert list(ledger.storage.list("training/")) == []
