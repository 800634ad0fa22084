"""Notes on a plan before it is run, of things that are no mistake."""

from collections.abc import Iterator, Sequence

from btm_cluster.driver.text_sizes import TextUse, too_many_passes
from btm_cluster.plan import Plan


def notes_on(plan: Plan, uses: Sequence[TextUse]) -> Iterator[str]:
    """Sentences on passes over texts, on a price without effect, on LoRA's learning rate, and on a pretrained seed."""
    training = plan.training
    if often := too_many_passes(uses, training.updates):
        yield often
    if plan.cluster.price_per_gpu_hour is not None and not plan.cluster.gpus_per_expert:
        yield "`cluster.price_per_gpu_hour` prices nothing: experts train on CPU (`cluster.gpus_per_expert` is 0)"
    branching = plan.branching
    if branching.train == "lora":
        rate = training.learning_rate * branching.learning_rate_scale
        yield (
            f"LoRA experts learn at a rate of {rate:g}: `training.learning_rate`, by which the whole model would "
            f"be trained, times `branching.learning_rate_scale`, {branching.learning_rate_scale:g}"
        )
    if plan.model.pretrained is None:
        return
    if not training.seed_updates:
        yield f"the pretrained model is the seed: experts train all {training.updates:,} updates"
        return
    yield (
        f"the pretrained model is the seed, and `training.seed_share` is {training.seed_share:g}: updates 1 "
        f"to {training.seed_updates:,} of {training.updates:,} are never made, and experts begin at that point "
        "of the learning-rate line; without `seed_share` they train all"
    )
