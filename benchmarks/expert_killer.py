"""A lost machine in the middle of a run, and how to tell that its forest is the same."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from run_timeline import parse_line


@dataclass
class ExpertKiller:
    """Kills the process of a training once one of the experts is half way."""

    domains: set[str]
    run: psutil.Process
    """The run's own process: trainings of other runs on this machine are let live."""
    killed: str | None = None

    def look(self, line: str, seconds: float) -> None:
        """Takes a line of a run's progress, and the seconds since the run began."""
        said = parse_line(seconds, line)
        if self.killed or said is None or said.label not in self.domains or said.is_last:
            return
        if said.update is None or said.last is None or said.update < said.last / 2:
            return
        for process in self.run.children(recursive=True):
            with suppress(psutil.Error):  # ended meanwhile
                if not " ".join(process.cmdline()).startswith("ray::Trainer.train"):
                    continue
                process.kill()
                self.killed = (
                    f"process {process.pid} after {seconds:.0f} s, {said.label} at update {said.update}"
                )
                return


def experts_hash(store: Path) -> str:
    """A hash of the weights of all experts of the newest version of a forest of fewer than 64, in a folder."""
    newest = max(store.glob("forest/*.json"))
    experts = json.loads(newest.read_text(encoding="utf-8"))["body"]["experts"]
    named = sorted((expert["domain"], expert["weights_sha256"]) for expert in experts)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
