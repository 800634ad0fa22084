"""Searches for the weights by which an average of models does best on development blocks.

One process, one search.
"""

import torch

from btm_cluster.errors import TextError
from btm_cluster.language_model.compute import device_of
from btm_cluster.language_model.soup import Reading, Soup, greedy_soup, learned_soup
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.requests import SoupRequest
from btm_cluster.requests.progress import Control, Counter
from btm_cluster.steps.average import check_compatible
from btm_cluster.steps.stored import first_token_of, open_held_out, open_model, open_weights


def search(request: SoupRequest, ledger: Ledger, control: Control) -> Artifact:
    """Searches, and commits the result: facts hold `weights` by strategy and model
    identity, and `loss` in nats per token.

    Raises:
        IncompatibleError: models that cannot be averaged; before a weight is read.
        TextError: no development block to search on.
    """
    counter = Counter(control, request.label, "searching", unit="averages")
    # In the order of identities, as averages are: sums in float32 depend on it.
    models = [ledger.get(model) for model in request.inputs["models"]]
    identities = [model.identity for model in models]
    check_compatible(ledger, models)
    reading = Reading(*map(torch.from_numpy, open_held_out(ledger, request.tokens, request.blocks)))
    if not len(reading):
        raise TextError(
            f"{request.label}: there is no development text", remedy="give the text a development split"
        )
    first_token = first_token_of(ledger, request.tokens)
    parts = [open_weights(ledger, model) for model in models]
    mixed = open_model(ledger, models[0], device_of(request.how.gpus_per_worker))
    soup = Soup(mixed, parts, first_token, request.how, counter.add)
    if request.strategy == "greedy":
        found = greedy_soup(soup, reading)
    else:
        fitted = [ledger.get(start.fit).facts["weights"][start.name] for start in request.starts]
        starts = [[by_model.get(identity, 0.0) for identity in identities] for by_model in fitted]
        found = learned_soup(soup, reading, starts)
    weights = dict(zip(identities, found.weights, strict=True))
    facts = {"weights": {request.strategy: weights}, "loss": found.loss, "blocks": len(reading)}
    return ledger.commit(request, {}, facts)
