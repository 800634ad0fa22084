"""The memory of the GPUs of a cluster's nodes, and the refusal of trainings that none of them can hold."""

import logging
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from btm_cluster.driver.capacity import Demand, memory_problem
from btm_cluster.errors import one_line
from btm_cluster.workers.nvidia import gpu_bytes

log = logging.getLogger(__name__)
LOOK_SECONDS = 60.0
"""Longest wait for the nodes; those that do not answer by then are not asked."""


def check_gpu_memory(demands: Sequence[Demand]) -> None:
    """Refuses trainings that no GPU of the cluster has the memory for.

    Raises:
        ResourcesError: naming both, and the nearest setting that fits.
    """
    if all(demand.memory is None for demand in demands):
        return
    largest = _largest_of_nodes()
    for demand in demands:
        if problem := memory_problem(demand, largest):
            raise problem


def _largest_of_nodes() -> int | None:
    """Memory of the largest GPU of the cluster's nodes, as far as these answer; None where none does."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(gpu_bytes)
    looks = []
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("GPU", 0):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            looks.append(task.options(scheduling_strategy=there, name="memory of GPUs").remote())
    done, late = ray.wait(looks, num_returns=len(looks), timeout=LOOK_SECONDS) if looks else ([], [])
    for look in late:
        ray.cancel(look)
    found: list[int | None] = []
    for look in done:
        try:
            found.append(ray.get(look))
        except ray.exceptions.RayError as exc:
            log.warning("a node does not say how much memory its GPUs have: %s", one_line(exc))
    return max(filter(None, found), default=None)
