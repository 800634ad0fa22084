"""Live progress of the steps of a run: a line for each at a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from btm_cluster.errors import OutputError
from btm_cluster.requests.progress import Progress

PLAIN_SECONDS = 10.0


class ProgressView:
    """Shows progress: a live line per label at a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._latest: dict[str, Progress] = {}
        self._said: dict[str, tuple[str, float]] = {}
        is_live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, refresh_per_second=4, transient=True) if is_live else None

    def __enter__(self) -> "ProgressView":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        self._latest[progress.label] = progress
        if self._live:
            self._live.update(self._table())
            return
        phase, said = self._said.get(progress.label, ("", 0.0))
        is_last = progress.phase == "training" and progress.update == progress.last_update
        if phase != progress.phase or time.monotonic() - said >= PLAIN_SECONDS or is_last:
            self._said[progress.label] = (progress.phase, time.monotonic())
            self._say(" ".join(filter(None, _columns(progress))))

    def _say(self, line: str) -> None:
        try:
            self._console.print(line, soft_wrap=True)
        # A run is worth more than its progress; the verdict says that nothing can be written.
        except OutputError:
            self._console.quiet = True

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for _ in range(7):
            table.add_column(no_wrap=True)
        for progress in list(self._latest.values())[-20:]:
            table.add_row(*_columns(progress))
        return table


def _columns(progress: Progress) -> list[str]:
    counted = progress.last_update > progress.first_update
    rate = progress.tokens_per_second
    return [
        f"{progress.label}:",
        progress.phase,
        f"update {progress.update}/{progress.last_update}" if counted and progress.loss is not None else "",
        f"loss {progress.loss:.3f}" if progress.loss is not None else "",
        f"{rate:,.0f} tokens/s" if rate else "",
        _time_left(progress),
        f"checkpoint: stalled {progress.stall_seconds:.1f} s, stored in {progress.upload_seconds:.1f} s"
        if progress.stall_seconds is not None and progress.upload_seconds is not None
        else "",
    ]


def _time_left(progress: Progress) -> str:
    if not progress.seconds_left:
        return ""
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"
