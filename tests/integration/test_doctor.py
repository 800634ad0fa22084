"""`btm doctor` on staged causes: each is found, named on one line, and comes with its remedy."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from btm_cluster.cli import app, run_command
from btm_cluster.driver.capacity import Demand
from btm_cluster.driver.gpu_memory import TrainingMemory
from btm_cluster.errors import ResourcesError
from btm_cluster.language_model.training_size import size_for
from btm_cluster.operations import doctor
from btm_cluster.operations.doctor import judge_memory
from btm_cluster.plan import Plan
from btm_cluster.requests import Resources
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.storage.port import Entry
from btm_cluster.workers.checks import Check, Needs, judge_machines
from btm_cluster.workers.machine import Machine, check_compiler, inspect_machine
from btm_cluster.workers.on_ray.examination import (
    examine_cluster,
    examine_local,
    examine_working_directory,
    unseen_node,
)

SOUND = Machine("node-1", 8, {"/tmp": 10**12, "/cache": 10**12}, {}, (), claimed_cpus=8)
WITH_GPUS = dataclasses.replace(
    SOUND, gpus=("NVIDIA H200, driver 570.1",) * 2, torch_cuda="13.0", torch_gpus=2, claimed_gpus=2
)


def only_wrong(checks: list[Check]) -> Check:
    (wrong,) = [check for check in checks if check.state == "wrong"]
    return wrong


@pytest.mark.parametrize(
    ("machine", "named", "found", "remedy"),
    [
        (
            dataclasses.replace(SOUND, free_bytes={"/tmp": 10**9, "/cache": 10**12}),
            "disk",
            "1.0 GB free in /tmp",
            "TMPDIR",
        ),
        (dataclasses.replace(WITH_GPUS, torch_cuda=None), "GPU", "a torch without CUDA", "install torch"),
        (
            dataclasses.replace(WITH_GPUS, torch_gpus=0),
            "GPU",
            "too old for torch's CUDA 13.0",
            "update the driver",
        ),
        (
            dataclasses.replace(WITH_GPUS, torch_gpus=1),
            "GPU",
            "hands out 2 GPU, torch can use 1",
            "--num-gpus",
        ),
        (dataclasses.replace(WITH_GPUS, has_compiler=False), "GPU", "no C compiler", "install gcc"),
        (dataclasses.replace(WITH_GPUS, gpus=()), "GPU", "nvidia-smi finds none", "install NVIDIA's driver"),
        (dataclasses.replace(SOUND, claimed_cpus=64), "threads", "its processes may use 8", "--num-cpus"),
        (
            dataclasses.replace(SOUND, variables={"MKL_NUM_THREADS": "1"}),
            "threads",
            "MKL_NUM_THREADS=1",
            "unset",
        ),
        (
            dataclasses.replace(SOUND, no_cpu_compiler="no C++ compiler (g++)"),
            "compiler",
            "no C++ compiler",
            "g++",
        ),
        (dataclasses.replace(SOUND, cache="it is no size: x"), "cache", "no size: x", "BTM_CACHE_GIGABYTES"),
        (
            dataclasses.replace(SOUND, store="AccessDenied: no"),
            "store from a node",
            "AccessDenied",
            "credentials",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_one_of_two_machines_is_said_of_that_machine(
    machine: Machine, named: str, found: str, remedy: str
) -> None:
    other = dataclasses.replace(SOUND, host="node-2", store="" if machine.store is not None else None)
    wrong = only_wrong(judge_machines([machine, other], Needs(cpus=4, compiles=True, compiles_on_cpu=True)))
    assert wrong.name == f"{named} on node-1"
    assert found in wrong.found
    assert remedy in wrong.remedy


def test_sound_machines_take_one_line_for_each_kind_of_check() -> None:
    checks = judge_machines([SOUND, dataclasses.replace(SOUND, host="node-2")], Needs(cpus=4))
    assert {check.name: check.state for check in checks} == {"disk": "ok", "GPU": "ok", "threads": "ok"}
    (gpu,) = [check for check in judge_machines([WITH_GPUS], Needs()) if check.name == "GPU"]
    assert gpu == Check("GPU", "ok", "2 × NVIDIA H200, driver 570.1, torch's CUDA 13.0")


def test_a_cache_that_cannot_be_is_a_line_and_the_rest_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTM_CACHE_GIGABYTES", "x")
    machine = inspect_machine(None)
    assert machine.cache == "BTM_CACHE_GIGABYTES is no size: x"
    assert len(machine.free_bytes) == 1


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    machine = inspect_machine(str(tmp_path))
    assert 1 <= machine.usable_cpus <= (os.cpu_count() or 1)
    assert machine.store == ""
    (tmp_path / "file").touch()
    assert "is no folder" in (inspect_machine(str(tmp_path / "file")).store or "")


class EveryCreatorWins(LocalFolder):
    """A service that does not know `If-None-Match`."""

    def create(self, key: str, data: bytes) -> bool:
        super().delete(key)
        super().create(key, data)
        return True


class AnHourAhead(LocalFolder):
    """A service whose clock is right where this machine's is not."""

    def list(self, prefix: str) -> Iterator[Entry]:
        for entry in super().list(prefix):
            yield dataclasses.replace(entry, modified=entry.modified + 3600)


