"""Requests of the controls that a study sets beside forest and Transformer-LM.

A forest is only worth something if it beats what is not the idea of the paper: experts on random splits, experts without a
seed, and the Transformer-LM given the development text that the forest's priors are fitted on.
"""

from dataclasses import replace

from btm_cluster.forest import Parent
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.recipes import Ground, PreparedText, tokenize_requests, train_request
from btm_cluster.workers import ShuffleTexts, Start, TrainingText, TrainRequest

CONTINUED_BLOCKS_PER_UPDATE = 8


def scratch_request(ground: Ground, domain: PreparedText, number: int) -> TrainRequest:
    """An expert without a seed: the whole budget on its domain alone, from a random initialisation of its own."""
    training = ground.plan.training
    own = training.model_copy(update={"random_seed": training.random_seed + 1 + number})
    text = TrainingText(domain.identity, domain.tokens["train"])
    request = train_request(ground, domain.name, "expert", (text,), (0, training.updates), None)
    return replace(request, training=own)


def continued_request(
    ground: Ground, text: PreparedText, baseline: Ref, blocks: int, learning_rate: float
) -> TrainRequest:
    """The Transformer-LM carried on over a text's first development blocks, with a milestone after 1, 2 and 4 of 8 passes."""
    count = min(CONTINUED_BLOCKS_PER_UPDATE, blocks)
    epoch = -(-blocks // count)
    training = ground.plan.training.model_copy(
        update={"updates": 8 * epoch, "blocks_per_domain_update": count, "learning_rate": learning_rate}
    )
    trained_on = TrainingText(f"{text.identity}/development/{blocks}", text.tokens["development"], blocks)
    start = Start(baseline, (Parent(baseline.identity, 1.0),), keep_optimizer=False)
    request = train_request(ground, f"continued on {text.name}", "expert", (trained_on,), (0, 8 * epoch), start)
    # Too short to be worth compiling.
    how = replace(request.how, compile=False)
    return replace(request, training=training, milestones=(epoch, 2 * epoch, 4 * epoch), how=how)


def random_part_requests(ground: Ground) -> list[ShuffleTexts]:
    """The founding domains' training documents, dealt at random into as many texts."""
    texts = tuple(text for _, text in ground.founders)
    return [ShuffleTexts(f"random-{part}", texts, part, random_seed=0) for part in range(len(texts))]


def random_part(ground: Ground, request: ShuffleTexts, memo: Artifact, ledger: Ledger) -> PreparedText:
    """One of them as a text to train on."""
    identity = str(memo.facts["text"])
    facts = ledger.get(Ref("text", identity)).facts
    shards = tokenize_requests(request.label, identity, facts, ground.tokenizer, ground.plan.training.block_tokens)
    tokens = {split: tuple(shard.ref for shard in requests) for split, requests in shards.items()}
    return PreparedText(request.label, False, identity, facts, {}, tokens)
