"""TensorBoard's event files, which lie in the store."""

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from btm_cluster.errors import StoreError
from btm_cluster.ledger.timelines import run_key
from btm_cluster.storage import Storage
from btm_cluster.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
STORE_SECONDS = 60.0
"""Between two times that TensorBoard's files are stored."""
LAST_SECONDS = 30.0
"""How long the end of a run waits for them, where the store is out."""


class TensorBoard:
    """Event files, a folder for each training, written here and stored under `logs/` now and then."""

    def __init__(self, storage: Storage, run: str) -> None:
        self._storage, self._run = storage, run
        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(scratch_folder())
        self._writers: dict[str, Any] = {}
        self._stored: dict[Path, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._store_now_and_then, daemon=True, name="curves")
        self._thread.start()

    def log(self, label: str, update: int, values: dict[str, float]) -> None:
        writer = self._writer(label)
        for name, value in values.items():
            writer.add_scalar(name, value, update)

    def finish(self, verdict: Sequence[Mapping[str, Any]], report: Path | None) -> None:  # noqa: ARG002
        """The verdict as a text beside the trainings' folders; the report lies there already."""
        self._writer("").add_text("verdict", markdown_table(verdict))

    def close(self, ended_well: bool) -> None:  # noqa: ARG002 - a curve's end says it
        self._ended.set()
        self._thread.join(LAST_SECONDS)
        self._scratch.close()

    def _writer(self, folder: str) -> Any:
        if folder not in self._writers:
            from tensorboardX import SummaryWriter

            self._writers[folder] = SummaryWriter(str(self._folder / folder), write_to_disk=True)
        return self._writers[folder]

    def _store_now_and_then(self) -> None:
        while not self._ended.wait(STORE_SECONDS):
            for writer in list(self._writers.values()):
                writer.flush()
            self._store()
        for writer in self._writers.values():
            writer.close()  # only this waits for points that are still on their way to the file
        self._store()

    def _store(self) -> None:
        for file in self._folder.rglob("*"):
            if file.is_file() and self._stored.get(file) != file.stat().st_size:
                size = file.stat().st_size
                try:
                    self._storage.upload(run_key(self._run, file.relative_to(self._folder).as_posix()), file)
                except StoreError as exc:
                    log.warning("curves were not stored, the next time tries again: %s", exc)
                    return
                self._stored[file] = size


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns as a table in Markdown."""
    columns = list(rows[0]) if rows else []
    cells = [columns, ["---"] * len(columns), *([_cell(row[name]) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
