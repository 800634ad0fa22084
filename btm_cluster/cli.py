"""The command line: registers the commands, and turns errors into messages and exit codes."""

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from btm_cluster import __version__
from btm_cluster.commands.contributions import contributions
from btm_cluster.commands.diff import diff
from btm_cluster.commands.discover import discover
from btm_cluster.commands.doctor import doctor
from btm_cluster.commands.evaluate import evaluate
from btm_cluster.commands.expand import expand
from btm_cluster.commands.export import export
from btm_cluster.commands.gc import gc
from btm_cluster.commands.generate import generate
from btm_cluster.commands.init import init
from btm_cluster.commands.log import log
from btm_cluster.commands.merge import merge
from btm_cluster.commands.pin import pin
from btm_cluster.commands.plan import plan
from btm_cluster.commands.quickstart import quickstart
from btm_cluster.commands.remove import remove
from btm_cluster.commands.report import report
from btm_cluster.commands.rollback import rollback
from btm_cluster.commands.run import run
from btm_cluster.commands.schema import schema
from btm_cluster.commands.score import score
from btm_cluster.commands.serve import serve
from btm_cluster.commands.show import show
from btm_cluster.commands.study import study
from btm_cluster.commands.verify import verify
from btm_cluster.errors import BtmError, OutputError, Stopped, UserError
from btm_cluster.stopping import Interruption, end_at_signals, end_with
from btm_cluster.terminal.options import logged
from btm_cluster.terminal.output import CLOSED_PIPE, printable, safe_output, width_of, wrapped

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
forest_app = typer.Typer(
    help="Look at a forest and its history, and look after its store. Every command takes a PLAN, or --store.",
    no_args_is_help=True,
)
app.add_typer(forest_app, name="forest")
for command in (
    quickstart,
    init,
    plan,
    schema,
    run,
    expand,
    evaluate,
    merge,
    export,
    generate,
    score,
    serve,
    study,
    report,
    discover,
    doctor,
):
    app.command()(logged(command))
for forest_command in (show, log, remove, rollback, diff, contributions, verify, gc, pin):
    forest_app.command()(logged(forest_command))


def _print_versions(is_asked: bool) -> None:
    """Those of what results depend on, without importing any of it."""
    if is_asked:
        others = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "ray"))
        print(f"btm {__version__} (Python {platform.python_version()}, {others})")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of btm, Python, torch, transformers and Ray.",
        ),
    ] = False,
) -> None:
    """Branch-Train-Merge: grow a forest of expert language models on Ray."""


def main() -> None:
    """The `btm` command.

    Exit codes: 0 done, 1 something failed, such as some experts, 2 the plan, the call or a text is wrong,
    130 stopped or the budget is spent, 141 the reader of standard output has gone.
    """
    end_at_signals()
    end_with(run_command(app))


def run_command(command: Callable[[], Any]) -> int:
    """Runs a command and prints its errors; returns the exit code."""
    with safe_output() as output:
        try:
            code = _run_and_print_errors(command)
            output.flush()
        except OutputError as exc:
            output.abandon()
            if exc.exit_code != CLOSED_PIPE:
                print(f"error: {exc}", file=sys.stderr)
            code = exc.exit_code
    return code


def _run_and_print_errors(command: Callable[[], Any]) -> int:
    try:
        _check_current_folder()
        command()
    except OutputError:
        raise
    except BtmError as exc:
        print(wrapped(f"error: {printable(str(exc))}", width_of(sys.stderr)), file=sys.stderr)
        return exc.exit_code
    except SystemExit as exc:
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except (KeyboardInterrupt, Interruption):  # where no `handling` was entered, or one was just left
        return Stopped.exit_code
    return 0


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as exc:
        raise UserError(
            "the current folder is not there any more", found=str(exc), remedy="cd to one that is"
        ) from exc
