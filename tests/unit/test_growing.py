"""The main job in one process, on tiny real models."""

from typing import Any

from btm_cluster.algorithm import grow
from btm_cluster.plan import Plan
from btm_cluster.run import run_plan
from tests.conftest import DOMAINS, in_process


def test_a_run_grows_an_expert_for_each_domain_and_running_it_again_makes_nothing(plan: Plan) -> None:
    first = run_plan(plan, in_process(plan))
    assert first.forest.domains == tuple(sorted(DOMAINS))
    again = run_plan(plan, in_process(plan))
    assert again.forest == first.forest
    assert not again.made


def test_a_domain_added_later_branches_from_the_posterior_average_and_the_others_stay(fields: dict[str, Any]) -> None:
    fields["domains"], later = fields["domains"][:2], fields["domains"]
    plan = Plan.model_validate(fields)
    before = grow(plan, in_process(plan)).forest
    plan = Plan.model_validate(fields | {"domains": later})
    after = grow(plan, in_process(plan)).forest
    assert after.version == before.version + 1
    assert [e for e in after.experts if e.domain in before.domains] == list(before.experts)
    added = after.expert(DOMAINS[2])
    assert {parent.identity for parent in added.parents} <= {e.identity for e in before.experts}
    assert abs(sum(parent.weight for parent in added.parents) - 1) < 1e-9
