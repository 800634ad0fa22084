"""How things look at a terminal: the live line of each training, and the tables. Knows rich; decides nothing.

Imports no torch, so that what needs none, such as `btm forest show`, answers at once.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table

from btm_cluster.errors import OutputError
from btm_cluster.room import NEW_RESOURCES

if TYPE_CHECKING:
    from btm_cluster.checks import Check
    from btm_cluster.forest import Forest
    from btm_cluster.preview import Preview
    from btm_cluster.report import Cell, Row, Verdict
    from btm_cluster.requests.progress import Progress
    from btm_cluster.run import Run
    from btm_cluster.texts import TextReport

PLAIN_SECONDS = 10.0
MOST_COLUMNS = 100_000
"""Wider than any table."""


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

    def __call__(self, progress: "Progress") -> None:
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
        except OutputError:  # a run is worth more than its progress; the verdict says that nothing can be written
            self._console.quiet = True

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for _ in range(7):
            table.add_column(no_wrap=True)
        for progress in list(self._latest.values())[-20:]:
            table.add_row(*_columns(progress))
        return table


def _columns(progress: "Progress") -> list[str]:
    counted = progress.last_update > progress.first_update
    rate = progress.tokens_per_second
    return [
        f"{progress.label}:",
        progress.phase,
        f"update {progress.update}/{progress.last_update}" if counted and progress.loss is not None else "",
        f"loss {progress.loss:.3f}" if progress.loss is not None else "",
        f"{rate:,.0f} tokens/s" if rate else "",
        _time_left(progress),
        f"checkpoint: standstill {progress.stall_seconds:.1f} s, stored in {progress.upload_seconds:.1f} s"
        if progress.stall_seconds is not None and progress.upload_seconds is not None
        else "",
    ]


def _time_left(progress: "Progress") -> str:
    if not progress.seconds_left:
        return ""
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"


def verdict_tables(verdict: "Verdict", console: Console) -> None:
    """Prints a table for each split, texts in columns, and the sentence."""
    for split, rows in verdict.rows.items():
        show_table(_means_table(split, rows, verdict), console)
        show_table(_texts_table(split, rows, verdict.left_out), console)
    console.print(verdict.sentence, soft_wrap=True)


def _means_table(split: str, rows: Sequence["Row"], verdict: "Verdict") -> Table:
    groups = {"domains": "domains", "targets": "targets", "all": "all"}
    if verdict.left_out:
        groups = {"domains": "founding domains", "targets": "targets", "all": "all of these", "left_out": "left out"}
    table = plain_table(
        f"Perplexity on {split} text: means over texts, 95 % interval over documents{_fitted_on(split)}",
        ["system", *groups.values(), f"interval of {groups['all']}", f"against {verdict.baseline}"],
        [[row.system, *(_perplexity(row.means.get(group)) for group in groups), *_intervals(row)] for row in rows],
    )
    table.columns[0].no_wrap = True
    return table


def _fitted_on(split: str) -> str:
    return "; what is fitted was fitted on this very text" if split == "development" else ""


def _perplexity(cell: "Cell | None") -> str:
    return "–" if cell is None else f"{cell.perplexity:.2f}"


def _intervals(row: "Row") -> tuple[str, str]:
    """The perplexity's and the difference's, of all texts; of the domains, and so marked, where the system has no others."""
    group = next((group for group in ("all", "domains") if group in row.means), None)
    if group is None:
        return "–", "–"
    cell, where = row.means[group], "" if group == "all" else f" on {group}"
    interval = f"{cell.interval[0]:.2f}–{cell.interval[1]:.2f}{where}"
    if cell.difference is None or cell.difference_interval is None:
        return interval, "–"
    low, high = cell.difference_interval
    return interval, f"{cell.difference:+.1%} ({low:+.1%} to {high:+.1%}){where}"


def _texts_table(split: str, rows: Sequence["Row"], left_out: Mapping[str, str]) -> Table:
    table = Table(title=f"Perplexity on {split} text, by text{_fitted_on(split)}", box=box.SIMPLE, title_justify="left")
    table.add_column("system", no_wrap=True)
    texts = list(dict.fromkeys(text for row in rows for text in row.cells))
    for text in texts:
        table.add_column(f"{text}\n({left_out[text]})" if text in left_out else text, justify="right")
    for row in rows:
        table.add_row(row.system, *(_perplexity(row.cells.get(t)) for t in texts))
    return table


def texts_table(texts: Sequence["TextReport"]) -> Table:
    """The paper's Table 7, and how much test text also stands in training text."""
    table = Table(title="Texts", box=box.SIMPLE, title_justify="left")
    table.add_column("text", no_wrap=True)
    for heading in ("training words", "tokens", "development tokens", "test tokens", "duplicates", "skipped"):
        table.add_column(heading, justify="right")
    table.add_column("test documents in training", justify="right")
    table.add_column("20-word windows in training", justify="right")
    for text in texts:
        windows = text.test_windows_in_training / max(text.test_windows, 1)
        table.add_row(
            text.name + (" (target)" if text.is_target else ""),
            *(f"{count:,}" if count else "–" for count in (text.words.get("train"), text.tokens.get("train"))),
            f"{text.tokens.get('development', 0):,}",
            f"{text.tokens.get('test', 0):,}",
            f"{text.duplicates:,}",
            f"{sum(text.skipped.values()):,}",
            f"{text.test_documents_in_training} of {text.documents['test']}",
            f"{windows:.2%}",
        )
    return table


