"""Makes a mixture of experts of several models: fits a router for every layer, and composes the weights.

One process, one dense model in memory while routers are fitted, and then one tensor of each model.
"""

import torch

from btm_cluster.data.tokenizer import TOKENIZER_FILES
from btm_cluster.errors import TextError
from btm_cluster.language_model.mixture_of_experts import (
    MixtureWeights,
    differ_in_feed_forwards_alone,
    mixture_config,
    size_of_mixture,
)
from btm_cluster.language_model.model import write_config
from btm_cluster.language_model.routers import Router, blocks_to_read, fit_routers
from btm_cluster.language_model.scoring import set_up_scoring
from btm_cluster.language_model.soup import Reading
from btm_cluster.language_model.stored_weights import write_shards
from btm_cluster.language_model.tensor_files import names_in_order
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import MixtureOfExpertsRequest
from btm_cluster.requests.progress import Control, Counter
from btm_cluster.steps.average import check_compatible
from btm_cluster.steps.stored import (
    first_token_of,
    open_config,
    open_held_out,
    open_model,
    open_tokenizer,
    open_weights,
)
from btm_cluster.storage.scratch import scratch_folder


def mix_experts(request: MixtureOfExpertsRequest, ledger: Ledger, control: Control) -> Artifact:
    """Mixes the models, and commits an ordinary one: its experts are in the order of `models` in its inputs.

    Its facts hold `inference_cost` against one model, `is_exact` (the models differ in feed-forwards alone),
    the size, and what is known of each layer's router.

    Raises:
        UserError: an architecture without a mixture of experts, or fewer models than a token is to have.
        IncompatibleError: models of different origins, shapes or tokenizers; before a weight is read.
        TextError: no development block of a domain.
    """
    rest = ledger.get(request.rest)
    experts = [ledger.get(model) for model in request.inputs["models"]]
    check_compatible(ledger, [rest, *experts])
    dense = open_config(ledger, rest)
    config = mixture_config(dense, len(experts), request.experts_per_token)
    routers = _routers(request, ledger, control)
    weights = [open_weights(ledger, model) for model in (rest, *experts)]
    mixture = MixtureWeights(weights[0], weights[1:], [router.weights_EH for router in routers], config)
    size = size_of_mixture(dense, len(experts), request.experts_per_token)
    facts = {
        "role": "mixture-of-experts",
        "origin": rest.facts["origin"],
        "is_exact": differ_in_feed_forwards_alone(weights[0], weights[1:]),
        "parameters": size.parameters,
        "active_parameters": size.active_parameters,
        "inference_cost": size.inference_cost,
        "routers": [{"accuracy": router.accuracy, "sharpness": router.sharpness} for router in routers],
    }
    counter = Counter(control, request.label, "merging", len(names_in_order(mixture.header)), "tensors")
    with scratch_folder() as folder:
        files = write_shards(mixture, folder, count=counter.add)
        (tokenizer,) = ledger.get(request.ordered_tokens[0][0]).inputs["tokenizer"]
        dtype = dense.get("dtype") or "float32"
        files["config.json"] = write_config(config, open_tokenizer(ledger, tokenizer), folder, dtype)
        files |= {name: ledger.open_file(rest, name) for name in TOKENIZER_FILES}
        return ledger.commit(request, files, facts, {"name": request.label})


def _routers(request: MixtureOfExpertsRequest, ledger: Ledger, control: Control) -> list[Router]:
    readings = [_reading(request, shards, ledger) for shards in request.ordered_tokens]
    set_up_scoring(request.how)
    first_token = first_token_of(ledger, request.ordered_tokens[0])
    counter = Counter(control, request.label, "fitting", blocks_to_read(readings), "blocks")
    return fit_routers(open_model(ledger, request.rest), readings, first_token, request.how, counter.add)


def _reading(request: MixtureOfExpertsRequest, tokens: tuple[Ref, ...], ledger: Ledger) -> Reading:
    # Tokens that are read and not predicted are routed too.
    reading = Reading(
        *map(torch.from_numpy, open_held_out(ledger, tokens, request.blocks, with_read_alone=True))
    )
    if not len(reading):
        raise TextError(
            f"{request.label}: a domain has no development text to fit routers on",
            remedy="give each domain a development split",
        )
    return reading
