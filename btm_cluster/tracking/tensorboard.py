"""TensorBoard's event files, which lie in the store."""

import logging
import os
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from btm_cluster.errors import StoreError
from btm_cluster.ledger.records import LOGS
from btm_cluster.storage import Storage
from btm_cluster.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
STORE_SECONDS = 60.0
"""Between two times that TensorBoard's files are stored."""
LAST_SECONDS = 30.0
"""How long the end of a run waits for them, where the store is out."""


class TensorBoard:
    """Event files, a folder for each training, written here and stored under `logs/` now and then."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{socket.gethostname()}-{os.getpid()}"
        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(scratch_folder())
        self._writers: dict[str, Any] = {}
        self._stored: dict[Path, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._store_now_and_then, daemon=True, name="curves")
        self._thread.start()

    def log(self, label: str, update: int, values: dict[str, float]) -> None:
        if label not in self._writers:
            from tensorboardX import SummaryWriter

            self._writers[label] = SummaryWriter(str(self._folder / label), write_to_disk=True)
        for name, value in values.items():
            self._writers[label].add_scalar(name, value, update)

    def close(self, ended_well: bool) -> None:  # noqa: ARG002 - a curve's end says it
        self._ended.set()
        self._thread.join(LAST_SECONDS)
        self._scratch.close()

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
                    self._storage.upload(
                        f"{LOGS}{self._run}/{file.relative_to(self._folder).as_posix()}", file
                    )
                except StoreError as exc:
                    log.warning("curves were not stored, the next time tries again: %s", exc)
                    return
                self._stored[file] = size
