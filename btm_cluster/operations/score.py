"""`btm score`: how surprising a text is to each expert and to the ensemble, and which domain it is of."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from btm_cluster.data.corpus import usable_documents
from btm_cluster.data.sources import fingerprint, read_documents, refuse_unread
from btm_cluster.driver.driver import Driver
from btm_cluster.equations.gates import Gate
from btm_cluster.equations.posterior import uniform_prior
from btm_cluster.errors import UserError
from btm_cluster.language_model.document_scores import DocumentScorer, NamedText
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.mixing.fitting import FULL, Mixing
from btm_cluster.operations.ensemble import find_target, open_engine, planned_mixture
from btm_cluster.plan import Plan, ReadingPlan, TextPlan
from btm_cluster.steps.stored import open_tokenizer

STRING = "--text"
"""The source of a text that is no file."""


def reading_of(bad_documents: str) -> ReadingPlan:
    """How files become documents: of any length."""
    return ReadingPlan.model_validate({"bad_documents": bad_documents, "longest_document_characters": 10**9})


def check_sources(sources: Sequence[TextPlan], reading: ReadingPlan) -> None:
    """Refuses files that are not there or cannot be read, before anything is opened.

    Raises:
        TextError: naming one.
    """
    for source in sources:
        stamp = fingerprint(source)
        if reading.bad_documents == "refuse":
            refuse_unread(source, stamp)


def documents_of(sources: Sequence[TextPlan], reading: ReadingPlan, bad: Counter[str]) -> Iterator[NamedText]:
    """The documents of all sources, streaming. What is skipped is counted in `bad` by reason.

    Raises:
        TextError: a file that cannot be read to its end, or a bad document where `reading` refuses them.
    """
    for source in sources:
        (named,) = source.text
        documents = usable_documents(source.name, read_documents(source, reading), reading, bad)
        for number, document in enumerate(documents, 1):
            yield NamedText(named, number, document.text)


def scorer_of_store(ledger: Ledger) -> DocumentScorer:
    """The newest version of the forest in a store, mixed by the paper's posterior:
    all experts alike before a text begins.

    Raises:
        UserError: there is no forest in the store, or it has no expert.
    """
    forest = ledger.log.newest()
    if forest is None or not forest.experts:
        raise UserError(
            f"there is no forest with experts in {ledger.storage.location}",
            remedy="check --store, which is relative to this folder; `btm run` grows one",
        )
    models = {expert.domain: Ref("model", expert.identity) for expert in forest.experts}
    gate = Mixing(uniform_prior(torch.zeros(len(models), dtype=torch.float64)), FULL)
    tokenizer = Ref("tokenizer", forest.foundation.tokenizer)
    return _open(ledger, models, gate, tokenizer, forest.foundation.block_tokens, list(forest.domains))


def scorer_of_plan(plan: Plan, target: str | None, driver: Driver) -> DocumentScorer:
    """The forest of a plan, mixed as its `merging` says, with what was fitted for the text `target`.

    Raises:
        UserError: no forest yet, or a target that is unknown or was taken out of it.
    """
    grown, text = find_target(plan, target, driver)
    models, gate = planned_mixture(grown, text, driver)
    domains = list(grown.forest.domains)
    return _open(driver.ledger, models, gate, grown.prepared.tokenizer, plan.training.block_tokens, domains)


def _open(
    ledger: Ledger,
    models: dict[str, Ref],
    gate: Gate,
    tokenizer: Ref,
    block_tokens: int,
    domains: Sequence[str],
) -> DocumentScorer:
    opened, names = open_tokenizer(ledger, tokenizer), list(models)
    engine = open_engine(ledger, list(models.values()), gate, opened, block_tokens)
    return DocumentScorer(engine.score, opened, block_tokens, names, [names.index(one) for one in domains])
