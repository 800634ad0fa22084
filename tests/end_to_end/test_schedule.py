"""A schedule on one machine: a started Ray cluster with tokens, an S3 server as the
store, and the expansion job, three times."""

import json
import os
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from btm_cluster.algorithm import grow
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.purge import plan_purge, purge
from btm_cluster.operations.remove import remove
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from tests.conftest import in_process
from tests.end_to_end.conftest import BIN, REPOSITORY, Btm
from tests.living import deliver


@pytest.fixture
def store(object_store: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store in a bucket of its own, which keeps versions."""
    for name, value in (object_store | {"BTM_CACHE_FOLDER": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    return f"s3://{bucket}/forest"


def submit(cluster: dict[str, str], variables: dict[str, str], folder: Path, name: str) -> Btm:
    """What a schedule does: submits the job, again while the cluster is not
    ready for one, and waits for it."""
    runtime = json.dumps({"env_vars": variables | {"BTM_CACHE_FOLDER": str(folder / "cache")}})
    entry = ["--", "python", str(REPOSITORY / "jobs" / "expand_forest.py"), "plan.yaml"]
    for attempt in range(20):
        arguments = ["--working-dir", str(folder / "plan"), "--runtime-env-json", runtime]
        log = folder / f"{name}-{attempt}.log"
        job = Btm([*arguments, *entry], cluster, log, (str(BIN / "ray"), "job", "submit"))
        job.wait_until_said("submitted successfully|No available agent", seconds=120)
        if "No available agent" not in job.said:
            return job
        job.exit_code()
    raise AssertionError(job.said)


def trainer_below(folder: Path) -> int:
    """Process id of the one trainer whose job has its cache in a folder: others may train on this machine."""
    named = subprocess.run(["pgrep", "-f", "^ray::Trainer"], capture_output=True, text=True).stdout.split()
    (pid,) = [
        pid for pid in named if os.fsencode(folder / "cache") in Path("/proc", pid, "environ").read_bytes()
    ]
    return int(pid)


@pytest.mark.timeout(600)
def test_three_ticks_of_a_schedule_with_a_new_domain_while_that_still_runs_and_with_none(
    cluster: dict[str, str],
    object_store: dict[str, str],
    store: str,
    long_fields: dict[str, Any],
    tmp_path: Path,
) -> None:
    fields = long_fields | {"store": store, "domains": long_fields["domains"][:1], "targets": []}
    plan = Plan.model_validate(
        fields | {"training": fields["training"] | {"seed_share": 0.1, "updates": 800}}
    )
    founded = grow(plan, in_process(plan)).forest
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.yaml").write_text(
        yaml.safe_dump(plan.model_dump(mode="json")), encoding="utf-8"
    )
    ledger = Ledger.open(store)
    deliver(ledger, tmp_path, "meadow")

    first = submit(cluster, object_store, tmp_path, "tick-1")
    first.wait_until_said("meadow: (starting|training)", seconds=240)
    trainer = trainer_below(tmp_path)
    os.kill(trainer, signal.SIGSTOP)
    try:
        second = submit(cluster, object_store, tmp_path, "tick-2")
        second.wait_until_said("meadow: waiting for another driver, which trains it", seconds=240)
    finally:
        os.kill(trainer, signal.SIGCONT)
    assert (first.exit_code(), second.exit_code()) == (0, 0), first.said + second.said
    assert "added meadow (development perplexity" in first.said
    assert "forest version 2, 2 experts" in second.said

    third = submit(cluster, object_store, tmp_path, "tick-3")
    assert third.exit_code() == 0, third.said
    assert "steps run (and reused): none\nnothing was added: forest version 2, 2 experts" in third.said

    forest = ledger.log.newest()
    assert forest is not None
    assert ledger.log.versions() == [0, 1, 2]
    assert forest.expert("kitchen") == founded.expert("kitchen")
    experts = [model for model in ledger.list_artifacts("model") if model.facts.get("role") == "expert"]
    assert sorted(model.identity for model in experts) == sorted(expert.identity for expert in forest.experts)

    meadow = forest.expert("meadow")
    remove(ledger, "meadow")
    purge(ledger, plan_purge(ledger, "meadow"))
    listed = boto3.client("s3").list_object_versions(Bucket=store.split("/")[2])
    assert not listed["IsTruncated"]
    keys = {version["Key"] for version in (*listed["Versions"], *listed.get("DeleteMarkers", ()))}
    traces = ("meadow", meadow.identity, meadow.text, meadow.weights_sha256)
    assert {key for key in keys if any(trace in key for trace in traces)} == {
        f"forest/tombstones/{kind}/{identity}.json"
        for kind, identity in (("text", meadow.text), ("model", meadow.identity))
    }
    assert not (tmp_path / "cache" / "files" / meadow.weights_sha256).exists()
    assert verify(ledger).problems == ()
