"""From a plan to the requests that read its texts, make its tokenizer and tokenize with it, and to what is known
of that tokenizer before any text is read.

Looks at files that the plan points to: their stamps, a pretrained tokenizer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from btm_cluster.data.sources import fingerprint, refuse_together, refuse_unread
from btm_cluster.data.tokenizer import END_OF_TEXT
from btm_cluster.driver.chat_template import chat_template_of
from btm_cluster.errors import TextError
from btm_cluster.language_model.pretrained import pretrained_tokenizer
from btm_cluster.ledger import Ref
from btm_cluster.plan import Plan, TextPlan
from btm_cluster.requests import ImportTokenizer, ReadText, Tokenize, TrainTokenizer


def read_requests(plan: Plan) -> list[ReadText]:
    """One for each domain and target.

    Raises:
        TextError: naming every text whose files or data set are not there, or of a kind that is not read.
    """
    targets = {target.name for target in plan.targets}
    requests: list[ReadText] = []
    missing: list[TextError] = []
    for source in plan.texts:
        try:
            stamp = fingerprint(source)
            if plan.reading.bad_documents == "refuse":
                refuse_unread(source, stamp)
        except TextError as exc:
            missing.append(exc)
        else:
            requests.append(read_request(plan, source, stamp, source.name in targets))
    refuse_together(missing)
    return requests


def read_request(
    plan: Plan,
    source: TextPlan,
    stamp: Mapping[str, Any],
    is_target: bool = False,
    most_bytes: int | None = None,
) -> ReadText:
    """The request that reads one text, by its fingerprint.

    Raises:
        PlanError: it has messages, and no chat template can render them.
    """
    template = None if source.messages is None else chat_template_of(plan)
    return ReadText(source.name, source, plan.reading, is_target, stamp, most_bytes, template)


def tokenizer_request(plan: Plan, founders: Sequence[tuple[str, str]]) -> TrainTokenizer | ImportTokenizer:
    """Train one on the founding domains, or import the pretrained one."""
    if plan.tokenizer.train is not None:
        return TrainTokenizer("tokenizer", tuple(text for _, text in founders), plan.tokenizer.train)
    assert plan.tokenizer.pretrained is not None
    return pretrained_tokenizer(plan.tokenizer.pretrained, plan.tokenizer.first_token)[0]


def tokenize_requests(
    name: str, text: str, facts: Mapping[str, Any], tokenizer: Ref, plan: Plan
) -> dict[str, tuple[Tokenize, ...]]:
    """One for each shard of a text, by split."""
    template = chat_template_of(plan) if facts.get("conversations") else None
    block_tokens = plan.training.block_tokens
    return {
        split: tuple(
            Tokenize(name, text, split, shard, tokenizer, block_tokens, template)
            for shard in counts["shards"]
        )
        for split, counts in facts["splits"].items()
    }


def vocabulary_of(plan: Plan) -> int:
    """Number of tokens of the plan's tokenizer, known before any text is read."""
    if plan.tokenizer.train is not None:
        return plan.tokenizer.train.vocabulary
    assert plan.tokenizer.pretrained is not None
    return pretrained_tokenizer(plan.tokenizer.pretrained, plan.tokenizer.first_token)[1].vocabulary


def first_token_of(plan: Plan) -> str:
    """The token after which every block is read, as the plan's tokenizer spells it."""
    if plan.tokenizer.pretrained is None:
        return END_OF_TEXT
    return pretrained_tokenizer(plan.tokenizer.pretrained, plan.tokenizer.first_token)[0].first_token
