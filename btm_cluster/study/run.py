"""A study: the paper's comparison on the plan's texts, for every size and random seed it names.

Trains all systems of one size and random seed, a repeat, from one seed run, and hands what came of it to
`comparison.py`. Everything is an artifact: what is there already is not made again, and a study that was killed goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from btm_cluster.algorithm import prepare, resumed
from btm_cluster.driver import Driver
from btm_cluster.errors import UserError
from btm_cluster.language_model.demix import check_splits, count_demix_parameters
from btm_cluster.language_model.model import count_parameters
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.plan import Plan, SizePlan, StudyPlan
from btm_cluster.recipes import (
    Ground,
    PreparedText,
    demix_request,
    expert_request,
    model_config,
    seed_request,
    seed_start,
    tokenize_requests,
    transformer_lm_request,
    vocabulary_of,
)
from btm_cluster.study.adaptation import adapt
from btm_cluster.study.comparison import Comparison, Models, compare
from btm_cluster.study.controls import random_part, random_part_requests, scratch_request
from btm_cluster.study.mixtures import Members
from btm_cluster.texts import TextReport, report_texts
from btm_cluster.workers import TrainRequest


@dataclass(frozen=True)
class Repeat:
    """One size and random seed."""

    size: str
    ground: Ground
    """Of a plan with that size's model and recipe, and that random seed."""
    seed_shares: tuple[float, ...]
    """Of all forests; the first is the one that is compared with everything."""

    def at(self, seed_share: float) -> Ground:
        """The ground of the same repeat with another seed share."""
        plan = self.ground.plan
        training = plan.training.model_copy(update={"seed_share": seed_share})
        return replace(self.ground, plan=plan.model_copy(update={"training": training}))


@dataclass(frozen=True)
class Study:
    """What a study found out."""

    entries: tuple[Mapping[str, Any], ...]
    """A row for each system, size and random seed: perplexities on test text."""
    texts: tuple[TextReport, ...]
    speeds: tuple[Mapping[str, Any], ...]
    """Of each kind of training: updates and tokens per second."""


def run_study(plan: Plan, driver: Driver) -> Study:
    """Trains and compares everything that `plan.study` names; without one, the plan's own model with all rivals and controls.

    Raises:
        UserError: a study whose shares leave a seed or an expert without an update.
        StepError: something could not be trained; the rest is kept, and the same command goes on.
    """
    study = plan.study or StudyPlan()
    repeats = repeats_of(plan.model_copy(update={"study": study}), driver)
    entries: list[Mapping[str, Any]] = []
    speeds: list[Mapping[str, Any]] = []
    for repeat in repeats:
        models, trained = train_repeat(repeat, driver)
        comparison = compare(repeat.ground, models, driver)
        if "adapted" in study.systems:
            rows = adapt(repeat.ground, models.transformer_lm, models.members[0], driver)
            comparison = replace(comparison, rows=comparison.rows | rows)
        entries += entries_of(repeat, comparison)
        speeds += [_speed(repeat, request, model) for request, model in trained]
    return Study(tuple(entries), tuple(report_texts(repeats[0].ground, driver)), tuple(speeds))


def repeats_of(plan: Plan, driver: Driver) -> list[Repeat]:
    """Every size with every random seed; texts and tokenizer are prepared once for all."""
    study = plan.study
    assert study is not None
    sizes = study.sizes or (SizePlan.model_construct(name="model", model=plan.model, training=plan.training),)
    if plan.model.pretrained is not None and not study.sizes:
        raise UserError(
            "a study grows its own seeds", found="model.pretrained", remedy="give `study.sizes` with shapes"
        )
    for size in sizes:
        for share in (size.training.seed_share, *study.seed_shares):
            _check_share(size, share)
    base = prepare(_variant(plan, sizes[0], study.random_seeds[0]), driver)
    for text in base.texts:
        if not text.tokens["development"]:
            raise UserError(
                f"the text {text.name!r} has no development text",
                expected="some, since a study fits and chooses on it",
                remedy="name `development` files for it",
            )
    repeats = []
    for size in sizes:
        model, _ = model_config(_variant(plan, size, 0), vocabulary_of(plan))
        if "demix" in study.systems:
            check_splits(model, len(plan.domains))
        for random_seed in study.random_seeds:
            ground = replace(base, plan=_variant(plan, size, random_seed), model=model)
            repeats.append(Repeat(size.name, ground, _seed_shares(study, sizes, size, random_seed)))
    return repeats


def _variant(plan: Plan, size: SizePlan, random_seed: int) -> Plan:
    training = size.training.model_copy(update={"random_seed": random_seed})
    if training.block_tokens != plan.training.block_tokens:
        raise UserError(
            f"study.sizes: {size.name} has blocks of another length",
            found=f"{training.block_tokens} tokens",
            expected=f"{plan.training.block_tokens}, the plan's: texts are cut into blocks once for all sizes",
            remedy="give the same training.block_tokens",
        )
    return plan.model_copy(update={"model": size.model, "training": training})


def _seed_shares(study: StudyPlan, sizes: Sequence[SizePlan], size: SizePlan, random_seed: int) -> tuple[float, ...]:
    own = size.training.seed_share
    if size is not sizes[0] or random_seed != study.random_seeds[0]:
        return (own,)
    return (own, *(share for share in sorted(study.seed_shares) if share != own))


