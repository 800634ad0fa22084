"""A driver that stores each model only once another has trained it too:
`racing_driver PLAN MEETING-FOLDER 0|1`.

Prints the hashes of its forest's experts.
"""

import json
import sys
import threading
import time
from pathlib import Path

from btm_cluster.algorithm import grow
from btm_cluster.driver.driver import Driver
from btm_cluster.ledger import Ledger
from btm_cluster.plan import Plan
from btm_cluster.requests.progress import Progress
from btm_cluster.workers.in_process import InProcess, LocalControl


def main(plan_path: str, meeting: Path, me: int) -> None:
    def meet(progress: Progress) -> None:
        if progress.phase == "storing":
            (meeting / f"{progress.label}-{me}").touch()
            while not (meeting / f"{progress.label}-{1 - me}").exists():
                time.sleep(0.01)

    plan = Plan.model_validate_json(Path(plan_path).read_text())
    ledger = Ledger.open(plan.store)
    forest = grow(plan, Driver(ledger, InProcess(ledger, LocalControl(meet, threading.Event())))).forest
    print(json.dumps([expert.weights_sha256 for expert in forest.experts]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
