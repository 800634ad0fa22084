"""Requests of the controls that a study sets beside forest and Transformer-LM.

A forest is only worth something if it beats what is not the idea of the paper: experts on random splits,
experts without a seed, a DEMix that has a seed, Transformer-LM and DEMix at the learning rate that the experts
have, and the Transformer-LM given the development text that the forest's priors are fitted on
(`adaptation.py`).
"""

from dataclasses import replace

from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText, text_of, training_text
from btm_cluster.driver.recipes import as_demix, at_experts_rate, seed_start, train_request
from btm_cluster.driver.text_requests import tokenize_requests
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import ShuffleTexts, TrainRequest

SEEDED_DEMIX = "demix-from-seed"
SEEDED_DEMIX_AT_EXPERTS_RATE = f"{SEEDED_DEMIX} at the experts' rate"
DEMIXES = ("demix", SEEDED_DEMIX, SEEDED_DEMIX_AT_EXPERTS_RATE)


def scratch_request(prepared: PreparedPlan, domain: PreparedText, number: int) -> TrainRequest:
    """An expert without a seed: the whole budget on its domain alone, from a
    random initialisation of its own."""
    training = prepared.plan.training
    own = training.model_copy(update={"random_seed": training.random_seed + 1 + number})
    text = training_text(domain.identity, domain.tokens)
    request = train_request(prepared, domain.name, "expert", (text,), (0, training.updates), None)
    return replace(request, training=own)


def seeded_demix_request(prepared: PreparedPlan, seed: Ref) -> TrainRequest:
    """A DEMix that branches from the seed, as experts do, and shares all but
    its feed-forwards from there on."""
    training = prepared.plan.training
    span, start = (training.seed_updates, training.updates), seed_start(prepared, seed)
    request = train_request(prepared, "demix-from-seed", "demix", prepared.founding_texts, span, start)
    return as_demix(request)


def transformer_lm_at_experts_rate_request(prepared: PreparedPlan, seed: Ref) -> TrainRequest:
    """The Transformer-LM from the seed on as experts are trained: at their scale of the learning rate."""
    training = prepared.plan.training
    span, start = (training.seed_updates, training.updates), seed_start(prepared, seed)
    label = "transformer-lm-at-experts-rate"
    return at_experts_rate(
        prepared, train_request(prepared, label, "transformer-lm", prepared.founding_texts, span, start)
    )


def seeded_demix_at_experts_rate_request(prepared: PreparedPlan, seed: Ref) -> TrainRequest:
    """A DEMix that branches from the seed, at the experts' scale of the learning rate."""
    request = seeded_demix_request(prepared, seed)
    return at_experts_rate(prepared, replace(request, label=f"{request.label}-at-experts-rate"))


def random_part_requests(prepared: PreparedPlan) -> list[ShuffleTexts]:
    """The founding domains' training documents, dealt at random into as many texts."""
    texts = tuple(text for _, text in prepared.founders)
    return [ShuffleTexts(f"random-{part}", texts, part, random_seed=0) for part in range(len(texts))]


def random_part(
    prepared: PreparedPlan, request: ShuffleTexts, read_result: Artifact, ledger: Ledger
) -> PreparedText:
    """One of them as a text to train on."""
    identity = text_of(read_result)
    facts = ledger.get(Ref("text", identity)).facts
    shards = tokenize_requests(request.label, identity, facts, prepared.tokenizer, prepared.plan)
    tokens = {split: tuple(shard.ref for shard in requests) for split, requests in shards.items()}
    return PreparedText(request.label, False, identity, facts, {}, tokens)
