"""A search by Ray Tune on a real cluster, with made-up perplexities: its ASHA stops trials, and its table shows them."""

from collections.abc import Callable
from typing import Any

import pytest
from ray.tune.utils.log import set_verbosity

from btm_cluster.errors import StepError
from btm_cluster.ledger import Ledger
from btm_cluster.plan import SearchPlan
from btm_cluster.workers.on_ray.lazily import LazyRayWorkers

SPACE = SearchPlan.model_validate(
    {
        "learning_rate": {"loguniform": [1e-4, 1e-2]},
        "blocks_per_domain_update": {"grid": [8, 16]},
        "samples": 2,
        "at_once": 2,
        "first_rung": 0.25,
        "reduction_factor": 2,
    }
)


def test_tune_draws_trials_stops_those_that_lose_and_shows_its_table(
    connect: Callable[..., LazyRayWorkers], tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    set_verbosity(1)  # as an earlier search leaves it in the process
    shown: list[str] = []
    with connect(Ledger.open(str(tmp_path / "store")), lambda _: None, None) as workers:
        with workers.open_search(SPACE, shown.append) as search:
            first = search.under_way()
            assert [first[number]["blocks_per_domain_update"] for number in (1, 2)] == [8, 16]
            assert all(1e-4 <= one["learning_rate"] <= 1e-2 for one in first.values())
            search.tell(1, 0.25, 30.0)  # the first of a rung goes on
            search.tell(2, 0.25, None)  # diverged: no result at all
            assert sorted(search.under_way()) == [1, 3], "the place of what ended is taken"
            search.tell(3, 0.25, 40.0)  # worse than half of what is known
            assert sorted(search.under_way()) == [1, 4]
            search.tell(4, 0.25, 20.0)  # better than all
            search.tell(1, 0.5, 25.0)
            search.tell(4, 0.5, 26.0)
            assert sorted(search.under_way()) == [1]
            search.tell(1, 1.0, 24.0)
            assert not search.under_way()
        assert shown[-1] == ""
        assert "Number of trials: 4/4" in "".join(shown)
        assert "trial-4" in "".join(shown)
        with workers.open_search(SPACE, shown.append) as again:
            assert again.under_way() == first, "the same draws"
            again.hear("failed", 1, {"cause": "trial-1: its process failed"})
            with pytest.raises(StepError, match="the same command goes on"):
                again.tell(2, 0.25, 30.0)
    assert capfd.readouterr().out == "", "standard output is kept for results"
