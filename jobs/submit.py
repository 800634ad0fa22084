"""Submit a job for a schedule and wait for it: what the pod of deploy/kuberay/expansion-cronjob.yaml runs.

python jobs/submit.py SCHEDULE TICK -- python jobs/expand_forest.py plan.yaml

TICK names this firing of the schedule: with the same one, a restarted submitter takes up the job that the
first one submitted. Ends with the job's exit code. RAY_ADDRESS and RAY_AUTH_TOKEN lead to the cluster.
"""

import os
import shlex
import sys

from btm_cluster.stopping import end_at_signals, end_with

STOP_WAIT_SECONDS = "150"
"""Longer than the plan's cluster.stop_grace_seconds: a job that is stopped saves first."""


def main() -> None:
    """Reads the arguments, submits, waits."""
    from btm_cluster.errors import UserError

    if len(sys.argv) < 5 or sys.argv[3] != "--":
        raise UserError("submit.py cannot be called so", expected="SCHEDULE TICK -- COMMAND …")
    from btm_cluster.workers.on_ray.submission import submit_and_wait

    schedule, tick, _, *command = sys.argv[1:]
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_SECONDS}
    address = os.environ.get("RAY_ADDRESS", "auto")
    sys.exit(
        submit_and_wait(
            address, schedule, tick, shlex.join(command), variables, lambda line: print(line, flush=True)
        )
    )


if __name__ == "__main__":
    end_at_signals()
    from btm_cluster.cli import run_command

    end_with(run_command(main))
