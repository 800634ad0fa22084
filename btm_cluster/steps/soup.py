"""The verb *soup*: models and development blocks to the weights by which their average does best. One process, one search."""

from btm_cluster.errors import TextError
from btm_cluster.language_model.model import load_model
from btm_cluster.language_model.soup import Soup, greedy_soup, learned_soup, read_blocks
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import SoupRequest
from btm_cluster.steps.average import check_compatible, open_config
from btm_cluster.steps.prepare import first_token_of
from btm_cluster.workers import Control, Progress


def soup(request: SoupRequest, ledger: Ledger, control: Control) -> Artifact:
    """Searches, and commits what was found: facts hold `weights` by model identity, and `loss` in nats per token.

    Raises:
        IncompatibleError: models that cannot be averaged; before a weight is read.
        TextError: no development block to search on.
    """
    control.report(Progress(request.label, "searching weights"))
    # In the recipe's order, as averages are: sums in float32 depend on it.
    identities = sorted({model.identity for model in request.models})
    models = [ledger.get(Ref("model", identity)) for identity in identities]
    check_compatible(ledger, models)
    shards = [ledger.get(ref) for ref in request.tokens]
    reading = read_blocks(
        [ledger.open_file(shard, "tokens.npy") for shard in shards],
        [ledger.open_file(shard, "documents.npy") for shard in shards],
        request.blocks,
    )
    if not len(reading):
        raise TextError(f"{request.label}: there is no development text", remedy="give the text a development split")
    config, first_token = open_config(ledger, models[0]), first_token_of(ledger, request.tokens)
    files = [ledger.open_file(model, "model.safetensors") for model in models]
    pot = Soup(load_model(config, files[0]), files, first_token, request.how)
    if request.strategy == "greedy":
        found = greedy_soup(pot, reading)
    else:
        by_identity = [{parent.identity: parent.weight for parent in start} for start in request.starts]
        starts = [[start.get(identity, 0.0) for identity in identities] for start in by_identity]
        found = learned_soup(pot, reading, starts)
    weights = dict(zip(identities, found.weights, strict=True))
    facts = {"weights": weights, "loss": found.loss, "blocks": len(reading)}
    return ledger.commit(request.ref, request.recipe, {}, facts)