class ForgetsBytes(LocalFolder):
    """A service that returns something else than was written."""

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        return super().read(key, start, size)[:-1]


@pytest.mark.parametrize(
    ("adapter", "named", "found"),
    [
        (EveryCreatorWins, "store, conditional create", "9 of 9 creators"),
        (AnHourAhead, "clock", "3600 s between this machine's clock and the store's"),
        (ForgetsBytes, "store, written and read", "other bytes"),
    ],
)
def test_a_store_that_cannot_be_relied_on_is_found_out(
    adapter: type[LocalFolder], named: str, found: str, tmp_path: Path
) -> None:
    wrong = only_wrong(doctor.examine_store(adapter(str(tmp_path))))
    assert wrong.name == named
    assert found in wrong.found
    assert wrong.remedy


def test_a_sound_store_is_left_as_it_was(tmp_path: Path) -> None:
    checks = doctor.examine_store(LocalFolder(str(tmp_path)))
    assert [check.state for check in checks] == ["ok"] * 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_store_that_cannot_be_written_says_so_and_is_still_asked_the_rest(tmp_path: Path) -> None:
    (tmp_path / "clock").touch()
    checks = doctor.examine_store(LocalFolder(str(tmp_path)))
    assert [check.state for check in checks] == ["ok", "wrong", "wrong", "wrong"]
    assert all("check the folder and its permissions" in check.remedy for check in checks[1:])


def test_a_large_model_asks_for_room_on_the_disk(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields)
    _, seen = doctor.examine_plan(plan)
    assert seen is not None
    small, large = (
        doctor.needs_of(plan, seen),
        doctor.needs_of(plan, dataclasses.replace(seen, parameters=10**9)),
    )
    assert large.free_bytes - small.free_bytes == pytest.approx(2 * 12 * 10**9, rel=1e-3)
    assert large.cpus == 1


def test_a_checkpoint_that_asks_for_more_than_there_is_is_named_with_the_flag_that_helps() -> None:
    """The doctor looked at the plan alone, said ok, and the run was refused."""
    four = Demand("seed", Resources(1, 0.0, 4, 4, "float32", False), saved_at=300)
    wrong = only_wrong(examine_local([four], dataclasses.replace(SOUND, usable_cpus=2)))
    assert wrong.name == "capacity for the seed"
    assert "checkpoint at update 300" in wrong.found
    assert "4 CPU" in wrong.found
    assert "--new-resources" in wrong.remedy
    assert {check.state for check in examine_local([four], dataclasses.replace(SOUND, usable_cpus=4))} == {
        "ok"
    }


@pytest.mark.parametrize("on_gpu", [True, False])
def test_what_compiles_needs_a_compiler_and_says_which(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    demands = [Demand("seed", Resources(1, float(on_gpu), 1, 4, "float32", True))]
    check_compiler(demands)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ResourcesError, match="cannot be compiled") as refused:
        check_compiler(demands)
    assert ("gcc" if on_gpu else "g++") in refused.value.found
    check_compiler([dataclasses.replace(demands[0], how=dataclasses.replace(demands[0].how, compile=False))])


def test_a_folder_too_large_for_ray_is_refused_and_rayignore_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._private.runtime_env.packaging.GCS_STORAGE_MAX_SIZE", 2**20)
    (tmp_path / "forests").mkdir()
    (tmp_path / "forests" / "weights").write_bytes(bytes(2**21))
    (tmp_path / "plan.yaml").write_text("name: n")
    wrong = examine_working_directory(tmp_path)
    assert wrong.state == "wrong"
    assert ".rayignore" in wrong.remedy
    (tmp_path / ".rayignore").write_text("forests/\n")
    assert examine_working_directory(tmp_path).state == "ok"


def test_modules_that_would_hide_libraries_in_a_job_are_named_unless_it_does_not_carry_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").touch()
    (tmp_path / "torch").mkdir()  # without an `__init__.py`, it hides nothing
    for name in ("tokenizers.py", "random.py", "mine.py", "plan.yaml"):
        (tmp_path / name).touch()
    check = examine_working_directory(tmp_path)
    assert (check.name, check.state) == ("working directory", "note")
    assert check.found.startswith("datasets, random.py, tokenizers.py would hide")
    assert "rename" in check.remedy
    (tmp_path / ".rayignore").write_text("/datasets\n/random.py\n/tokenizers.py\n")
    assert examine_working_directory(tmp_path).state == "ok"


