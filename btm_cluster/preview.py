"""`btm plan`: what a run would do, what is done already, and what the rest would cost. Starts nothing, spends nothing.

Walks the same requests as `algorithm.py` and asks the ledger which of them exist; a text not read yet hides what follows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from btm_cluster.algorithm import branches_from_seed, new_domains
from btm_cluster.equations.budget import device_hours, stored_bytes
from btm_cluster.forest import Forest, check_foundation
from btm_cluster.language_model.model import count_parameters
from btm_cluster.language_model.pretrained import pretrained_vocabulary, resolve
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.plan import Plan
from btm_cluster.recipes import (
    Ground,
    block_requests,
    expert_request,
    founders_of,
    ground_of,
    model_config,
    read_requests,
    seed_request,
    seed_start,
    tokenizer_request,
    transformer_lm_request,
)
from btm_cluster.workers import Request, TrainRequest

DONE, NEW, UNKNOWN = "done", "new", "new, its text is not read yet"


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
    vocabulary = _vocabulary(plan)
    model, _ = model_config(plan, vocabulary)
    parameters, non_embedding = count_parameters(model)
    reads = read_requests(plan)
    memos = {request.label: ledger.find(request.ref) for request in reads}
    steps = [Step(f"read {name}", DONE if memo else NEW) for name, memo in memos.items()]
    known = {name: memo for name, memo in memos.items() if memo is not None}
    if len(known) == len(memos):
        ground = _ground(plan, ledger, known, vocabulary)
        steps += _preparation(ground, ledger) + _trainings(ground, ledger, parameters)
    else:
        steps += [Step(name, UNKNOWN) for name in ("tokenizer", "token blocks")]
        steps += _unread_trainings(plan, ledger, parameters)
    return Preview(
        tuple(steps), parameters, non_embedding, plan.cluster.gpus_per_expert > 0, plan.cluster.price_per_gpu_hour
    )


def _vocabulary(plan: Plan) -> int:
    if plan.tokenizer.train is not None:
        return plan.tokenizer.train.vocabulary
    assert plan.tokenizer.pretrained is not None
    return pretrained_vocabulary(resolve(plan.tokenizer.pretrained))


def _ground(plan: Plan, ledger: Ledger, memos: Mapping[str, Artifact], vocabulary: int) -> Ground:
    identities = {name: str(memo.facts["text"]) for name, memo in memos.items()}
    facts = {name: ledger.get(Ref("text", identity)).facts for name, identity in identities.items()}
    skipped = {name: memo.facts["skipped"] for name, memo in memos.items()}
    founders = founders_of(plan, identities, ledger.forest(0))
    return ground_of(plan, identities, facts, skipped, founders, vocabulary)


def _preparation(ground: Ground, ledger: Ledger) -> list[Step]:
    blocks = block_requests(ground)
    missing = sum(ledger.find(request.ref) is None for request in blocks)
    tokenizer = _state(ledger, tokenizer_request(ground.plan, ground.founders))
    state = DONE if not missing else NEW if missing == len(blocks) else f"{missing} of {len(blocks)} shards new"
    return [Step("tokenizer", tokenizer), Step("token blocks", state)]


def _trainings(ground: Ground, ledger: Ledger, parameters: int) -> list[Step]:
    forest = ledger.forest()
    seed = seed_request(ground)
    if forest is not None:
        check_foundation(forest, ground.foundation(seed.ref.identity))
    start = seed_start(ground, seed.ref)
    experts = [expert_request(ground, domain, start) for domain in ground.domains]
    baselines = [transformer_lm_request(ground, seed.ref)] if ground.plan.baselines else []
    rate = _rate(ground.plan, ledger)
    steps = [_training(seed, _state(ledger, seed), parameters, rate)]
    steps += [_training(e, _expert_state(ground, ledger, forest, e), parameters, rate) for e in experts]
    return steps + [_training(b, _state(ledger, b), parameters, rate) for b in baselines]


def _expert_state(ground: Ground, ledger: Ledger, forest: Forest | None, request: TrainRequest) -> str:
    if forest is not None and request.label not in {domain.name for domain in new_domains(ground, forest)}:
        return DONE
    # An expert that starts from an average has an identity that only scoring its text can tell.
    return _state(ledger, request) if branches_from_seed(ground, forest) else NEW


def _state(ledger: Ledger, request: Request) -> str:
    return NEW if ledger.find(request.ref) is None else DONE


def _training(request: TrainRequest, state: str, parameters: int, rate: float | None) -> Step:
    updates = request.last_update - request.first_update
    return _training_step(
        f"{request.role} {request.label}" if request.role == "expert" else request.label,
        state,
        updates,
        request.tokens,
        stored_bytes(parameters, with_optimizer=request.role == "seed"),
        rate,
    )


def _unread_trainings(plan: Plan, ledger: Ledger, parameters: int) -> list[Step]:
    """Sizes follow from the plan alone; identities do not."""
    training, rate = plan.training, _rate(plan, ledger)
    seed = 0 if plan.model.pretrained else training.seed_updates
    later = training.updates - training.seed_updates
    whole, own = len(plan.domains) * training.blocks_per_domain_update, training.blocks_per_domain_update
    rows = [("seed", seed, whole, True)]
    rows += [(f"expert {domain.name}", later, own, False) for domain in plan.domains]
    rows += [(name, later, whole, False) for name in plan.baselines]
    return [
        _training_step(
            name, UNKNOWN, n, n * blocks * training.block_tokens, stored_bytes(parameters, with_optimizer), rate
        )
        for name, n, blocks, with_optimizer in rows
    ]


def _training_step(name: str, state: str, updates: int, tokens: int, size: int, rate: float | None) -> Step:
    return Step(name, state, updates, tokens, size, None if rate is None else device_hours(tokens, rate))


def _rate(plan: Plan, ledger: Ledger) -> float | None:
    """Tokens per second of one GPU (or the CPU group): the plan's, or that of the newest training in the store."""
    if plan.cluster.tokens_per_gpu_second is not None:
        return plan.cluster.tokens_per_gpu_second
    on_gpus = plan.cluster.gpus_per_expert > 0
    notes = [m.note for m in ledger.list_artifacts("model") if m.note.get("tokens_per_second")]
    alike = [note for note in notes if (note["gpus"] > 0) == on_gpus]
    if not alike:
        return None
    newest = max(alike, key=lambda note: note["created"])
    return float(newest["tokens_per_second"]) / (newest["gpus"] or 1)
