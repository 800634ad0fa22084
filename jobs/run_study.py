"""Run a study on the cluster that runs this job.

ray job submit --working-dir . -- python jobs/run_study.py plan.yaml s3://bucket/results
"""

import sys
from pathlib import Path

from btm_cluster.cli import run_command, run_study_plan
from btm_cluster.errors import UserError
from btm_cluster.plan import read_plan


def main() -> None:
    """Like `btm study PLAN --to PLACE --address auto`."""
    if len(sys.argv) != 3:
        raise UserError("run_study.py takes two arguments", expected="the plan, and a place for the results")
    run_study_plan(read_plan(Path(sys.argv[1])), sys.argv[2], address="auto", in_process=False, dashboard=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
