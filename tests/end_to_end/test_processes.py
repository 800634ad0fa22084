"""Which processes do the work on a cluster that has room: started before their turn, and used again."""

import json
import subprocess
from pathlib import Path

from btm_cluster.forest import Forest
from tests.end_to_end.conftest import BIN, BTM, experts_in, plain, ray_head, starting


def test_trainings_get_ready_while_their_inputs_are_made_and_trainers_score_other_models_too(
    tmp_path: Path, long_plan: Path, undisturbed: Forest
) -> None:
    with ray_head(tmp_path, "--port=0", cpus=5) as cluster, starting(cluster, tmp_path, BTM) as btm:
        run = btm("run", long_plan)
        assert run.exit_code() == 0, run.said
        calls = _tasks(cluster)
    said = run.said
    assert experts_in(tmp_path / "store") == plain(undisturbed)
    for domain in undisturbed.domains:
        assert said.index(f"{domain}: warming up") < said.index("seed: storing"), said
    trained = calls.count("Trainer.train")
    assert trained == 1 + len(undisturbed.domains)
    assert calls.count("Trainer.score") > trained, calls


def _tasks(cluster: dict[str, str]) -> list[str]:
    """Names of all tasks and calls of actors that the cluster remembers.

    On a busy machine it may not answer at once.
    """
    command = [str(BIN / "ray"), "list", "tasks", "--format", "json", "--limit", "10000", "--timeout", "120"]
    listed = subprocess.run(command, env=cluster, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stderr
    return [task["name"] for task in json.loads(listed.stdout)]