@pytest.mark.parametrize("command", ["plan", "run", "doctor"])
def test_a_folder_on_pythonpath_that_hides_a_library_is_refused_before_that_is_imported(
    command: str, fields: dict[str, Any], write_plan: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """As in a job whose working directory has a `datasets` of the user's own."""
    plan = write_plan(fields)
    (tmp_path / "datasets.py").write_text("")
    (tmp_path / "ray.py").write_text("raise RuntimeError")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    arguments = [sys.executable, "-P", "-m", "btm_cluster", command, str(plan)]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "found:    datasets.py, ray.py" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(fields["store"]).exists()


def test_an_address_where_nothing_answers_is_named() -> None:
    checks, machines = examine_cluster("127.0.0.1:9", None, [], autoscaling=False)
    assert machines == []
    assert "no Ray cluster answers at 127.0.0.1:9" in only_wrong(checks).found


def test_a_node_without_our_packages_is_named() -> None:
    check = unseen_node(
        "node-7", RuntimeError("Traceback …\nModuleNotFoundError: No module named 'btm_cluster'")
    )
    assert (check.name, check.state) == ("node node-7", "wrong")
    assert "No module named 'btm_cluster'" in check.found
    assert "same versions" in check.remedy


def test_the_command_ends_with_two_and_a_line_for_each_where_something_is_wrong(
    fields: dict[str, Any], write_plan: Callable[[dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fields["cluster"] |= {"seed_gpus": 12}
    fields["domains"][0]["text"] = "none/at/all.jsonl"
    arguments = ["doctor", str(write_plan(fields))]
    assert run_command(lambda: app(arguments)) == 2
    out, err = capsys.readouterr()
    lines = {line.split("  ")[1].strip() or line: line for line in out.splitlines()}
    assert sum(line.startswith("wrong") for line in lines.values()) == 2
    assert "matches no file" in out
    assert "capacity for the seed" in out
    assert err.startswith("error: 2 of ")
    assert run_command(lambda: app([*arguments, "--json"])) == 2
    shown = json.loads(capsys.readouterr().out)
    assert {check["state"] for check in shown} == {"ok", "wrong"}
    assert all(check["remedy"] for check in shown if check["state"] == "wrong")


def test_without_a_plan_this_machine_and_ray_are_looked_at(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "btm_cluster", "doctor", "--json"]
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    names = {check["name"] for check in json.loads(done.stdout)}
    assert {"Ray", "working directory", "disk", "GPU", "threads"} <= {
        name.partition(" on ")[0] for name in names
    }


class _Refuses(BaseHTTPRequestHandler):
    """A dashboard that answers while the agent that starts jobs is dead."""

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "c", "session_name": "s"}
        self._answer(200, json.dumps(version if self.path.endswith("version") else []).encode())

    def do_POST(self) -> None:
        self._answer(500, b"No available agent to submit job, please try again later.")

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _IsNone(_Refuses):
    """A service that is no dashboard."""

    def do_GET(self) -> None:
        self._answer(200, b"<html>")


@pytest.mark.parametrize(
    ("service", "named", "found"),
    [(_Refuses, "jobs", "No available agent to submit job"), (_IsNone, "Ray", "http://127.0.0.1")],
)
def test_a_cluster_that_takes_no_job_is_found_out(
    service: type[BaseHTTPRequestHandler], named: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ray on a machine, whose agent found its port taken, passed every other check."""
    monkeypatch.setattr("btm_cluster.workers.on_ray.examination.JOB_SECONDS", 0)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), service) as server:
        threading.Thread(target=server.serve_forever).start()
        checks, _ = examine_cluster(f"http://127.0.0.1:{server.server_port}", None, [], autoscaling=False)
        server.shutdown()
    wrong = only_wrong(checks)
    assert wrong.name == named
    assert found in wrong.found
    assert wrong.remedy


def test_the_memory_of_gpus_is_told_and_what_cannot_fit_is_wrong_unless_the_cluster_grows() -> None:
    how = Resources(1, 1.0, 1, 8, "bfloat16", True)
    training = TrainingMemory(size_for({"model_type": "gpt2"}), how, 16, 1024, is_expert=True)
    demands = [
        Demand("seed", Resources(1, 0, 1, 8, "float32", False)),
        Demand("an expert", how, memory=training),
    ]
    peak = training.memory(None).peak
    (unseen,) = judge_memory(demands, None, may_grow=False)
    assert (unseen.name, unseen.state) == ("memory of an expert", "ok")
    assert unseen.found.endswith("; no GPU was looked at")
    assert [judge_memory(demands, 2 * peak, may_grow)[0].state for may_grow in (False, True)] == ["ok", "ok"]
    (wrong,) = judge_memory(demands, peak // 2, may_grow=False)
    assert wrong.state == "wrong"
    assert "cluster.micro_batch_blocks" in wrong.remedy
    assert judge_memory(demands, peak // 2, may_grow=True)[0].state == "note"
