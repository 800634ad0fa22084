"""Grow a forest on the cluster that runs this job.

ray job submit --working-dir . -- python jobs/grow_forest.py plan.yaml

Stopping the job saves first, if it gets the time: set RAY_JOB_STOP_WAIT_TIME_S in the job's environment variables.
"""

import sys
from pathlib import Path

from btm_cluster.cli import grow_forest, run_command
from btm_cluster.errors import UserError
from btm_cluster.plan import read_plan


def main() -> None:
    """Like `btm run PLAN --address auto`."""
    if len(sys.argv) != 2:
        raise UserError("grow_forest.py takes one argument", expected="the plan, a YAML file")
    plan = read_plan(Path(sys.argv[1]))
    grow_forest(plan, json_output=False, address="auto", in_process=False, dashboard=False, evaluate_only=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
