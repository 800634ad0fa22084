"""Grow a forest on the cluster that runs this job.

ray job submit --working-dir . -- python jobs/grow_forest.py plan.yaml

Stopping the job saves first, if it gets the time: set RAY_JOB_STOP_WAIT_TIME_S in the job's environment
variables. With --new-resources trainings go on from their checkpoints with the plan's resources, and not with
those of their start.
"""

import sys
from pathlib import Path

from btm_cluster.stopping import end_at_signals, end_with

NEW_RESOURCES = "--new-resources"


def main() -> None:
    """Like `btm run PLAN --address auto`."""
    from btm_cluster.commands.run import run
    from btm_cluster.errors import UserError
    from btm_cluster.terminal.logs import logging_to

    arguments = [argument for argument in sys.argv[1:] if argument != NEW_RESOURCES]
    new_resources = NEW_RESOURCES in sys.argv
    if len(arguments) != 1:
        raise UserError("grow_forest.py takes one argument", expected="the plan, a YAML file")
    with logging_to():
        run(Path(arguments[0]), address="auto", new_resources=new_resources)


if __name__ == "__main__":
    end_at_signals()
    from btm_cluster.cli import run_command

    end_with(run_command(main))
