"""Ray on this machine: what deploy/local starts is whole, and it stops all of it; what a run starts lets
trainings save."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.conftest import BIN, BTM, REPOSITORY, starting
from tests.forked import run_forked

LOCAL = REPOSITORY / "deploy" / "local"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment that it wrote, as `source` would set it."""
    start = [LOCAL / "start", tmp_path / "cluster", "1"]
    subprocess.run(start, env=os.environ | {"BIN": str(BIN)}, check=True, capture_output=True)
    try:
        written = (tmp_path / "cluster" / "environment").read_text()
        pairs = re.findall(r"(\w+)=(\S+)", written)
        yield os.environ | {name: value for name, value in pairs if name != "PATH"}
    finally:
        pids = [int(file.read_text()) for file in (tmp_path / "cluster" / "pids").iterdir()]
        subprocess.run([LOCAL / "stop", tmp_path / "cluster"], check=True)
        assert not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]
        assert not (tmp_path / "cluster" / "environment").exists()


def test_the_doctor_looks_at_the_local_cluster_and_its_store_and_names_the_one_ask_that_cannot_be_met(
    started: dict[str, str], fields: dict[str, Any], tmp_path: Path
) -> None:
    if "AWS_ENDPOINT_URL_S3" not in started:
        pytest.skip("radosgw is not installed: see tests/start-radosgw")
    plan = tmp_path / "plan.yaml"
    fields["cluster"] |= {"seed_gpus": 4}
    plan.write_text(yaml.safe_dump(fields | {"store": "s3://forests/tiny"}))
    done = run_forked(BTM, ["doctor", str(plan), "--json"], started, tmp_path)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 2
    assert [name for name, check in checks.items() if check["state"] != "ok"] == ["capacity for the seed"], (
        checks
    )
    assert "2 node(s)" in checks["Ray"]["found"]
    assert {
        "token",
        "store, conditional create",
        "store from a node",
        "clock",
        "disk",
        "GPU",
        "threads",
    } <= checks.keys()
    assert (tmp_path / "cluster" / "environment").stat().st_mode & 0o077 == 0


def test_a_signal_to_the_whole_process_group_lets_trainings_save_like_one_to_the_run_alone(
    long_plan: Path, tmp_path: Path
) -> None:
    """`timeout` and `scancel` signal all of a group. The Ray that the run had started ended at once, and the run,
    a minute later, with nothing saved."""
    with starting(dict(os.environ), tmp_path, ["setsid", str(BIN / "btm")]) as start:
        run = start("run", long_plan)
        run.wait_until_said(r"seed: training update [1-9]")
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.exit_code() == 130, run.said
    assert "trainings under way: seed at update" in run.said
