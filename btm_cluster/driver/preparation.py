"""From a plan to token blocks: its texts are read and tokenized by the
workers, after what cannot fit is refused."""

from btm_cluster.data.first_look import fills_no_block
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.founding import check_foundation, check_texts
from btm_cluster.driver.prepared_plan import (
    PreparedPlan,
    block_requests,
    model_config,
    prepared_from,
    without_texts,
    without_withdrawn,
)
from btm_cluster.driver.recipes import check_demix, check_mixture_of_experts, seed_request
from btm_cluster.driver.text_requests import read_requests, tokenizer_request, vocabulary_of
from btm_cluster.plan import Plan


def prepare(plan: Plan, driver: Driver) -> PreparedPlan:
    """Texts to documents, documents to token blocks, and the configuration that all models share."""
    prepared = read(plan, driver)
    tokenize(prepared, driver)
    return prepared


def read(plan: Plan, driver: Driver) -> PreparedPlan:
    """Texts to documents. From here on all is known that is made of them."""
    forest = driver.ledger.log.newest()
    plan = without_withdrawn(plan, forest)
    requests = read_requests(plan)
    model = model_config(plan, vocabulary_of(plan))  # a wrong model is refused before a text is read
    check_demix(plan, model[0], driver.ledger.log.version(0))
    check_mixture_of_experts(plan, model[0])
    bare = without_texts(plan, model, driver.ledger)
    if forest is not None:
        check_foundation(bare, forest, driver.ledger)
    if model[1] is not None:  # it needs no text, and may turn out to be unusable
        driver.require([tokenizer_request(plan, ()), seed_request(bare)])
    read_results = {
        text.name: read_result for text, read_result in zip(plan.texts, driver.require(requests), strict=True)
    }
    prepared = prepared_from(plan, read_results, model, driver.ledger)
    if forest is not None:  # what does not fit is refused before anything is made
        check_texts(prepared, forest, driver.ledger)
    return prepared


def tokenize(prepared: PreparedPlan, driver: Driver) -> None:
    """Documents to token blocks.

    Raises:
        TextError: a text has no block of a split.
    """
    is_founded = driver.ledger.log.newest() is not None
    requests = block_requests(prepared)
    _, *tokenized = driver.require([tokenizer_request(prepared.plan, prepared.founders), *requests])
    blocks: dict[tuple[str, str], int] = {}
    for request, artifact in zip(requests, tokenized, strict=True):
        key = (request.label, request.split)
        blocks[key] = blocks.get(key, 0) + artifact.facts["blocks"]
    for (name, split), count in blocks.items():
        if count == 0:
            raise fills_no_block(name, split, requests[0].block_tokens, is_founded)
