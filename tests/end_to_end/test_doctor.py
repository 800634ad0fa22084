"""`btm doctor` and what keeps it out of a cluster. What it finds in one: test_local_cluster.py."""

import json
import subprocess
from pathlib import Path

from tests.end_to_end.conftest import BIN


def test_a_token_that_is_missing_or_wrong_is_named_so(cluster: dict[str, str], tmp_path: Path) -> None:
    nobody = {name: value for name, value in cluster.items() if name != "RAY_AUTH_TOKEN"} | {"HOME": str(tmp_path)}
    code, checks, err = ask(nobody)
    assert code == 2, err
    ray = next(check for check in checks if check["name"] == "Ray")
    assert "no authentication token was found" in ray["found"]
    assert "RAY_AUTH_TOKEN" in ray["remedy"]
    wrong_token = {"RAY_ADDRESS": cluster["DASHBOARD"], "RAY_AUTH_TOKEN": "another-token-0123456789abcdef00"}
    code, checks, err = ask(cluster | wrong_token)
    assert [check["name"] for check in checks if check["state"] == "wrong"] == ["token"], checks
    assert "Traceback" not in err


def test_a_sound_cluster_takes_the_doctors_job(cluster: dict[str, str]) -> None:
    _, checks, err = ask(cluster)
    jobs = next(check for check in checks if check["name"] == "jobs")
    assert jobs["state"] == "ok", (jobs, err)


def ask(environment: dict[str, str], *arguments: str) -> tuple[int, list[dict[str, str]], str]:
    """Exit code, checks and standard error of `btm doctor --json`."""
    command = [str(BIN / "btm"), "doctor", "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr
