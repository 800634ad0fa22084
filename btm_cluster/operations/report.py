"""`btm report`: one page from the results of one or several studies."""

from collections.abc import Sequence
from pathlib import Path

from btm_cluster.errors import UserError
from btm_cluster.report.results import check_nothing_is_lost, read_results, write_results
from btm_cluster.report.study_page import write_page
from btm_cluster.storage.new_folder import check_folder


def write_report(summaries: Sequence[Path], to: Path) -> Path:
    """Writes the page, its figures and the results that it is made from to the folder `to`. Returns the page.

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
    return to / "README.md"
