"""The short campaign; `make chaos SEEDS=100` is the long one, and docs/operations/measurements.md has its results."""

import shutil

import pytest

from tests.faults.campaign import campaign

SEEDS = (20,)  # a trainer is killed, a machine is lost, the store goes out


def test_a_forest_grows_to_the_very_same_whatever_fails_meanwhile() -> None:
    if shutil.which("radosgw") is None:
        pytest.skip("radosgw is not installed: see tests/start-radosgw")
    with campaign() as running:
        outcomes = [running.run(seed) for seed in SEEDS]
    assert all(outcome.is_right for outcome in outcomes), outcomes
    assert sum(outcome.faults for outcome in outcomes) > 0
