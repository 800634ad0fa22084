"""From new domains to token blocks: those of a plan, and those of the inbox,
of which a bad one costs only itself.

A wrong text of the plan is refused as in any run. One of the inbox is quarantined with its reason, and the
others go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from btm_cluster.driver.demands import demand_of_expert
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.founding import check_foundation, check_texts
from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.driver.prepared_plan import (
    PreparedPlan,
    block_requests,
    model_config,
    prepared_from,
    text_of,
    without_texts,
)
from btm_cluster.driver.text_requests import read_request, read_requests, tokenizer_request, vocabulary_of
from btm_cluster.errors import TextError, UserError
from btm_cluster.expansion.inbox import Arrival, refuse, still_lies_there
from btm_cluster.forest import Forest
from btm_cluster.ledger import Artifact
from btm_cluster.plan import Plan
from btm_cluster.requests import ReadText


@dataclass(frozen=True)
class PreparedArrivals:
    """The prepared plan of new experts, and the arrivals that failed or were refused."""

    prepared: PreparedPlan
    refused: Mapping[str, str]
    failures: tuple[Failure, ...]


def prepare_new(plan: Plan, arrivals: Sequence[Arrival], forest: Forest, driver: Driver) -> PreparedArrivals:
    """Texts to token blocks, for a plan whose domains are the new ones, and for what has arrived.

    Raises:
        UserError: the plan does not fit the forest, or one of its own texts is wrong.
    """
    requests = read_requests(plan)
    model = model_config(plan, vocabulary_of(plan))
    check_foundation(without_texts(plan, model, driver.ledger), forest, driver.ledger)
    _check_capacity(plan, model[0], requests, arrivals, driver)
    read = driver.require(requests)
    read_results = {text.name: read_result for text, read_result in zip(plan.texts, read, strict=True)}
    arrived = _read_all(plan, arrivals, driver)
    failures = [outcome for outcome in arrived.values() if isinstance(outcome, Failure)]
    refused = {name: outcome for name, outcome in arrived.items() if isinstance(outcome, str)}
    arrived_results = {name: outcome for name, outcome in arrived.items() if isinstance(outcome, Artifact)}
    refused |= _copies(arrived_results, read_results, forest)
    read_results |= {
        name: read_result for name, read_result in arrived_results.items() if name not in refused
    }
    domains = (*plan.domains, *(a.domain for a in arrivals if a.domain.name in read_results))
    prepared = prepared_from(plan.model_copy(update={"domains": domains}), read_results, model, driver.ledger)
    check_texts(prepared, forest, driver.ledger)
    driver.require([tokenizer_request(plan, prepared.founders)])
    too_short, failed = _tokenize(prepared, {d.name for d in plan.texts}, driver)
    refused |= too_short
    failures += failed
    for arrival in arrivals:
        if arrival.domain.name in refused:
            refuse(driver.ledger, arrival, refused[arrival.domain.name])
    gone = {*refused, *(failure.label for failure in failures)}
    return PreparedArrivals(
        replace(prepared, texts=tuple(t for t in prepared.texts if t.name not in gone)),
        refused,
        tuple(failures),
    )


def _check_capacity(
    plan: Plan,
    model: Mapping[str, Any],
    requests: Sequence[ReadText],
    arrivals: Sequence[Arrival],
    driver: Driver,
) -> None:
    """Refuses an expert that can never be trained before the text of one is read."""
    new = [*(request for request in requests if not request.is_target), *_arrivals_requests(plan, arrivals)]
    if any(found is None for found in driver.ledger.find_all([request.ref for request in new])):
        driver.check_capacity([demand_of_expert(plan, model, len(new))])


def _arrivals_requests(plan: Plan, arrivals: Sequence[Arrival]) -> list[ReadText]:
    most_bytes = int(1e9 * plan.expansion.inbox.most_decompressed_gigabytes)
    return [read_request(plan, a.domain, a.fingerprint, most_bytes=most_bytes) for a in arrivals]


def _read_all(plan: Plan, arrivals: Sequence[Arrival], driver: Driver) -> dict[str, Outcome | str]:
    """The outcome of reading each arrival: its read result, a failure that
    another try may mend, or why it is refused."""
    requests = _arrivals_requests(plan, arrivals)
    names = [arrival.domain.name for arrival in arrivals]
    try:
        read: list[Outcome | str] = list(driver.obtain(requests))
    except UserError as exc:  # of one of them, which is not said: each by itself, then
        read = [_read_alone(request, driver, _one_line(exc)) for request in requests]
    return {
        name: outcome if still_lies_there(driver.ledger, arrival) else _changed(name)
        for name, outcome, arrival in zip(names, read, arrivals, strict=True)
    }


def _changed(name: str) -> Failure:
    return Failure(name, 1, "in the inbox", "its files changed while they were read")


def _read_alone(request: ReadText, driver: Driver, seen: str) -> Outcome | str:
    """Reads one text until it is read, or the same is wrong with it twice, `seen` included: at most twice.

    A store that was out for a moment looks the same as a broken file.
    """
    reason = ""
    for _ in range(2):
        try:
            return driver.obtain([request])[0]
        except UserError as exc:
            reason = _one_line(exc)
        if reason == seen:
            break
    return reason


def _copies(
    arrived: Mapping[str, Artifact], of_plan: Mapping[str, Artifact], forest: Forest
) -> dict[str, str]:
    """Arrivals whose documents are those of another domain: they would be one expert under two names."""
    known = {expert.text: expert.domain for expert in forest.experts}
    known |= {text_of(read_result): name for name, read_result in of_plan.items()}
    refused = {}
    for name, read_result in arrived.items():
        first = known.setdefault(text_of(read_result), name)
        if first != name:
            refused[name] = f"the same documents as {first!r}"
    return refused


def _tokenize(
    prepared: PreparedPlan, of_plan: set[str], driver: Driver
) -> tuple[dict[str, str], list[Failure]]:
    """Makes every block; which arrivals have too little text for one, and what failed.

    Raises:
        TextError: a text of the plan fills no block.
    """
    requests = block_requests(prepared)
    outcomes = driver.obtain(requests)
    blocks: dict[tuple[str, str], int] = {}
    for request, outcome in zip(requests, outcomes, strict=True):
        if isinstance(outcome, Artifact):
            key = (request.label, request.split)
            blocks[key] = blocks.get(key, 0) + outcome.facts["blocks"]
    refused = {}
    for (name, split), count in blocks.items():
        if count == 0:
            refused[name] = f"its {split} text fills no block of {prepared.plan.training.block_tokens} tokens"
            if name in of_plan:
                raise TextError(f"{name!r}: {refused[name]}", remedy="give more text")
    return refused, [outcome for outcome in outcomes if isinstance(outcome, Failure)]


def _one_line(error: UserError) -> str:
    parts = (error.what, error.found, f"expected: {error.expected}" * bool(error.expected), error.remedy)
    return "; ".join(" ".join(part.split()) for part in parts if part)
