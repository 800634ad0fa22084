"""`btm expand`: says what was found, what was refused or held back and why,
and one last line that says it all."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from btm_cluster.plan import read_plan
from btm_cluster.session import driving, dry_ledger, opened_view
from btm_cluster.terminal.options import (
    Address,
    Dashboard,
    DryRun,
    InProcess,
    JsonAndProgress,
    NewResources,
    PlanPath,
)
from btm_cluster.terminal.tables import consoles, say
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from btm_cluster.expansion.acceptance import Gain
    from btm_cluster.operations.expand import Expanded, New


def expand(
    plan_path: PlanPath,
    json_output: JsonAndProgress = False,
    address: Address = None,
    in_process: InProcess = False,
    dashboard: Dashboard = False,
    new_resources: NewResources = False,
    dry_run: DryRun = False,
) -> None:
    """Add the domains that the plan or the store's inbox has and the forest has not. Nothing to add: starts nothing."""
    plan = read_plan(plan_path)
    check_shadowing()
    with opened_view() as view:
        from btm_cluster.driver.driver import step_error
        from btm_cluster.operations.expand import expand, find_new
        from btm_cluster.operations.report import finish_run

        if dry_run:
            view.say("looking for what is new")
            new = find_new(plan, dry_ledger(plan.store))
        else:
            with driving(
                view, plan, address, in_process, dashboard, new_resources, command="expand"
            ) as driver:
                result = expand(plan, driver)
                page = finish_run(plan, driver) if result.added else None
    if dry_run:
        show_new(new, json_output)
        return
    if page:
        say(f"report: {page}", consoles(json_output)[1])
    show_expanded(result, json_output)
    if result.failures:
        raise step_error(result.failures)


def show_expanded(expanded: "Expanded", json_output: bool) -> None:
    """Prints it as lines, of which the last is the outcome; or all of it as JSON."""
    from btm_cluster.driver.driver import steps_line

    console, _ = consoles(json_output)
    if json_output:
        print(json.dumps(expanded.to_json(), indent=2))
        return
    _tell_left(expanded.waiting, expanded.passed_over, expanded.quarantined, expanded.held)
    for failure in expanded.failures:
        say(f"failed: {failure.label}", console)
    if expanded.added:
        note = "note: `btm evaluate` compares the forest with seed and baselines on founding domains and targets alone"
        say(note, console)
    say(steps_line(expanded.made, expanded.reused), console)
    say(outcome_line(expanded), console)


def show_new(new: "New", json_output: bool) -> None:
    """Prints what an expansion would take up, and what it would leave."""
    if json_output:
        print(json.dumps(new.to_json(), indent=2))
        return
    console, _ = consoles(json_output)
    _tell_left(new.inbox.waiting, new.passed_over, new.inbox.quarantined, {})
    for name in new.named:
        say(f"would add: {name}, of the plan", console)
    for arrival in new.inbox.arrivals:
        say(_visible(f"would add: {arrival.domain.name}, from the inbox"), console)
    count = len(new.domains) or "nothing"
    say(f"{count} would be read and added to forest version {new.forest.version}", console)


def outcome_line(expanded: "Expanded") -> str:
    """The outcome of an expansion, on one line."""
    stands = f"forest version {expanded.forest.version}, {len(expanded.forest.experts)} experts"
    if not expanded.added:
        return f"nothing was added: {stands}"
    names = [f"{name}{_gain(expanded.gains.get(name))}" for name in expanded.added]
    return f"added {', '.join(names)}: {stands}"


def _tell_left(*reasons: "Mapping[str, str]") -> None:
    """A line for each domain that is not added: not ready, passed over, quarantined, held back."""
    console, _ = consoles(False)
    for what, of in zip(("not ready", "passed over", "quarantined", "held back"), reasons, strict=True):
        for name, reason in sorted(of.items()):
            say(_visible(f"{what}: {name}: {reason}"), console)


def _visible(line: str) -> str:
    """Without control characters: names of files come from whoever can write to the inbox."""
    return "".join(character if character.isprintable() else "?" for character in line)


def _gain(gain: "Gain | None") -> str:
    """Nothing for a domain that another driver added."""
    if gain is None:
        return ""
    before = "" if gain.before is None else f"{gain.before:.2f} to "
    return f" (development perplexity {before}{gain.after:.2f})"
