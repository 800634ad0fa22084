"""Add to a forest what has arrived, on the cluster that runs this job: for a schedule.

ray job submit --working-dir . -- python jobs/expand_forest.py plan.yaml

With nothing to add it ends in seconds and asks the cluster for nothing. Two at once are safe: one waits for
the other. With --new-resources trainings go on from their checkpoints with the plan's resources, and not with
those of their start.
"""

import sys
from pathlib import Path

from btm_cluster.stopping import end_at_signals, end_with

NEW_RESOURCES = "--new-resources"


def main() -> None:
    """Like `btm expand PLAN --address auto`."""
    from btm_cluster.commands.expand import expand
    from btm_cluster.errors import UserError
    from btm_cluster.terminal.logs import logging_to

    arguments = [argument for argument in sys.argv[1:] if argument != NEW_RESOURCES]
    new_resources = NEW_RESOURCES in sys.argv
    if len(arguments) != 1:
        raise UserError("expand_forest.py takes one argument", expected="the plan, a YAML file")
    with logging_to():
        expand(Path(arguments[0]), address="auto", new_resources=new_resources)


if __name__ == "__main__":
    end_at_signals()
    from btm_cluster.cli import run_command

    end_with(run_command(main))
