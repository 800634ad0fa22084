"""A text that the user gives, which is no text of the plan: its blocks are scored by each expert in this
process, and nothing of it is stored.

What comes out is weights, of six digits each.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from btm_cluster.data.blocks import READ, Blocks, pack_blocks, tokenised
from btm_cluster.data.corpus import content_hash
from btm_cluster.equations.posterior import PriorKind
from btm_cluster.errors import UserError
from btm_cluster.forest import Forest
from btm_cluster.language_model.compute import device_of
from btm_cluster.language_model.scoring import score_blocks, set_up_scoring
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.mixing.text_weights import TextWeights, weigh
from btm_cluster.operations.score import check_sources, documents_of
from btm_cluster.plan import ReadingPlan, TextPlan
from btm_cluster.requests import Resources
from btm_cluster.steps.stored import open_model, open_tokenizer
from btm_cluster.storage.scratch import scratch_folder

BLOCKS_AT_ONCE = 8


@dataclass(frozen=True)
class GivenText:
    """Where it is, and how its files become documents."""

    sources: tuple[TextPlan, ...]
    reading: ReadingPlan
    bad: Counter[str] = field(default_factory=Counter)
    """Documents that were passed over while it was read, by reason."""

    def check(self) -> None:
        """Refuses files that are not there or cannot be read, before anything is opened.

        Raises:
            TextError: naming one.
        """
        check_sources(self.sources, self.reading)

    def documents(self) -> Iterator[str]:
        """Its documents, streaming."""
        return (named.text for named in documents_of(self.sources, self.reading, self.bad))


def weights_for(
    text: GivenText, forest: Forest, ledger: Ledger, blocks: int, prior: PriorKind | None
) -> TextWeights:
    """The weights of the forest's experts for a text, in their order, by a prior that is estimated on at most
    so many of its blocks, as `weigh` does.

    The experts are loaded one after the other, on this process's GPU where it has one.

    Raises:
        UserError: there is no text in it.
    """
    tokenizer = open_tokenizer(ledger, Ref("tokenizer", forest.foundation.tokenizer))
    block_tokens = forest.foundation.block_tokens
    sampled = sample(text.documents(), tokenizer.encode, blocks * block_tokens)
    if not sampled:
        raise UserError(
            "there is no text to merge for", found=f"{sum(text.bad.values())} empty or bad documents"
        )
    packed = pack_blocks(tokenised(sampled, tokenizer), tokenizer, block_tokens, keep_rest=True)
    tokens_BT, is_real_BT = packed.tokens[:blocks], torch.from_numpy(packed.documents[:blocks] >= 0)
    mask_BT = is_real_BT if packed.marks is None else torch.from_numpy(packed.marks[:blocks] != READ)
    models = [Ref("model", expert.identity) for expert in forest.experts]
    logp_EBT = _scores(ledger, models, tokens_BT, tokenizer.first_token)
    return weigh(logp_EBT.masked_fill(~is_real_BT, 0.0), mask_BT, prior)


def sample(documents: Iterable[str], encode: Callable[[str], Sequence[int]], tokens: int) -> list[str]:
    """The documents of the lowest content hashes that together have so many tokens, or all of them, in the
    order of their hashes, each once: held-out text is read in that order too.

    Memory: these documents.
    """
    kept: list[tuple[bytes, str, int]] = []
    held = 0
    for document in documents:
        key = content_hash(document)
        place = bisect_left(kept, (key,))
        if (place < len(kept) and kept[place][0] == key) or (held >= tokens and place == len(kept)):
            continue
        length = len(encode(document)) + 1  # and its end
        kept.insert(place, (key, document, length))
        held += length
        while held - kept[-1][2] >= tokens:
            held -= kept.pop()[2]
    return [document for _, document, _ in kept]


def _scores(ledger: Ledger, models: Sequence[Ref], tokens_BT: np.ndarray, first_token: int) -> torch.Tensor:
    """log p of every token under each model: float64 [E, B, T]."""
    on_gpu = torch.cuda.is_available()
    how = Resources(1, float(on_gpu), torch.get_num_threads(), BLOCKS_AT_ONCE, "float32", False)
    set_up_scoring(how)
    found = []
    for ref in models:
        with scratch_folder() as scratch:
            np.save(scratch / "tokens.npy", tokens_BT)
            model = open_model(ledger, ref, device_of(how.gpus_per_worker))
            blocks = Blocks([scratch / "tokens.npy"])
            logp: Path = score_blocks(model, blocks, first_token, how, scratch)["logp.npy"]
            found.append(np.load(logp).astype(np.float64))
    return torch.from_numpy(np.stack(found))
