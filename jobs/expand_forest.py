"""Add to a forest what has arrived, on the cluster that runs this job: for a schedule.

ray job submit --working-dir . -- python jobs/expand_forest.py plan.yaml

With nothing to add it ends in seconds and asks the cluster for nothing. Two at once are safe: one waits for the other.
"""

import sys
from pathlib import Path

from btm_cluster.cli import expand_forest, run_command
from btm_cluster.errors import UserError
from btm_cluster.plan import read_plan


def main() -> None:
    """Like `btm expand PLAN --address auto`."""
    if len(sys.argv) != 2:
        raise UserError("expand_forest.py takes one argument", expected="the plan, a YAML file")
    expand_forest(read_plan(Path(sys.argv[1])), json_output=False, address="auto", in_process=False, dashboard=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
