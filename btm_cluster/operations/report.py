"""`btm report`: the page of a plan from its store alone, or of the results of one or several studies.

Makes, trains and scores nothing.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from btm_cluster.algorithm import Grown
from btm_cluster.driver.driver import Driver
from btm_cluster.errors import BtmError, StoreError, UserError, one_line
from btm_cluster.evaluation.verdict_table import table_of
from btm_cluster.forest import Forest
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.records import LOGS, REPORT_FILE
from btm_cluster.ledger.timelines import Timeline, list_runs, read_timeline, run_key
from btm_cluster.operations.evaluate import find_grown
from btm_cluster.operations.run import Run, evaluated
from btm_cluster.plan import Plan
from btm_cluster.report.content import Page
from btm_cluster.report.measured import read_overlaps, read_text_parts, read_trainings
from btm_cluster.report.page import render
from btm_cluster.report.results import Results, check_nothing_is_lost, read_results, write_results
from btm_cluster.report.run_page import Evaluated, RunReport, run_page
from btm_cluster.report.run_sections import RUNS_SHOWN
from btm_cluster.report.study_page import MARKDOWN_FILE, write_page
from btm_cluster.storage.new_folder import check_folder
from btm_cluster.storage.scratch import scratch_folder
from btm_cluster.workers.stored import NotMadeError, Stored

log = logging.getLogger(__name__)
VERSIONS_TRIED = 5
"""Newest versions among which one is looked for that was evaluated."""


def write_report(summaries: Sequence[Path], to: Path) -> Path:
    """Writes the page of studies, its figures and the results that it is made from to the folder `to`.

    Returns the page.

    Raises:
        UserError: the folder cannot be written to or has results that would be lost, or the results cannot
        stand in one table.
    """
    check_folder(to)
    if len(summaries) > 1 and to.resolve() in [folder.resolve() for folder in summaries]:
        raise UserError(
            f"the results in {to} would be replaced by those of all",
            expected="a folder of its own for the page of several studies",
            remedy="name another folder with --to",
        )
    results = read_results(summaries)
    check_nothing_is_lost(to, results)
    write_results(results, to)
    write_page(results, to)
    return to / MARKDOWN_FILE


def write_plan_report(plan: Plan, studies: Sequence[Path], to: Path, ledger: Ledger) -> Path:
    """Writes the page of a plan to the folder `to`, with the curves of studies where some are named.

    Raises:
        UserError: the plan was never run, the folder cannot be written to, or a study cannot be read.
    """
    check_folder(to)
    page = page_of(plan, ledger, read_results(studies) if studies else None)
    to.mkdir(parents=True, exist_ok=True)
    (to / REPORT_FILE).write_text(render(page), encoding="utf-8")
    return to / REPORT_FILE


def finish_run(plan: Plan, driver: Driver, run: Run | None = None) -> str | None:
    """Ends a run with its page, beside its curves and timeline in the store; and passes the verdict and the page on
    to where its curves go. `run` is the outcome where the forest was evaluated.

    The address of the page; None after a warning, or where the driver keeps no log. A run never fails for it.
    """
    log_of_run = driver.run_log
    if log_of_run is None:
        return None
    log_of_run.store()  # the page shows the timeline up to here
    file, address = None, None
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder())
            file, address = _store_page(plan, driver.ledger, log_of_run.run, run, folder)
        except Exception as exc:  # whatever it is, the run itself is done
            log.warning(
                "the report was not written: %s; `btm report PLAN --to DIR` tries again", one_line(exc)
            )
        if run is not None:
            log_of_run.finish(table_of(run.verdict), file)
    return address


def _store_page(plan: Plan, ledger: Ledger, name: str, run: Run | None, folder: Path) -> tuple[Path, str]:
    key, file = run_key(name, REPORT_FILE), folder / REPORT_FILE
    file.write_text(render(page_of(plan, ledger, run=run, under_way=name)), encoding="utf-8")
    ledger.storage.upload(key, file)
    return file, ledger.storage.address(key)


def page_of(
    plan: Plan, ledger: Ledger, study: Results | None = None, run: Run | None = None, under_way: str = ""
) -> Page:
    """The page of a plan.

    `run` is an evaluation that is known already; `under_way` is the run that ends with this page.

    Raises:
        UserError: the store has no forest, or does not know the plan's texts.
    """
    versions = [forest for forest, _ in ledger.log.history()]
    if not versions:
        raise UserError(
            f"there is no forest in {plan.store} to report on",
            remedy="`btm run PLAN` grows one and evaluates it",
        )
    grown, done, why_not = _newest_evaluated(plan, versions, Driver(ledger, Stored()), run)
    return run_page(
        RunReport(
            plan,
            versions,
            done,
            why_not,
            read_trainings(versions[-1], grown.baseline if grown else None, ledger),
            _runs(ledger, under_way),
            ledger.storage.address(LOGS),
            study,
        )
    )


def _newest_evaluated(
    plan: Plan, versions: Sequence[Forest], driver: Driver, run: Run | None
) -> tuple[Grown | None, Evaluated | None, str]:
    """The newest version of the forest of which everything is in the store; and what the newest lacks."""
    newest: Grown | None = None
    lacks = ""
    for forest in [one for one in reversed(versions) if one.experts][:VERSIONS_TRIED]:
        try:
            grown = find_grown(plan, driver, forest.version)
            newest = newest or grown
            is_known = run is not None and run.forest == grown.forest
            return newest, _evaluated(plan, grown, driver, run if is_known else None), lacks
        except (NotMadeError, StoreError) as exc:  # an older version's texts may be purged
            lacks = lacks or exc.found or exc.what
    return newest, None, lacks or "no expert was trained yet"


def _evaluated(plan: Plan, grown: Grown, driver: Driver, run: Run | None) -> Evaluated:
    run = run or evaluated(plan, grown, driver)
    parts = read_text_parts(grown.prepared, grown.forest, driver.ledger)
    overlaps = read_overlaps(grown.prepared, driver.ledger)
    return Evaluated(grown.forest, run.verdict, run.texts, parts, overlaps)


def _runs(ledger: Ledger, under_way: str) -> list[tuple[str, Timeline]]:
    """The newest runs; one that cannot be read is passed over, and the one under way ends here."""
    found = []
    for run in list_runs(ledger)[:RUNS_SHOWN]:
        try:
            timeline = read_timeline(ledger, run)
            ended = timeline.model_copy(update={"outcome": "done"}) if run == under_way else timeline
            found.append((run, ended))
        except BtmError as exc:
            log.warning("a timeline is passed over: %s", exc.what)
    return found
