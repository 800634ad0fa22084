"""What becomes of an exception that a step raised on Ray."""

import pickle

import pytest
from ray.exceptions import RayTaskError

from btm_cluster.errors import BtmError, DivergedError, IntegrityError, TrainingError
from btm_cluster.workers.on_ray.failures import failure_of


@pytest.mark.parametrize(
    "cause", [DivergedError("not finite"), TrainingError("no room"), IntegrityError("other bytes")]
)
def test_only_a_training_that_diverged_is_a_failure_that_says_so(cause: BtmError) -> None:
    cause = pickle.loads(pickle.dumps(cause))  # as Ray carries it
    found = failure_of("legal", RayTaskError("train", "…", cause), 1, "node-1", "")
    assert found.has_diverged == isinstance(cause, DivergedError)
    assert found.cause == str(cause)
