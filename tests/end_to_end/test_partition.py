"""A machine that is cut off from its cluster, in a network namespace: it lives
on, trains on, and harms nothing."""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.forest import Forest
from btm_cluster.ledger import Ledger
from btm_cluster.operations.verify import verify
from tests.end_to_end.conftest import (
    GROW,
    Btm,
    experts_in,
    plain,
    ray_head,
    ray_node,
    trainers,
    write_prepared,
)
from tests.end_to_end.test_survival import wait_until_an_expert_trains

NOTICED_WITHIN_SECONDS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""How the head finds out; Ray's own times come to a minute."""


class Cable:
    """A network namespace, and the one link that leads to it."""

    def __init__(self) -> None:
        self.name = f"btm{os.getpid()}"
        subnet = f"10.{random.randrange(100, 250)}.{random.randrange(250)}"
        self.here, self.there = f"{subnet}.1", f"{subnet}.2"
        self.inside = ("ip", "netns", "exec", self.name)

    def lay(self) -> None:
        link = ("ip", "link", "add", self.name, "type", "veth", "peer", "name", "far", "netns", self.name)
        for command in (
            link,
            ("ip", "addr", "add", f"{self.here}/24", "dev", self.name),
            ("ip", "link", "set", self.name, "up"),
            (*self.inside, "ip", "addr", "add", f"{self.there}/24", "dev", "far"),
            (*self.inside, "ip", "link", "set", "far", "up"),
            (*self.inside, "ip", "link", "set", "lo", "up"),
        ):
            subprocess.run(command, check=True)

    def cut(self) -> None:
        subprocess.run([*self.inside, "ip", "link", "set", "far", "down"], check=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    """Skips where this user may not make namespaces."""
    cable = Cable()
    try:
        made = subprocess.run(["ip", "netns", "add", cable.name], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `ip`, which makes network namespaces: install iproute2")
    if made.returncode:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
    try:
        cable.lay()
        yield cable
    finally:
        subprocess.run(["ip", "netns", "del", cable.name], check=True)


def test_when_a_machine_is_cut_off_its_expert_goes_on_at_another_though_it_trains_it_too(
    long_fields: dict[str, Any], undisturbed: Forest, tmp_path: Path, cable: Cable
) -> None:
    (tmp_path / "head").mkdir()
    arguments = ("--port=0", "--include-dashboard=false", "--no-monitor", f"--node-ip-address={cable.here}")
    with (
        ray_head(tmp_path / "head", *arguments, cpus=0, **NOTICED_WITHIN_SECONDS) as environment,
        ray_node(environment, 2, f"--node-ip-address={cable.there}", inside=cable.inside) as far,
    ):
        plan = write_prepared(long_fields, undisturbed, tmp_path, experts=1)
        run = Btm([str(plan)], environment, tmp_path / "said", GROW)
        wait_until_an_expert_trains(run)
        assert trainers(far.pid)  # there was no other place
        cable.cut()
        with ray_node(environment, 2, f"--node-ip-address={cable.here}"):
            assert run.exit_code() == 0, run.said
        assert far.poll() is None  # its machine was not lost, only out of reach
    assert experts_in(tmp_path / "store") == plain(undisturbed)
    assert verify(Ledger.open(str(tmp_path / "store"))).problems == ()
