"""A study of experts from a pretrained model: what it has by default, and what it cannot have."""

from btm_cluster.errors import UserError
from btm_cluster.plan import Plan, StudyPlan
from btm_cluster.study.controls import DEMIXES


def study_of(plan: Plan) -> StudyPlan:
    """The plan's study, or one of all baselines and controls; beside a pretrained model, all but DEMix."""
    study = plan.study or StudyPlan()
    if plan.model.pretrained is None or study.sizes or "systems" in study.model_fields_set:
        return study
    systems = tuple(system for system in study.systems if system not in DEMIXES)
    return study.model_copy(update={"systems": systems})


def check_beside_pretrained(study: StudyPlan) -> None:
    """Refuses what a study cannot have beside a pretrained model.

    Raises:
        UserError: naming it.
    """
    found = [f"{system} in study.systems" for system in study.systems if system in DEMIXES]
    found += ["study.seed_shares"] if study.seed_shares else []
    if found:
        raise UserError(
            "a study of experts from a pretrained model has that model as its only seed, and no DEMix",
            found=" and ".join(found),
            remedy="leave that out, or give shapes in `study.sizes`: [{name: …, model: {config: …}}]",
        )
