"""A real Prometheus, with the configuration, the alerts and the dashboard
of deploy/grafana, watches real runs."""

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from btm_cluster.driver.preparation import prepare
from btm_cluster.plan import Plan
from tests.conftest import free_port, in_process
from tests.end_to_end.conftest import REPOSITORY, Btm, _wait_for

GRAFANA = REPOSITORY / "deploy" / "grafana"
NEEDS_A_GPU = {"Model FLOPs utilisation"}
LABELS = {"store", "expert", "phase", "step", "verb", "outcome"}
OF_RAY = {"__name__", "job", "instance", "Component", "NodeAddress", "SessionName", "Version", "WorkerId"}


class Prometheus:
    """A Prometheus that runs, and answers."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"
        self._started = time.time()

    def ask(self, path: str, **query: Any) -> Any:
        """What the HTTP API answers."""
        url = f"{self._url}/{path}?{urllib.parse.urlencode(query, doseq=True)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def series(self, expression: str) -> list[Any]:
        """The series of an expression since the start."""
        found = self.ask("query_range", query=expression, start=self._started, end=time.time(), step=1)[
            "result"
        ]
        return list(found)

    def firing(self, alert: str) -> set[str]:
        """The stores that an alert fires for."""
        alerts = [one for one in self.ask("alerts")["alerts"] if one["labels"]["alertname"] == alert]
        return {one["labels"]["store"] for one in alerts if one["state"] == "firing"}


@pytest.fixture
def prometheus(cluster: dict[str, str], tmp_path: Path) -> Iterator[Prometheus]:
    """It scrapes the cluster once a second, and does not wait for half an hour
    before it says that something waits."""
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed: apt-get install -y --no-install-recommends prometheus")
    configuration = (GRAFANA / "prometheus.yml").read_text().replace("15s", "1s")
    (tmp_path / "prometheus.yml").write_text(
        configuration.replace("/tmp/ray/", f"{cluster['SESSION_FOLDER']}/")
    )
    alerts = (GRAFANA / "alerts.yml").read_text().replace("> 1800\n        for: 1m", "> 1\n        for: 1s")
    (tmp_path / "alerts.yml").write_text(alerts)
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/tsdb",
    ]
    with (tmp_path / "prometheus.log").open("w") as log:
        running = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    try:
        _wait_for(lambda: (tmp_path / "prometheus.log").read_text(), lambda said: "ready to receive" in said)
        yield Prometheus(port)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()


def queries() -> dict[str, str]:
    """Each panel's query, for all stores and phases."""
    panels = json.loads((GRAFANA / "dashboard.json").read_text())["panels"]
    shown = {panel["title"]: panel["targets"][0]["expr"] for panel in panels}
    meant = {"$store": ".*", "$phase": ".*", "$__rate_interval": "10s"}
    return {
        title: re.sub("|".join(map(re.escape, meant)), lambda m: meant[m[0]], expr)
        for title, expr in shown.items()
    }


def test_every_panel_shows_a_run_and_a_training_that_waits_raises_its_alert(
    prometheus: Prometheus, grow_only: Callable[[Path], Btm], long_fields: dict[str, Any], tmp_path: Path
) -> None:
    def start(name: str, **cluster: Any) -> Btm:
        fields = long_fields | {"name": name, "store": str(tmp_path / name), "targets": []}
        endless = fields["training"] | {"updates": 2_000_000, "seed_share": 0.0002}
        fields |= {
            "domains": fields["domains"][:1],
            "training": endless,
            "cluster": fields["cluster"] | cluster,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        if name == "waits":  # for a GPU alone
            plan = Plan.model_validate(fields)
            prepare(plan, in_process(plan))
        return grow_only(tmp_path / f"{name}.yaml")

    def empty() -> set[str]:
        return {title for title, query in queries().items() if not prometheus.series(query)}

    waits, runs = start("waits", seed_gpus=1, autoscaling=True, stop_grace_seconds=0.1), start("runs")
    _wait_for(
        lambda: str(prometheus.firing("BtmWaitsForResources")), lambda said: str(tmp_path / "waits") in said
    )
    # A query for each panel: asked ten times a second, they took a core.
    _wait_for(lambda: str(empty()), lambda said: said == str(NEEDS_A_GPU), every=1)
    for run in (waits, runs):
        run.process.send_signal(signal.SIGTERM)
        assert run.exit_code() == 130, run.said
    found = prometheus.ask("series", **{"match[]": '{__name__=~"ray_btm_.*"}'})
    # Others may share the cluster.
    ours = [one for one in found if one.get("store", "").startswith(str(tmp_path))]
    assert {label for one in ours for label in one} <= LABELS | OF_RAY
    assert {one["expert"] for one in ours if "expert" in one} == {"seed", "kitchen"}
    assert {one["phase"] for one in ours if "phase" in one} == {"seed", "expert"}