def plain_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of strings; the first column to the left, the others to the right."""
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def consoles(json_output: bool) -> tuple[Console, Console]:
    """Where results go and where progress goes: with --json, standard output is for the JSON alone.

    What is printed is shown as it is: names may have square brackets or colons, which rich would take for its markup.
    """
    as_it_is: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    results = Console(width=None if sys.stdout.isatty() else 200, **as_it_is)
    return results, Console(stderr=json_output, width=None if sys.stderr.isatty() else 200, **as_it_is)


def show_table(table: Table, console: Console) -> None:
    """Prints a table, wider than the terminal where it must be: no name and no number is cut."""
    for column in table.columns:  # rich would take from the widest, which may have one long word alone
        cells = map(str, (column.header, *column.cells))
        parts = cells if column.no_wrap else (word for cell in cells for word in cell.split())
        column.min_width = max(map(cell_len, parts), default=0)
    least = table.__rich_measure__(console, console.options.update(width=MOST_COLUMNS)).minimum
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def skipped_notice(texts: Sequence["TextReport"], wanted_blocks: int) -> list[str]:
    """Sentences on what a reader of the tables should know: skipped documents, and less development text than asked for."""
    notices = [f"{t.name}: skipped {n} × {reason}" for t in texts for reason, n in t.skipped.items()]
    short = [f"{t.name} {t.development_blocks}" for t in texts if t.development_blocks < wanted_blocks]
    if short:
        notices.append(f"fewer than {wanted_blocks} development blocks, all of them used: {', '.join(short)}")
    return notices


def show_run(run: "Run", json_output: bool) -> None:
    """Prints the outcome of a run: texts, what was fitted, the verdict; or all of it as JSON."""
    console, notes = consoles(json_output)
    if json_output:
        print(json.dumps(run.to_json(), indent=2))
        return
    show_table(texts_table(run.texts), console)
    for notice in skipped_notice(run.texts, run.wanted_development_blocks):
        console.print(f"note: {notice}", soft_wrap=True)
    for name in run.passed_over:
        console.print(f"note: {name} was taken out of the forest and is passed over", soft_wrap=True)
    if run.trained_otherwise:
        console.print(
            f"note: the plan's `branching` has changed, and these stay as they were trained: {', '.join(run.trained_otherwise)}; "
            "with another `store` all experts are trained by it",
            soft_wrap=True,
        )
    for name in run.missing_baselines:
        console.print(f"note: {name} is not trained, and not compared with; `btm run` trains it", soft_wrap=True)
    show_table(fits_table(run.priors, run.evidence_weights), console)
    verdict_tables(run.verdict, console)
    notes.print(run.steps_line, soft_wrap=True)


def preview_table(preview: "Preview", notes: Sequence[str], console: Console) -> None:
    """Prints what a run would do, what that would cost, and what should be known of the machine."""
    unit = "GPU-hours" if preview.on_gpus else "hours"
    rows = [
        [
            step.name,
            step.state,
            f"{step.updates:,}" if step.updates else "–",
            f"{step.tokens:,}" if step.tokens else "–",
            f"{step.stored_bytes / 1e6:,.1f} MB" if step.stored_bytes else "–",
            f"{step.device_hours:,.3f}" if step.device_hours is not None else "–",
        ]
        for step in preview.steps
    ]
    show_table(
        plain_table("What a run would do", ["step", "state", "updates", "tokens", "stored", unit], rows), console
    )
    total = "no rate known: give cluster.tokens_per_gpu_second, or train something in this store first"
    if preview.device_hours is not None:
        total = f"{preview.device_hours:,.3f} {unit} of training to come"
    if preview.money is not None:
        total += f", {preview.money:,.2f} at {preview.price_per_gpu_hour} per GPU-hour"
    console.print(
        f"{preview.parameters:,} parameters, {preview.non_embedding_parameters:,} without embeddings; {total}.",
        soft_wrap=True,
    )
    console.print(f"Every block is read after the token {preview.first_token}.", soft_wrap=True)
    goes_on = [
        f"{ask.label} goes on at update {ask.saved_at} with the resources of its start, {ask.words}; "
        f"with the plan's by {NEW_RESOURCES}"
        for ask in preview.asks
        if ask.saved_at is not None
    ]
    for note in (*preview.notes, *goes_on, *notes):
        console.print(f"note: {note}", soft_wrap=True)


def forest_table(forest: "Forest") -> Table:
    """The experts of a version, and what they descend from."""
    rows = [
        [
            expert.domain,
            expert.identity[:12],
            expert.text[:12],
            ", ".join(f"{_parent_name(forest, parent.identity)} × {parent.weight:g}" for parent in expert.parents),
        ]
        for expert in forest.experts
    ]
    title = f"Forest version {forest.version}: {forest.reason}; seed {forest.foundation.seed[:12]}"
    if forest.withdrawn:
        title += f"; taken out: {', '.join(forest.withdrawn)}"
    return plain_table(title, ["domain", "expert", "text", "branched from"], rows)


def _parent_name(forest: "Forest", identity: str) -> str:
    if identity == forest.foundation.seed:
        return "seed"
    return next((expert.domain for expert in forest.experts if expert.identity == identity), identity[:12])


def fits_table(weights: Mapping[str, Mapping[str, float]], evidence: Mapping[str, float]) -> Table:
    """What was fitted: each text's prior over the experts, and β of the calibrated posterior."""
    experts = list(next(iter(weights.values())))
    rows = [[text, *(f"{p[e]:.3f}" for e in experts), f"{evidence[text]:.3f}"] for text, p in weights.items()]
    return plain_table("Fitted prior by text, and the weight of evidence", ["text", *experts, "evidence"], rows)


def check_lines(checks: Sequence["Check"]) -> list[str]:
    """A line for each check of `btm doctor`, with the remedy where one is called for."""
    width = max(len(check.name) for check in checks)
    return [
        f"{check.state:5}  {check.name:{width}}  {check.found}{'; remedy: ' if check.remedy else ''}{check.remedy}"
        for check in checks
    ]
