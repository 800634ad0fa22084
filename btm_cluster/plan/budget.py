"""The part of a plan that bounds what its trainings may cost."""

from collections.abc import Iterator

from btm_cluster.plan.broken_rules import Broken, Given, is_given, numbers_of, section_of
from btm_cluster.plan.section import Section
from btm_cluster.plan.values import PositiveReal


class BudgetPlan(Section):
    """Limits on the total cost of all commands with this store, by their timelines in the store.

    Once it is spent, trainings save and the run stops. Raise it, and the same command goes on from there. It is
    no part of an identity.
    """

    gpu_hours: PositiveReal | None = None
    """GPUs that steps hold, or shares of one, times hours."""
    cpu_hours: PositiveReal | None = None
    """CPUs that steps hold, times hours."""
    money: PositiveReal | None = None
    """The same as `gpu_hours` at `cluster.price_per_gpu_hour`, in its currency."""


def budget_rules(given: Given) -> Iterator[Broken]:
    """Rules of the whole plan: money has a price, and what is bounded is spent."""
    budget, cluster = section_of(given, "budget"), section_of(given, "cluster")
    if is_given(budget.get("money")) and not is_given(cluster.get("price_per_gpu_hour")):
        expected = "a price: `cluster.price_per_gpu_hour`"
        yield Broken(
            "budget.money", f"{budget['money']} and no price", expected, "add it, or give `gpu_hours`"
        )
    gpus = numbers_of(cluster, seed_gpus=0, gpus_per_expert=0)
    if gpus is None:
        return
    for name in ("gpu_hours", "money"):
        if is_given(budget.get(name)) and not any(gpus):
            expected = "nothing, since nothing is trained on GPUs"
            yield Broken(f"budget.{name}", str(budget[name]), expected, "give `cpu_hours` instead")
