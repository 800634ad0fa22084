"""`btm evaluate`."""

from btm_cluster.commands.run import show_and_finish
from btm_cluster.plan import read_plan
from btm_cluster.session import driving, opened_view
from btm_cluster.terminal.options import Address, Details, InProcess, JsonAndProgress, PlanPath
from btm_cluster.workers.shadowing import check_shadowing


def evaluate(
    plan_path: PlanPath,
    json_output: JsonAndProgress = False,
    address: Address = None,
    in_process: InProcess = False,
    details: Details = False,
) -> None:
    """Evaluate the forest as it stands, on the text of all its domains and of the plan's targets."""
    plan = read_plan(plan_path)
    check_shadowing()
    with opened_view() as view:
        from btm_cluster.operations.evaluate import evaluate_forest

        with driving(view, plan, address, in_process, command="evaluate") as driver:
            result = evaluate_forest(plan, driver)
            view.close()
            show_and_finish(plan, driver, result, json_output, details, plan_path)
