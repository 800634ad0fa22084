"""Devices of the machines, as far as a preview of a run knows them."""

from dataclasses import dataclass

from btm_cluster.requests import Resources


@dataclass(frozen=True)
class Room:
    """The GPUs and CPUs that trainings share; None where they are not known."""

    name: str
    """Its place, in words."""
    gpus: float | None = None
    cpus: float | None = None
    gpu: str | None = None
    """The name of its GPUs."""
    gpu_bytes: float | None = None
    """Memory of the largest of them."""

    def share(self, how: Resources, at_once: int) -> float:
        """The part of it that a group takes; where it is not known, there is room for so many at once."""
        there = self.gpus if how.gpus_per_worker else self.cpus
        return devices(how) / there if there else 1 / max(at_once, 1)


SOME_CLUSTER = Room("where all experts train at once")
"""Machines that nobody has looked at."""


def devices(how: Resources) -> float:
    """GPUs of a group, or its CPUs where it has none."""
    return how.workers * (how.gpus_per_worker or how.cpus_per_worker)
