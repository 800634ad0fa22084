"""Run a study on the cluster that runs this job.

ray job submit --working-dir . -- python jobs/run_study.py plan.yaml s3://bucket/results

With --new-resources trainings go on from their checkpoints with the plan's resources, and not with those of
their start.
"""

import sys
from pathlib import Path

from btm_cluster.stopping import end_at_signals, end_with

NEW_RESOURCES = "--new-resources"


def main() -> None:
    """Like `btm study PLAN --to PLACE --address auto`."""
    from btm_cluster.commands.study import study
    from btm_cluster.errors import UserError
    from btm_cluster.terminal.logs import logging_to

    arguments = [argument for argument in sys.argv[1:] if argument != NEW_RESOURCES]
    new_resources = NEW_RESOURCES in sys.argv
    if len(arguments) != 2:
        raise UserError("run_study.py takes two arguments", expected="the plan, and a place for the results")
    with logging_to():
        study(Path(arguments[0]), arguments[1], address="auto", new_resources=new_resources)


if __name__ == "__main__":
    end_at_signals()
    from btm_cluster.cli import run_command

    end_with(run_command(main))
