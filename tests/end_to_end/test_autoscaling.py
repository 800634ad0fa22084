"""Ray's own autoscaler, with the provider of nodes on this machine that Ray ships for its own tests."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DOMAINS
from tests.end_to_end.conftest import GROW, Btm, experts_in, ray_head

FIXED_PORT = 6379
"""Where that provider's nodes look for their head."""
HEAD_NODE_ID = 51 * "f" + 5 * "0"
"""What it calls the head; importing it from there would give this very process that name."""
_UNUSED_LISTS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")  # fmt: skip


@pytest.fixture
def growing_cluster(tmp_path: Path) -> Any:
    """A head with two CPUs, and an autoscaler that may add one node with four."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", FIXED_PORT)) == 0:
            pytest.skip(f"port {FIXED_PORT}, which Ray's provider of local nodes insists on, is taken")
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    node_types = {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "four-cpus": {"resources": {"CPU": 4}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    }
    configuration = {
        "cluster_name": "growing",
        "max_workers": 1,
        "provider": {"type": "external", "module": provider, "head_node_id": HEAD_NODE_ID},
        "available_node_types": node_types,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    } | {name: [] for name in _UNUSED_LISTS}
    (tmp_path / "autoscaler.yaml").write_text(json.dumps(configuration), encoding="utf-8")
    arguments = (
        f"--port={FIXED_PORT}",
        "--include-dashboard=false",
        f"--autoscaling-config={tmp_path}/autoscaler.yaml",
    )
    variables = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",
    }
    with ray_head(tmp_path, *arguments, **variables) as environment:
        yield environment


def test_an_ask_that_only_another_node_can_meet_waits_until_rays_autoscaler_has_added_it(
    growing_cluster: dict[str, str],
    fields: dict[str, Any],
    write_plan: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    fields |= {"domains": fields["domains"][:1], "targets": []}
    fields["cluster"] |= {"seed_cpus": 4, "autoscaling": True}
    run = Btm([str(write_plan(fields))], growing_cluster, tmp_path / "said", GROW)
    assert run.exit_code() == 0, run.said
    assert "seed: waiting for the cluster to grow to 1 worker(s) with 4 CPU, 0 GPU each" in run.said
    assert set(experts_in(Path(fields["store"]))) == {DOMAINS[0]}
