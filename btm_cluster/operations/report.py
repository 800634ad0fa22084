"""`btm report`: the page of a plan from its store alone, or of the results of one or several studies.

Makes, trains and scores nothing.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from btm_cluster.algorithm import Grown
from btm_cluster.driver.driver import Driver
from btm_cluster.errors import BtmError, UserError, one_line
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.records import LOGS
from btm_cluster.ledger.timelines import Timeline, list_runs, read_timeline, run_key
from btm_cluster.operations.evaluate import find_grown
from btm_cluster.operations.run import evaluated
from btm_cluster.plan import Plan
from btm_cluster.report.content import Page
from btm_cluster.report.measured import read_overlaps, read_text_parts, read_trainings
from btm_cluster.report.page import render
from btm_cluster.report.results import Results, check_nothing_is_lost, read_results, write_results
from btm_cluster.report.run_page import Evaluated, RunReport, run_page
from btm_cluster.report.run_sections import RUNS_SHOWN
from btm_cluster.report.study_page import HTML_FILE, MARKDOWN_FILE, write_page
from btm_cluster.storage.new_folder import check_folder
from btm_cluster.storage.scratch import scratch_folder
from btm_cluster.workers.stored import NotMadeError, Stored

log = logging.getLogger(__name__)
VERSIONS_TRIED = 5
"""Newest versions among which one is looked for that was evaluated."""
PLAN_ENDINGS = (".yaml", ".yml")


def is_plan(path: Path) -> bool:
    """Whether what `btm report` is given is a plan, and no study's folder."""
    return path.suffix in PLAN_ENDINGS and not path.is_dir()


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
    (to / HTML_FILE).write_text(render(page), encoding="utf-8")
    return to / HTML_FILE


def store_report(plan: Plan, ledger: Ledger, run: str) -> str | None:
    """Stores the page beside a run's curves and timeline: its address, or None after a warning.

    A run goes on without its page.
    """
    key = run_key(run, HTML_FILE)
    try:
        with scratch_folder() as folder:
            file = folder / HTML_FILE
            file.write_text(render(page_of(plan, ledger)), encoding="utf-8")
            ledger.storage.upload(key, file)
    except Exception as exc:  # whatever it is, the run itself is done
        log.warning("the report was not written: %s; `btm report PLAN --to DIR` tries again", one_line(exc))
        return None
    return ledger.storage.address(key)


def page_of(plan: Plan, ledger: Ledger, study: Results | None = None) -> Page:
    """The page of a plan.

    Raises:
        UserError: the store has no forest, or does not know the plan's texts.
    """
    versions = [forest for n in ledger.log.versions() if (forest := ledger.log.version(n)) is not None]
    if not versions:
        raise UserError(
            f"there is no forest in {plan.store} to report on",
            remedy="`btm run PLAN` grows one and evaluates it",
        )
    driver = Driver(ledger, Stored())
    grown, done = _evaluated(plan, driver)
    return run_page(
        RunReport(
            plan,
            versions,
            done,
            read_trainings(versions[-1], grown.baseline if grown else None, ledger),
            _runs(ledger),
            ledger.storage.address(LOGS),
            study,
        )
    )


def _evaluated(plan: Plan, driver: Driver) -> tuple[Grown | None, Evaluated | None]:
    """The newest version of the forest of which everything is in the store."""
    ledger = driver.ledger
    grown: Grown | None = None
    for version in list(reversed(ledger.log.versions()))[:VERSIONS_TRIED]:
        forest = ledger.log.version(version)
        if forest is None or not forest.experts:
            continue
        try:
            found = find_grown(plan, driver, version)
            grown = grown or found
            run = evaluated(plan, found, driver)
        except NotMadeError as exc:
            log.info("forest version %d was not evaluated: %s", version, exc.found)
            continue
        overlaps = read_overlaps(found.prepared, ledger)
        parts = read_text_parts(found.prepared, forest, ledger)
        return found, Evaluated(forest, run.verdict, run.texts, parts, overlaps)
    return grown, None


def _runs(ledger: Ledger) -> list[tuple[str, Timeline]]:
    """The newest runs; one that cannot be read is passed over."""
    found = []
    for run in list_runs(ledger)[:RUNS_SHOWN]:
        try:
            found.append((run, read_timeline(ledger, run)))
        except BtmError as exc:
            log.warning("a timeline is passed over: %s", exc.what)
    return found
