"""`btm doctor` and what keeps it out of a cluster. What it finds in one: test_local_cluster.py."""

import json
from pathlib import Path

from tests.end_to_end.conftest import BTM
from tests.forked import run_forked


def test_a_token_that_is_missing_or_wrong_is_named_so(cluster: dict[str, str], tmp_path: Path) -> None:
    nobody = {name: value for name, value in cluster.items() if name != "RAY_AUTH_TOKEN"} | {
        "HOME": str(tmp_path)
    }
    code, checks, err = ask(nobody, tmp_path)
    assert code == 2, err
    ray = next(check for check in checks if check["name"] == "Ray")
    assert "no authentication token was found" in ray["found"]
    assert "RAY_AUTH_TOKEN" in ray["remedy"]
    wrong_token = {"RAY_ADDRESS": cluster["DASHBOARD"], "RAY_AUTH_TOKEN": "another-token-0123456789abcdef00"}
    code, checks, err = ask(cluster | wrong_token, tmp_path)
    assert [check["name"] for check in checks if check["state"] == "wrong"] == ["token"], checks
    assert "Traceback" not in err


def test_a_sound_cluster_takes_the_doctors_job(cluster: dict[str, str], tmp_path: Path) -> None:
    _, checks, err = ask(cluster, tmp_path)
    jobs = next(check for check in checks if check["name"] == "jobs")
    assert jobs["state"] == "ok", (jobs, err)


def ask(environment: dict[str, str], folder: Path) -> tuple[int, list[dict[str, str]], str]:
    """Exit code, checks and standard error of `btm doctor --json`."""
    done = run_forked(BTM, ["doctor", "--json"], environment, folder)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr
