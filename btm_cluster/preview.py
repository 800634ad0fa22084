"""`btm plan`: what a run would do, what is done already, and what the rest would cost. Starts nothing, spends nothing.

Walks the same requests as `algorithm.py` and asks the ledger which of them exist. A text not read yet hides what depends
on it: every training while no forest is founded, its own expert afterwards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from btm_cluster.cluster_ensemble import check_clusters
from btm_cluster.equations.budget import device_hours, stored_bytes
from btm_cluster.forest import Forest
from btm_cluster.founding import check_fits
from btm_cluster.ground import (
    HELD_OUT,
    Ground,
    block_requests,
    first_token_of,
    ground_of,
    model_config,
    read_requests,
    tokenizer_request,
    vocabulary_of,
    with_forests_texts,
    without_texts,
    without_withdrawn,
)
from btm_cluster.language_model.model import count_parameters
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.outstanding import asks_of, new_domains, rivals, starts_from_seed
from btm_cluster.plan import Plan
from btm_cluster.recipes import (
    check_demix,
    expert_request,
    score_request,
    seed_request,
    seed_start,
)
from btm_cluster.requests import Request, TrainRequest
from btm_cluster.room import Ask

DONE, NEW, UNREAD = "done", "new", "unknown until its text is read"


@dataclass(frozen=True)
class Step:
    """One line of the preview."""

    name: str
    state: str
    updates: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    device_hours: float | None = None
    """GPU-hours, or hours of the CPU group; None where no rate is known."""


@dataclass(frozen=True)
class Preview:
    """All steps of a plan, and what the new ones cost together."""

    steps: tuple[Step, ...]
    parameters: int
    non_embedding_parameters: int
    on_gpus: bool
    price_per_gpu_hour: float | None
    first_token: str
    """The token after which every block is read."""
    notes: tuple[str, ...] = ()
    """What the steps do not say of themselves."""
    asks: tuple[Ask, ...] = ()
    """The groups that the trainings to come ask for, with the resources of their checkpoints where they have any."""

    @property
    def device_hours(self) -> float | None:
        """Of the trainings that are new; None while a rate is missing."""
        hours = [step.device_hours for step in self.steps if step.updates and step.state != DONE]
        return None if any(h is None for h in hours) else sum(h for h in hours if h is not None)

    @property
    def money(self) -> float | None:
        """At the plan's price."""
        hours = self.device_hours
        known = self.on_gpus and hours is not None and self.price_per_gpu_hour is not None
        return hours * self.price_per_gpu_hour if known else None  # type: ignore[operator]

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return asdict(self) | {"device_hours": self.device_hours, "money": self.money}


def preview(plan: Plan, ledger: Ledger) -> Preview:
    """What a run of `plan` would do with this store.

    Raises:
        UserError: whatever a run would refuse before it spends anything.
    """
    forest = ledger.log.newest()
    check_clusters(plan, list(dict.fromkeys([*(d.name for d in plan.domains), *(forest.domains if forest else ())])))
    plan = without_withdrawn(plan, forest)
    reads = read_requests(plan)
    model = model_config(plan, vocabulary_of(plan))
    check_demix(plan, model[0], ledger.log.version(0))
    parameters, non_embedding = count_parameters(model[0])
    memos = dict(zip([request.label for request in reads], ledger.find_all([r.ref for r in reads]), strict=True))
    known = {name: memo for name, memo in memos.items() if memo is not None}
    steps = [_reading(name, memo, ledger) for name, memo in memos.items()]
    rate = _rate(plan, ledger)
    if ledger.log.version(0) is not None or len(known) == len(memos):  # then all founding texts are known
        parts = {part: tuple(t for t in getattr(plan, part) if t.name in known) for part in ("domains", "targets")}
        ground, unread = ground_of(plan.model_copy(update=parts), known, model, ledger), len(known) < len(memos)
        if forest is not None:
            check_fits(ground, forest, ledger)
        steps += _preparation(ground, ledger, unread) + _trainings(ground, ledger, parameters, rate)
        steps += _unread_experts(plan, [d.name for d in plan.domains if d.name not in known], parameters, rate)
        steps.append(_scores(ground, ledger, unread))
    else:
        steps += [Step("tokenizer", _unread_tokenizer(plan, ledger)), Step("token blocks", UNREAD)]
        seed = seed_request(without_texts(plan, model, ledger))
        seed_state = UNREAD if seed.pretrained is None else _state(ledger, seed)
        steps += [*_unread_trainings(plan, seed_state, parameters, rate), Step("scores", UNREAD)]
    return Preview(
        tuple(steps),
        parameters,
        non_embedding,
        plan.cluster.gpus_per_expert > 0,
        plan.cluster.price_per_gpu_hour,
        first_token_of(plan),
        tuple(_notes(plan)),
        asks_of(plan, known, model, ledger),
    )


def _notes(plan: Plan) -> Iterator[str]:
    training = plan.training
    if plan.cluster.price_per_gpu_hour is not None and not plan.cluster.gpus_per_expert:
        yield "`cluster.price_per_gpu_hour` prices nothing: experts train on CPU (`cluster.gpus_per_expert` is 0)"
    if plan.model.pretrained is None:
        return
    if not training.seed_updates:
        yield f"the pretrained model is the seed: experts train all {training.updates:,} updates"
        return
    yield (
        f"the pretrained model is the seed, and `training.seed_share` is {training.seed_share:g}: updates 1 to "
        f"{training.seed_updates:,} of {training.updates:,} are never made, and experts begin at that point of the "
        "learning-rate line; without `seed_share` they train all"
    )


def _unread_tokenizer(plan: Plan, ledger: Ledger) -> str:
    """A pretrained tokenizer hangs on no text."""
    return UNREAD if plan.tokenizer.pretrained is None else _state(ledger, tokenizer_request(plan, ()))


def _reading(name: str, memo: Artifact | None, ledger: Ledger) -> Step:
    if memo is None:
        return Step(f"read {name}", NEW)
    text = ledger.get(Ref("text", str(memo.facts["text"])))
    return Step(f"read {name}", DONE, stored_bytes=sum(blob.size_bytes for blob in text.blobs))


def _preparation(ground: Ground, ledger: Ledger, unread: bool) -> list[Step]:
    blocks = block_requests(ground)
    found = [artifact for artifact in ledger.find_all([request.ref for request in blocks]) if artifact is not None]
    size = sum(blob.size_bytes for artifact in found for blob in artifact.blobs)
    tokenizer = _state(ledger, tokenizer_request(ground.plan, ground.founders))
    tokenized = Step("token blocks", _share_done(len(found), len(blocks), unread), stored_bytes=size)
    return [Step("tokenizer", tokenizer), tokenized]


def _scores(ground: Ground, ledger: Ledger, unread: bool) -> Step:
    """Of every model that is no average, on all held-out text."""
    forest, seed = ledger.log.newest(), seed_request(ground).ref
    texts = (ground if forest is None or unread else with_forests_texts(ground, forest, ledger)).texts
    models = {seed, *(Ref("model", expert.identity) for expert in (forest.experts if forest else ()))}
    new = new_domains(ground, forest) if forest is not None else list(ground.domains)
    from_seed = [domain for domain in new if starts_from_seed(ground, forest, domain)]
    models |= {expert_request(ground, domain, seed_start(ground, seed)).ref for domain in from_seed}
    new = [domain for domain in new if domain not in from_seed]
    for rival in rivals(ground):
        models |= {part.ref for part in rival.parts} if rival.is_demix else {rival.ref}
    parts = [(text, split) for text in texts for split in HELD_OUT if text.tokens[split]]
    scores = ledger.find_all([score_request(ground, model, *part).ref for model in models for part in parts])
    found = sum(artifact is not None for artifact in scores)
    return Step("scores", _share_done(found, (len(models) + len(new)) * len(parts), unread))


def _share_done(found: int, total: int, unread: bool) -> str:
    if unread:
        return f"{found} of {total} done, and more once all texts are read"
    return DONE if found == total else NEW if not found else f"{total - found} of {total} new"


def _trainings(ground: Ground, ledger: Ledger, parameters: int, rate: float | None) -> list[Step]:
    forest = ledger.log.newest()
    seed = seed_request(ground)
    start = seed_start(ground, seed.ref)
    experts = [expert_request(ground, domain, start) for domain in ground.domains]
    steps = [_training(seed, _state(ledger, seed), parameters, rate)]
    steps += [_training(e, _expert_state(ground, ledger, forest, e), parameters, rate) for e in experts]
    return steps + [_training(r, _state(ledger, r), parameters, rate) for r in rivals(ground)]


def _expert_state(ground: Ground, ledger: Ledger, forest: Forest | None, request: TrainRequest) -> str:
    new = new_domains(ground, forest) if forest is not None else ground.domains
    domain = next((domain for domain in new if domain.name == request.label), None)
    if domain is None:
        return DONE
    # An expert that starts from an average has an identity that only scoring its text can tell.
    return _state(ledger, request) if starts_from_seed(ground, forest, domain) else NEW


def _state(ledger: Ledger, request: Request) -> str:
    return NEW if ledger.find(request.ref) is None else DONE


def _training(request: TrainRequest, state: str, parameters: int, rate: float | None) -> Step:
    updates = request.last_update - max([request.first_update, *request.milestones])  # up to those it is another step's
    return _training_step(
        f"{request.role} {request.label}" if request.role == "expert" else request.label,
        state,
        updates,
        updates * request.blocks_per_update * request.training.block_tokens,
        stored_bytes(parameters, request.role == "seed" and request.pretrained is None) * max(1, len(request.parts)),
        rate,
    )


def _unread_trainings(plan: Plan, seed_state: str, parameters: int, rate: float | None) -> list[Step]:
    """Sizes follow from the plan alone; identities do not."""
    training, pretrained = plan.training, plan.model.pretrained is not None
    tokens = len(plan.domains) * training.blocks_per_domain_update * training.block_tokens
    seed, later = 0 if pretrained else training.seed_updates, training.updates - training.seed_updates
    size, with_optimizer = stored_bytes(parameters, False), stored_bytes(parameters, not pretrained)
    steps = [_training_step("seed", seed_state, seed, seed * tokens, with_optimizer, rate)]
    steps += _unread_experts(plan, [domain.name for domain in plan.domains], parameters, rate)
    if "transformer-lm" in plan.baselines:
        steps.append(_training_step("transformer-lm", UNREAD, later, later * tokens, size, rate))
    if "demix" in plan.baselines:
        size *= len(plan.domains)
        steps.append(_training_step("demix", UNREAD, training.updates, training.updates * tokens, size, rate))
    return steps


def _unread_experts(plan: Plan, names: Sequence[str], parameters: int, rate: float | None) -> list[Step]:
    training = plan.training
    updates = training.updates - training.seed_updates
    tokens = updates * training.blocks_per_domain_update * training.block_tokens
    size = stored_bytes(parameters, False)
    return [_training_step(f"expert {name}", UNREAD, updates, tokens, size, rate) for name in names]


def _training_step(name: str, state: str, updates: int, tokens: int, size: int, rate: float | None) -> Step:
    return Step(name, state, updates, tokens, size, None if rate is None else device_hours(tokens, rate))


def _rate(plan: Plan, ledger: Ledger) -> float | None:
    """Tokens per second of one GPU (or the CPU group): the plan's, or that of the newest training in the store."""
    if plan.cluster.tokens_per_gpu_second is not None:
        return plan.cluster.tokens_per_gpu_second
    on_gpus = plan.cluster.gpus_per_expert > 0
    notes = [model.note for model in ledger.list_artifacts("model")]
    alike = [note for note in notes if note.get("tokens_per_second") and (note["gpus"] > 0) == on_gpus]
    if not alike:
        return None
    newest = max(alike, key=lambda note: note["created"])
    return float(newest["tokens_per_second"]) / (newest["gpus"] or 1)
