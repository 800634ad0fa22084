"""The command line, thin: reads arguments, calls, shows. What is heavy is imported once arguments are parsed."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from btm_cluster.commands import forest as forest_commands
from btm_cluster.commands import store as store_commands
from btm_cluster.commands.discover import discover
from btm_cluster.commands.driving import Address, Dashboard, InProcess, Json, NewResources, PlanPath, driving
from btm_cluster.commands.forest import open_ledger
from btm_cluster.commands.generate import generate
from btm_cluster.commands.models import merge
from btm_cluster.commands.score import score
from btm_cluster.errors import BtmError, OutputError, Stopped, UserError
from btm_cluster.new_folder import check_folder
from btm_cluster.output import CLOSED_PIPE, end_input, printable, safe_output
from btm_cluster.own_modules import check_own_modules
from btm_cluster.plan import Plan, read_plan
from btm_cluster.stopping import end_at_signals

app = typer.Typer(
    help="Branch-Train-Merge: grow a forest of expert language models on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
forest_app = typer.Typer(help="Look at a forest and its history, and look after its store.", no_args_is_help=True)
app.add_typer(forest_app, name="forest")
forest_commands.register(forest_app)
store_commands.register(forest_app)


def main() -> None:
    """The `btm` command. Exit codes: 0 done, 1 some experts failed and are named, 2 the plan or the call is wrong, 130 stopped."""
    end_at_signals()
    sys.exit(run_command(app))


def run_command(command: Callable[[], Any]) -> int:
    """Runs a command and words its errors; returns the exit code."""
    with safe_output() as output:
        try:
            code = _run_and_word(command)
            output.flush()
        except OutputError as exc:
            output.abandon()
            if exc.exit_code != CLOSED_PIPE:
                print(f"error: {exc}", file=sys.stderr)
            code = exc.exit_code
    return code


def _run_and_word(command: Callable[[], Any]) -> int:
    try:
        _check_current_folder()
        command()
    except OutputError:
        raise
    except BtmError as exc:
        print(f"error: {printable(str(exc))}", file=sys.stderr)
        return exc.exit_code
    except SystemExit as exc:
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except KeyboardInterrupt:
        return Stopped.exit_code
    return 0


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as exc:
        raise UserError("the current folder is not there any more", found=str(exc), remedy="cd to one that is") from exc


@app.command()
def init(path: Annotated[Path, typer.Argument(help="Where to write the plan.")] = Path("plan.yaml")) -> None:
    """Write a commented starter plan."""
    from btm_cluster.starter import STARTER_PLAN

    if path.exists():
        raise UserError(f"{path} already exists", remedy="choose another name")
    try:
        path.write_text(STARTER_PLAN, encoding="utf-8")
    except OSError as exc:
        raise UserError(f"cannot write {path}", found=str(exc), remedy="choose another place") from exc
    print(f"wrote {path}; next: edit its texts, then `btm plan {path}`")


@app.command("plan")
def show_plan(plan_path: PlanPath, json_output: Json = False, address: Address = None) -> None:
    """Say what a run would do, what is done already, and what the rest would cost. Starts nothing."""
    plan = read_plan(plan_path)
    check_own_modules()
    end_input()
    from btm_cluster.display import consoles, preview_table
    from btm_cluster.machine import notes_on_this_machine
    from btm_cluster.preview import preview

    seen = preview(plan, open_ledger(plan.store))
    notes = notes_on_this_machine(seen.asks) if address is None else []
    if json_output:
        print(json.dumps(seen.to_json() | {"notes": notes}, indent=1))
    else:
        preview_table(seen, notes, consoles(False)[0])


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print tables for people instead: docs/plan.md.")
    ] = False,
) -> None:
    """Print the JSON schema of a plan, for editors."""
    from btm_cluster.plan import plan_schema
    from btm_cluster.plan.reference import plan_reference

    print(plan_reference() if markdown else json.dumps(plan_schema(), indent=1), end="" if markdown else "\n")


@app.command()
def run(
    plan_path: PlanPath,
    json_output: Json = False,
    address: Address = None,
    in_process: InProcess = False,
    dashboard: Dashboard = False,
    new_resources: NewResources = False,
) -> None:
    """Grow the forest: seed, experts, merge, and the verdict. Run again, it goes on where it was."""
    plan = read_plan(plan_path)
    grow_forest(plan, json_output, address, in_process, dashboard, evaluate_only=False, new_resources=new_resources)


@app.command()
def expand(
    plan_path: PlanPath,
    json_output: Json = False,
    address: Address = None,
    in_process: InProcess = False,
    dashboard: Dashboard = False,
    new_resources: NewResources = False,
) -> None:
    """Add the domains that the plan or the store's inbox has and the forest has not. Nothing to add: starts nothing."""
    expand_forest(read_plan(plan_path), json_output, address, in_process, dashboard, new_resources)


@app.command()
def evaluate(
    plan_path: PlanPath, json_output: Json = False, address: Address = None, in_process: InProcess = False
) -> None:
    """Evaluate the forest as it stands, on the text of all its domains and of the plan's targets."""
    grow_forest(read_plan(plan_path), json_output, address, in_process, dashboard=False, evaluate_only=True)


