"""From a plan or a forest to requests: which models each step of growing
and evaluating asks of the workers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText, training_text
from btm_cluster.errors import PlanError
from btm_cluster.forest import Forest
from btm_cluster.language_model.deltas import trains_of
from btm_cluster.language_model.demix import check_splits
from btm_cluster.language_model.mixture_of_experts import check_target
from btm_cluster.ledger import Ref
from btm_cluster.plan import Plan
from btm_cluster.requests import Resources, Role, ScoreRequest, Start, TrainingText, TrainRequest


def seed_request(prepared: PreparedPlan) -> TrainRequest:
    """The seed: s·U updates on the mix of all founding domains; a pretrained model
    is one already, whatever the domains."""
    if prepared.pretrained is not None:
        return train_request(prepared, "seed", "seed", (), (0, 0), None)
    return train_request(
        prepared, "seed", "seed", prepared.founding_texts, (0, prepared.plan.training.seed_updates), None
    )


def transformer_lm_request(prepared: PreparedPlan, seed: Ref) -> TrainRequest:
    """The compute-matched dense baseline: the seed run, carried on to the end on the mix of all domains."""
    training = prepared.plan.training
    start = None if prepared.pretrained is None else Start(seed, keep_optimizer=False)
    span = (0 if start is None else training.seed_updates, training.updates)
    whole = train_request(prepared, "transformer-lm", "transformer-lm", prepared.founding_texts, span, start)
    milestones = (training.seed_updates,) if start is None else ()
    between = evenly_between(training.seed_updates, training.updates)
    return replace(whole, milestones=milestones, snapshots=between)


def evenly_between(first: int, last: int) -> tuple[int, ...]:
    """Two updates that lie evenly between two others; fewer where there are not so many."""
    thirds = (first + round((last - first) * third / 3) for third in (1, 2))
    return tuple(dict.fromkeys(update for update in thirds if first < update < last))


def transformer_lm_milestones(prepared: PreparedPlan, seed: Ref) -> dict[int, Ref]:
    """The Transformer-LM at each of its milestones, by update: the seed first, two
    between, and the finished model last."""
    whole = transformer_lm_request(prepared, seed)
    between = {one.last_update: one.ref for one in whole.at_snapshots}
    return {prepared.plan.training.seed_updates: seed, **between, whole.last_update: whole.ref}


def demix_request(prepared: PreparedPlan) -> TrainRequest:
    """DEMix: the Transformer-LM's budget and text, from the start, with one
    feed-forward per founding domain."""
    span = (0, prepared.plan.training.updates)
    request = train_request(prepared, "demix", "demix", prepared.founding_texts, span, None)
    return as_demix(request)


def as_demix(request: TrainRequest) -> TrainRequest:
    """The request with a feed-forward for each text: split over a group by these, and not sharded. Its memory is
    not estimated."""
    how = replace(request.how, sharding="none")
    if how.activation_checkpointing == "auto":
        how = replace(how, activation_checkpointing="off")
    how = replace(how, micro_batch_blocks=how.blocks_at_once)
    return replace(request, is_demix=True, how=how)


def check_demix(plan: Plan, model: Mapping[str, Any], forest: Forest | None) -> None:
    """Refuses, before a text is read, a DEMix that the plan asks for and that cannot be trained.

    `forest` is version 0.

    Raises:
        UserError: naming the architecture, or the size of the group.
    """
    if "demix" in plan.baselines:
        check_demix_fits(plan, model, len(forest.foundation.domains if forest else plan.domains))


def check_demix_fits(plan: Plan, model: Mapping[str, Any], domains: int) -> None:
    """Refuses a DEMix of so many domains that cannot be trained.

    Raises:
        UserError: naming the architecture, or the size of the group.
    """
    workers = seed_resources(plan).workers
    check_splits(model, domains)
    if workers % domains and domains % workers:
        raise PlanError(
            "cluster.seed_gpus does not fit a DEMix",
            found=f"{workers} GPUs for {domains} domains",
            expected=f"a divisor or a multiple of {domains}: a GPU has whole domains, or a domain whole GPUs",
            remedy=f"set cluster.seed_gpus to {domains}, or leave DEMix out of `baselines` and "
            "`study.systems`",
        )


def check_mixture_of_experts(plan: Plan, model: Mapping[str, Any]) -> None:
    """Refuses, before a text is read, a mixture of experts that the plan asks for and that cannot be made.

    Raises:
        UserError: naming the architecture, or the field that no mixture of experts has.
    """
    if plan.merging.mixture_of_experts is not None:
        check_target(model)


def expert_request(prepared: PreparedPlan, domain: PreparedText, start: Start) -> TrainRequest:
    """An expert: (1-s)·U updates on its domain alone, at its own scale of the learning rate, of what the plan
    trains.

    LoRA's matrices are new, and no start has moments of them.
    """
    training = prepared.plan.training
    text = training_text(domain.identity, domain.tokens)
    span = (training.seed_updates, training.updates)
    trains = trains_of(prepared.plan.branching, prepared.model)
    start = replace(start, keep_optimizer=start.keep_optimizer and trains.lora is None)
    request = train_request(prepared, domain.name, "expert", (text,), span, start)
    return at_experts_rate(prepared, replace(request, trains=trains))


def at_experts_rate(prepared: PreparedPlan, request: TrainRequest) -> TrainRequest:
    """The request with its learning rate times the experts' scale."""
    rate = request.training.learning_rate * prepared.plan.branching.learning_rate_scale
    return replace(request, training=request.training.model_copy(update={"learning_rate": rate}))


