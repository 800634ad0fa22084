"""Texts that a command line names, as a plan would."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from btm_cluster.errors import PlanError, UserError

if TYPE_CHECKING:
    from btm_cluster.plan import TextPlan

Field = Annotated[str, typer.Option(help="Field of a row that holds the document.")]
Delimiter = Annotated[
    str | None, typer.Option(help="Cuts text files into documents; else a file is one.", show_default=False)
]


def source_of(
    name: str,
    text: list[str],
    field: str,
    delimiter: str | None,
    dataset: str | None = None,
    split: str | None = None,
) -> "TextPlan":
    """Files or globs, or a data set.

    Raises:
        PlanError: what a plan would refuse, too.
        UserError: a split without a data set.
    """
    from pydantic import ValidationError

    from btm_cluster.plan import TextPlan
    from btm_cluster.plan.problems import describe_problems

    given: dict[str, Any] = {"name": name, "text": text, "field": field, "delimiter": delimiter}
    if dataset is not None:
        given["dataset"] = {"name": dataset} | ({"split": split} if split else {})
    elif split is not None:
        raise UserError(
            "--split is of a data set",
            found=f"--split {split}, and no --dataset",
            expected="the split of a data set, which files have not",
            remedy="leave --split out, or add --dataset NAME",
        )
    try:
        return TextPlan.model_validate(given)
    except ValidationError as exc:
        problems = describe_problems(exc, TextPlan)
    raise PlanError("this text cannot be read\n" + "\n".join(problems))