def _check_share(size: SizePlan, share: float) -> None:
    updates = size.training.updates
    is_without_seed = share == 0 and share != size.training.seed_share
    if not is_without_seed and not 0 < round(share * updates) < updates:
        raise UserError(
            f"a seed share of {share} leaves the seed or the experts of {size.name} no update",
            found=f"{round(share * updates)} of {updates} updates for the seed",
            remedy="choose a share between, or more updates; `study.seed_shares` alone may hold 0",
        )


def train_repeat(repeat: Repeat, driver: Driver) -> tuple[Models, list[tuple[TrainRequest, Artifact]]]:
    """All models of a repeat: first the one run that all seeds lie on, then what branches from it, then what follows it."""
    ground = repeat.ground
    assert ground.plan.study is not None
    systems = ground.plan.study.systems
    grounds = {share: repeat.at(share) for share in repeat.seed_shares}
    seeds = {share: seed_request(grounds[share]) for share in repeat.seed_shares if share}
    whole = transformer_lm_request(ground, seeds[repeat.seed_shares[0]].ref)
    whole = replace(whole, milestones=tuple(sorted(seed.last_update for seed in seeds.values())))
    scratch = [scratch_request(ground, d, i) for i, d in enumerate(ground.domains)] if 0 in grounds else []
    demix = [demix_request(ground)] if "demix" in systems else []
    trained = _train([whole, *demix, *scratch], driver)
    _fill_in(list(seeds.values()), driver)

    def branches(texts: Sequence[PreparedText], share: float) -> list[TrainRequest]:
        at, start = grounds[share], seed_start(ground, seeds[share].ref)
        # A label of its own, since all of them train at once.
        return [replace(expert_request(at, text, start), label=f"{text.name}-{share}") for text in texts]

    first = repeat.seed_shares[0]
    experts = {share: branches(ground.domains, share) for share in seeds}
    parts = _random_parts(ground, driver) if "random-split" in systems else []
    dealt = branches(parts, first)
    trained += _train([*(expert for share in seeds for expert in experts[share]), *dealt], driver)
    experts |= {0.0: scratch} if scratch else {}

    def members(system: str, share: float, texts: Sequence[PreparedText], requests: Sequence[TrainRequest]) -> Members:
        models = tuple((text.name, request.ref) for text, request in zip(texts, requests, strict=True))
        return Members(system, share, seeds[share].ref if share else None, models)

    forests = [members("forest", share, ground.domains, experts[share]) for share in repeat.seed_shares]
    others = [members("random-split", first, parts, dealt)] if dealt else []
    others += [Members("demix", None, None, _named(ground, request), averaged=False) for request in demix]
    forests[0] = replace(forests[0], many_ways=True)
    models = (*forests[0].models, ("seed", seeds[first].ref))
    with_seed = replace(forests[0], system="forest with its seed", models=models, averaged=False)
    return Models(whole.ref, (forests[0], with_seed, *forests[1:], *others)), trained


def _named(ground: Ground, demix: TrainRequest) -> tuple[tuple[str, Ref], ...]:
    """A DEMix's parts by domain."""
    names = {text: domain for domain, text in ground.founders}
    return tuple((names[part.text], part.ref) for part in demix.parts)


def _train(requests: Sequence[TrainRequest], driver: Driver) -> list[tuple[TrainRequest, Artifact]]:
    models = driver.require(driver.workers.train, [resumed(request, driver.ledger) for request in requests])
    return list(zip(requests, models, strict=True))


def _fill_in(seeds: Sequence[TrainRequest], driver: Driver) -> None:
    """Trains the seeds that a Transformer-LM of an earlier run did not leave on its way."""
    missing = sorted((s for s in seeds if driver.ledger.find(s.ref) is None), key=lambda seed: seed.last_update)
    if missing:
        _train([replace(missing[-1], milestones=tuple(seed.last_update for seed in missing[:-1]))], driver)


def _random_parts(ground: Ground, driver: Driver) -> list[PreparedText]:
    requests = random_part_requests(ground)
    memos = driver.require(driver.workers.prepare, requests)
    parts = [random_part(ground, r, memo, driver.ledger) for r, memo in zip(requests, memos, strict=True)]
    block_tokens = ground.plan.training.block_tokens
    shards = [
        shard
        for part in parts
        for shard in tokenize_requests(part.name, part.identity, part.facts, ground.tokenizer, block_tokens)["train"]
    ]
    driver.require(driver.workers.prepare, shards)
    return parts


def entries_of(repeat: Repeat, comparison: Comparison) -> list[Mapping[str, Any]]:
    """The comparison as plain values, one entry for each system."""
    plan = repeat.ground.plan
    tokens = plan.training.updates * len(repeat.ground.founders)
    tokens *= plan.training.blocks_per_domain_update * plan.training.block_tokens
    parameters = count_parameters(repeat.ground.model)[1]
    demix_parameters = count_demix_parameters(repeat.ground.model, len(repeat.ground.founders))[1]
    common = {
        "size": repeat.size,
        "tokens": tokens,
        "experts": len(repeat.ground.domains),
        "random_seed": plan.training.random_seed,
    }
    return [
        common | {"non_embedding_parameters": demix_parameters if entry["system"] == "demix" else parameters} | entry
        for entry in comparison.entries()
    ]


def _speed(repeat: Repeat, request: TrainRequest, model: Artifact) -> Mapping[str, Any]:
    note = model.note
    rate = note["tokens_per_second"] / (request.blocks_per_update * request.training.block_tokens)
    return {
        "size": repeat.size,
        "role": request.role,
        "blocks_per_update": request.blocks_per_update,
        "updates_per_second": round(rate, 2),
        "tokens_per_second": note["tokens_per_second"],
        "gpus": note["gpus"],
        "device": note["device"],
    }