def seed_start(prepared: PreparedPlan, seed: Ref) -> Start:
    """Branching from the seed, with its optimiser unless the plan resets it or it has none."""
    keep = prepared.plan.branching.optimizer == "keep" and prepared.pretrained is None
    return Start(seed, keep)


def score_request(
    prepared: PreparedPlan, model: Ref, text: PreparedText, split: str, model_name: str
) -> ScoreRequest:
    """One split of a text under a model, computed as an expert is trained."""
    return ScoreRequest(text.name, model_name, model, text.tokens[split], expert_resources(prepared.plan))


def expert_resources(plan: Plan) -> Resources:
    """The group of one expert."""
    cluster = plan.cluster
    return _resources(plan, cluster.gpus_per_expert, cluster.cpus_per_expert)


def seed_resources(plan: Plan) -> Resources:
    """The group of the seed and of the Transformer-LM."""
    return _resources(plan, plan.cluster.seed_gpus, plan.cluster.seed_cpus)


def _resources(plan: Plan, gpus: float, cpus: int) -> Resources:
    workers = max(1, int(gpus))
    cluster = plan.cluster
    on_gpu = gpus > 0
    precision = cluster.precision if cluster.precision != "auto" else "bfloat16" if on_gpu else "float32"
    compiles = on_gpu if cluster.compile == "auto" else cluster.compile == "on"
    how = Resources(
        workers,
        gpus / workers,
        max(1, cpus // workers),
        cluster.micro_batch_blocks,
        precision,
        compiles,
        cluster.sharding if workers > 1 and plan.training.optimizer == "adamw" else "none",
        cluster.activation_checkpointing if on_gpu or cluster.activation_checkpointing == "on" else "off",
    )
    return how if on_gpu else replace(how, micro_batch_blocks=how.blocks_at_once)


def train_request(
    prepared: PreparedPlan,
    label: str,
    role: Role,
    texts: tuple[TrainingText, ...],
    span: tuple[int, int],
    start: Start | None,
) -> TrainRequest:
    """A training of the plan's model by its recipe, from the first update of `span` up to the last."""
    plan = prepared.plan
    return TrainRequest(
        label=label,
        role=role,
        model=prepared.model,
        tokenizer=prepared.tokenizer,
        texts=texts,
        training=plan.training,
        first_update=span[0],
        last_update=span[1],
        start=start,
        pretrained=prepared.pretrained if role == "seed" else None,
        restart_data=role == "expert",
        how=expert_resources(plan) if role == "expert" else seed_resources(plan),
        checkpoint_seconds=60 * plan.cluster.checkpoint_minutes,
        profile=plan.cluster.profile,
    )
