"""`btm score`: how surprising a text is to each expert and to the ensemble, and which domain it is of."""

from collections import Counter
from collections.abc import Iterator, Sequence

from btm_cluster.data.corpus import usable_documents
from btm_cluster.data.sources import fingerprint, read_documents, refuse_unread
from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.driver.driver import Driver
from btm_cluster.language_model.document_scores import DocumentScorer, NamedText
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.ledger import Ledger
from btm_cluster.operations.ensemble import mixture_of_plan
from btm_cluster.plan import Plan, ReadingPlan, TextPlan
from btm_cluster.steps.mixture import Mixture, mixture_of_store, open_engine
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


def scorer_of_store(ledger: Ledger, version: int | None = None) -> DocumentScorer:
    """The forest in a store, mixed by the paper's posterior.

    Raises:
        UserError: there is no forest in the store, no such version, or it has no expert.
    """
    return open_scorer(ledger, mixture_of_store(ledger, version))


def scorer_of_plan(plan: Plan, target: str | None, driver: Driver) -> DocumentScorer:
    """The forest of a plan, mixed as its `merging` says, with what was fitted for the text `target`.

    Raises:
        UserError: no forest yet, or a target that is unknown or was taken out of it.
    """
    return open_scorer(driver.ledger, mixture_of_plan(plan, driver, target))


def open_scorer(ledger: Ledger, mixture: Mixture) -> DocumentScorer:
    """A mixture's models, loaded: all of them, since each has figures of its own."""
    tokenizer = open_tokenizer(ledger, mixture.tokenizer)
    return scorer_by(open_engine(ledger, mixture, tokenizer), mixture, tokenizer)


def scorer_by(engine: EnsembleEngine, mixture: Mixture, tokenizer: TextTokenizer) -> DocumentScorer:
    """Scores documents by a mixture's opened engine."""
    names = list(mixture.models)
    domains = [names.index(one) for one in mixture.domains]
    return DocumentScorer(engine.score, tokenizer, mixture.block_tokens, names, domains)
