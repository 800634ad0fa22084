"""Scores token blocks under a model: a log-probability and an entropy per token.

One model, loaded once, many texts.
"""

from collections.abc import Iterator, Sequence

from btm_cluster.data.blocks import Blocks
from btm_cluster.language_model.compute import device_of
from btm_cluster.language_model.scoring import ScorePasses, set_up_scoring
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.requests import ScoreRequest
from btm_cluster.requests.progress import Control, Counter
from btm_cluster.steps.compiled_code import keep_compiled_code
from btm_cluster.steps.stored import first_token_of, open_model
from btm_cluster.storage.scratch import scratch_folder


def score(requests: Sequence[ScoreRequest], ledger: Ledger, control: Control) -> Iterator[Artifact]:
    """Scores each requested text; all requests name the same model."""
    set_up_scoring(requests[0].how)
    if requests[0].how.compile:
        keep_compiled_code()
    source = ledger.get(requests[0].model)
    model = open_model(ledger, source, device_of(requests[0].how.gpus_per_worker))
    texts = [
        Blocks([ledger.open_file(ledger.get(ref), "tokens.npy") for ref in request.tokens])
        for request in requests
    ]
    lengths = [len(text) for text in texts]
    counter = Counter(control, requests[0].shown, "scoring", sum(lengths), "blocks")
    passes = ScorePasses(model, requests[0].how, texts[0].block_tokens, lengths)
    for request, blocks in zip(requests, texts, strict=True):
        assert request.model == source.ref, "one model at a time"
        first_token = first_token_of(ledger, request.tokens)
        with scratch_folder() as scratch:
            files = passes.write(blocks, first_token, scratch, counter.add)
            yield ledger.commit(request, files, {"blocks": len(blocks)})
