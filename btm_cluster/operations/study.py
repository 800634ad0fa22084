"""`btm study`: runs a plan's study, and writes its results and their page
after each size and random seed anew."""

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from btm_cluster.driver.driver import Driver
from btm_cluster.plan import Plan
from btm_cluster.plan.folder import refuse_in_jobs_copy
from btm_cluster.report.results import SUMMARY_FILE, Results, write_results
from btm_cluster.report.study_page import write_page
from btm_cluster.storage import Storage, open_storage
from btm_cluster.storage.new_folder import check_folder
from btm_cluster.storage.scratch import scratch_folder
from btm_cluster.study.run import Study, run_study


def open_place(to: str) -> Storage:
    """The folder or bucket for the results, tried before anything is spent.

    Raises:
        UserError: it cannot be written to.
    """
    place = open_storage(to)
    refuse_in_jobs_copy(place.location)
    if "://" not in to:
        check_folder(Path(to))
    place.check()
    return place


@dataclass(frozen=True)
class WrittenStudy:
    """Results that were written, and the address of their page."""

    page: str
    results: Results

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines: what `summary.json` and `study.json` hold."""
        return {"page": self.page, **vars(self.results)}


def write_studies(plan: Plan, place: Storage, driver: Driver) -> Iterator[WrittenStudy]:
    """Yields what is known whenever it is written.

    Results that are there already are replaced by finished ones alone.
    """
    has_results = any(place.list(SUMMARY_FILE))
    for study in run_study(plan, driver):
        if has_results and study.repeats_left:
            continue
        results = results_of(plan, study)
        with scratch_folder() as scratch:
            write_results(results, scratch)
            write_page(results, scratch)
            for file in sorted(scratch.iterdir()):
                place.upload(file.name, file)
        yield WrittenStudy(place.address("README.md"), results)


def results_of(plan: Plan, study: Study) -> Results:
    """A study's outcome as plain values."""
    run = {
        "plan": plan.model_dump(mode="json", exclude_unset=True),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "repeats_left": study.repeats_left,
    }
    texts = tuple(asdict(text) for text in study.texts)
    return Results(study.entries, texts, study.speeds, study.trials, (run,), study.growth, study.rises)