app.command()(merge)
app.command()(generate)
app.command()(score)


@app.command()
def study(
    plan_path: PlanPath,
    to: Annotated[str, typer.Option(help="Folder for the results, or s3://bucket/prefix.", show_default=False)],
    address: Address = None,
    in_process: InProcess = False,
    dashboard: Dashboard = False,
    new_resources: NewResources = False,
) -> None:
    """Run the paper's comparison on the plan's texts: rivals, controls, sizes, repeats; tables and figures."""
    run_study_plan(read_plan(plan_path), to, address, in_process, dashboard, new_resources)


@app.command("report")
def write_report(
    summaries: Annotated[list[Path], typer.Argument(help="Folders that `btm study` wrote.", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder for the page and its figures.", show_default=False)],
) -> None:
    """Make one page of tables and figures from the results of one or several studies, which are kept beside it."""
    check_folder(to)
    if len(summaries) > 1 and to.resolve() in [folder.resolve() for folder in summaries]:
        raise UserError(
            f"the results in {to} would be replaced by those of all",
            expected="a folder of its own for the page of several studies",
            remedy="name another folder with --to",
        )
    from btm_cluster.study.page import write_page
    from btm_cluster.study.results import check_nothing_is_lost, read_results, write_results

    results = read_results(summaries)
    check_nothing_is_lost(to, results)
    write_results(results, to)
    write_page(results, to)
    print(f"wrote {to / 'README.md'}")


app.command()(discover)


@app.command()
def doctor(
    plan_path: Annotated[Path | None, typer.Argument(help="The plan, a YAML file.", show_default=False)] = None,
    json_output: Json = False,
    address: Address = None,
) -> None:
    """Look for what would make a run fail: Ray, token, store, clock, disk, GPUs, threads, room. Trains nothing."""
    plan = None if plan_path is None else read_plan(plan_path)
    check_own_modules()
    end_input()
    from btm_cluster.display import check_lines
    from btm_cluster.doctor import examine

    checks = examine(plan, address, Path.cwd())
    wrong = sum(check.state == "wrong" for check in checks)
    print(json.dumps([asdict(check) for check in checks], indent=1) if json_output else "\n".join(check_lines(checks)))
    if wrong:
        raise UserError(
            f"{wrong} of {len(checks)} checks found something wrong", remedy="the lines above say what to do"
        )


def grow_forest(
    plan: Plan,
    json_output: bool,
    address: str | None,
    in_process: bool,
    dashboard: bool,
    evaluate_only: bool,
    new_resources: bool = False,
) -> None:
    """Runs a plan and shows the verdict. Raises StepError at the end if some experts failed."""
    check_own_modules()
    from btm_cluster.display import show_run
    from btm_cluster.preview import check_room
    from btm_cluster.run import run_plan

    with driving(plan, address, in_process, dashboard, json_output, new_resources) as driver:
        if not evaluate_only:
            check_room(plan, driver)
        result = run_plan(plan, driver, evaluate_only)
    show_run(result, json_output)
    if result.failures:
        from btm_cluster.driver import step_error

        raise step_error(result.failures)


def run_study_plan(
    plan: Plan, to: str, address: str | None, in_process: bool, dashboard: bool, new_resources: bool = False
) -> None:
    """Runs a plan's study and writes its results to a folder or a bucket, after each size and random seed anew.

    Results that are there already are replaced by finished ones alone.
    """
    check_own_modules()
    from btm_cluster.storage import open_storage
    from btm_cluster.storage.scratch import scratch_folder

    place = open_storage(to)
    if "://" not in to:
        check_folder(Path(to))
    place.check()
    from btm_cluster.study.page import write_page
    from btm_cluster.study.results import SUMMARY_FILE, results_of, write_results
    from btm_cluster.study.run import run_study

    has_results = any(place.list(SUMMARY_FILE))
    with driving(plan, address, in_process, dashboard, False, new_resources) as driver:
        for study in run_study(plan, driver):
            if has_results and study.repeats_left:
                continue
            results = results_of(plan, study)
            with scratch_folder() as scratch:
                write_results(results, scratch)
                write_page(results, scratch)
                for file in sorted(scratch.iterdir()):
                    place.upload(file.name, file)
            print(f"wrote {place.address('README.md')}", flush=True)


def expand_forest(
    plan: Plan, json_output: bool, address: str | None, in_process: bool, dashboard: bool, new_resources: bool = False
) -> None:
    """Expands a plan's forest and says what came of it. Raises StepError at the end if some experts failed."""
    check_own_modules()
    from btm_cluster.display_expansion import show_expanded
    from btm_cluster.expansion.expand import expand

    with driving(plan, address, in_process, dashboard, json_output, new_resources) as driver:
        result = expand(plan, driver)
    show_expanded(result, json_output)
    if result.failures:
        from btm_cluster.driver import step_error

        raise step_error(result.failures)
