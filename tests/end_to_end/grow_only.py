"""`btm run PLAN` without the verdict: grows the forest and stops there.

For tests of what happens meanwhile.
"""

import sys

from btm_cluster.algorithm import grow
from btm_cluster.cli import run_command
from btm_cluster.driver.driver import step_error
from btm_cluster.operations.plan import check_run
from btm_cluster.plan import read_plan
from btm_cluster.session import driving, opened_view
from btm_cluster.terminal.logs import logging_to


def main(path: str) -> None:
    plan = read_plan(path)
    with logging_to(), opened_view() as view, driving(view, plan, "auto", in_process=False) as driver:
        check_run(plan, driver)
        grown = grow(plan, driver)
    if grown.failures:
        raise step_error(grown.failures)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1])))
