"""Joining or starting a Ray cluster: what cannot be is one error with its remedy, before anything waits."""

import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from btm_cluster.errors import ResourcesError
from btm_cluster.workers.on_ray import cluster
from btm_cluster.workers.on_ray.cluster import connected, ray_folder
from btm_cluster.workers.on_ray.examination import examine_local
from tests.integration.test_doctor import SOUND


def refusal(address: str | None) -> ResourcesError:
    with pytest.raises(ResourcesError) as raised, connected(address, dashboard=False):
        pass
    assert raised.value.exit_code == 2
    return raised.value


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8265",
        "https://127.0.0.1:8265",
        "localhost",
        "127.0.0.1",
        "host:port",
        ":6379",
        "host:0",
        "host:70000",
        "http://",
        "tcp://127.0.0.1:6379",
        "ray://host",
        "a b:6379",
        "127.0.0.1:6379/path",
    ],
)
def test_what_is_no_address_is_refused_with_the_form_of_one(address: str) -> None:
    refused = refusal(address)
    assert repr(address) in refused.what
    assert "HOST:PORT" in refused.expected
    assert "--address or RAY_ADDRESS" in refused.remedy
    assert ("`ray job submit`" in refused.remedy) == ("://" in address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9", "ray://127.0.0.1:9", "no.such.host.invalid:6379", "[::1]:9"]
)
def test_where_nobody_listens_is_said_at_once(address: str) -> None:
    refused = refusal(address)
    assert refused.what == f"no Ray cluster answers at {address}"
    assert "RAY_ADDRESS" in refused.remedy


@pytest.mark.parametrize("says", [b"HTTP/1.0 400 Bad Request\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_where_something_else_listens_is_said_at_once(says: bytes) -> None:
    """A port of something else, such as the dashboard's, kept ray.init trying for minutes."""

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(says)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        thread.start()
        refused = refusal(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert "something else listens there" in refused.found


def test_a_temporary_folder_too_long_for_sockets_is_refused_and_seen_by_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / ("ä" * 40)
    monkeypatch.setenv("TMPDIR", str(long))
    refused = refusal(None)
    assert f"{len(os.fsencode(long))} bytes" in refused.found
    assert "RAY_TMPDIR" in refused.remedy
    assert "TMPDIR" in refused.found
    (wrong,) = examine_local([], SOUND)
    assert (wrong.name, wrong.state, wrong.remedy) == ("Ray", "wrong", refused.remedy)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert ray_folder() == "/tmp/ray"
    assert examine_local([], SOUND)[0].state == "ok"


def test_the_longest_folder_that_is_said_to_do_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    longest = int(refusal(None).expected.split()[-1])
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * (longest - 5))
    assert ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * (longest - 4))
    refusal(None)


def test_a_temporary_folder_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/x")
    assert "/dev/null, which is no folder" in refusal(None).found


def test_whatever_keeps_ray_from_starting_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")  # root may write everywhere, but not there
    refused = refusal(None)
    assert refused.what.startswith("Ray ")
    assert "RAY_TMPDIR" in refused.remedy


def test_ray_that_does_not_come_up_is_given_up_with_the_load_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine with sixteen times as much to do as it has CPUs, `btm score` waited for ten minutes."""
    monkeypatch.setattr(cluster, "START_SECONDS", 0.2)
    monkeypatch.setattr(cluster.ray, "init", lambda *_, **__: threading.Event().wait())
    for address in (None, "auto"):
        refused = refusal(address)
        assert "within" in refused.what
        assert "CPUs" in refused.found
        assert "--in-process" in refused.remedy
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("given", ["", "."])
def test_ray_gets_a_whole_path_of_its_folder(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a relative one its processes do not find each other, and half a minute passes."""
    monkeypatch.chdir("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", given)
    monkeypatch.setenv("TMPDIR", given)
    assert ray_folder() == "/tmp/ray"
