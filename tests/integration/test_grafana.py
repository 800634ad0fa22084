"""deploy/grafana, checked by Prometheus' own tool: the configurations, the alerts on
staged series, every panel's query."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dict(json.loads((GRAFANA / "dashboard.json").read_text()))


def promtool(*arguments: str) -> str:
    """What it prints; fails where it finds fault."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: apt-get install -y --no-install-recommends prometheus")
    done = subprocess.run(["promtool", *arguments], cwd=GRAFANA, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_alert_fires_on_its_staged_cause_and_on_none_of_its_healthy_neighbours() -> None:
    promtool("test", "rules", "alerts_test.yml")
    rules = yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"][0]["rules"]
    staged = yaml.safe_load((GRAFANA / "alerts_test.yml").read_text())["tests"]
    fire = {case["alertname"]: case["exp_alerts"] for test in staged for case in test["alert_rule_test"]}
    assert fire.keys() == {rule["alert"] for rule in rules}
    assert all(fire.values())


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-kubernetes.yml"])
def test_prometheus_accepts_its_configuration(name: str) -> None:
    promtool("check", "config", name)


def test_every_panel_asks_what_prometheus_can_parse(dashboard: dict[str, Any], tmp_path: Path) -> None:
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    assert {name for query in queries for name in re.findall(r"\$(\w+)", query)} <= names
    plain = [query.replace("$__rate_interval", "1m") for query in queries]
    rules = [{"record": f"panel{i}", "expr": query} for i, query in enumerate(plain)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "panels.yml"))


def test_panels_are_named_explained_apart_and_read_from_the_dashboards_source(
    dashboard: dict[str, Any],
) -> None:
    panels = dashboard["panels"]
    assert {"uid", "title", "schemaVersion", "templating", "time", "panels"} <= dashboard.keys()
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"]
        assert panel["type"] in ("stat", "timeseries")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
    for one, other in itertools.combinations((panel["gridPos"] for panel in panels), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart_x or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
