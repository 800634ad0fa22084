"""The content of a run's page, read from the store alone: nothing is made, scored or trained for it."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from btm_cluster.curve import Curve
from btm_cluster.data.blocks import Blocks
from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText, overlap_requests
from btm_cluster.equations.perplexity import perplexity
from btm_cluster.equations.posterior import responsibilities
from btm_cluster.evaluation.comparison import fits_of
from btm_cluster.evaluation.evaluate import forest_ensemble
from btm_cluster.evaluation.scoring import stack_of
from btm_cluster.evaluation.systems import CALIBRATED
from btm_cluster.forest import Forest
from btm_cluster.language_model.prompts import pieces
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.ledger.curves import read_curve
from btm_cluster.mixing.fit_file import open_fits
from btm_cluster.mixing.fitting import Mixing
from btm_cluster.mixing.parts import Parts, measure_parts
from btm_cluster.mixing.scores import ScoreStack
from btm_cluster.steps.stored import open_tokenizer

MOST_SCORES = 4_000_000
"""Stored log-probabilities of a text that are looked at: 32 MB, and a second."""
EXCERPT_BLOCKS = 16
"""Blocks in which a text's excerpt is looked for."""
EXCERPT_TOKENS = 200
ALL_EXCERPTS_TOKENS = 6_000
"""Over all texts: excerpts of many texts are shorter, and a page stays small."""
LEAST_EXCERPT_TOKENS = 60


@dataclass(frozen=True)
class Piece:
    """A token of an excerpt: its text, the expert with the largest share of it, and that share p(D=j | x_≤t)."""

    text: str
    expert: int
    share: float


@dataclass(frozen=True)
class TextParts:
    """Measurements of each model on a text's test split."""

    name: str
    is_target: bool
    seed: float
    """The seed's perplexity."""
    parts: Parts
    """The calibrated ensemble's."""
    is_whole: bool
    """Whether all of the test text was looked at."""
    excerpt: tuple[Piece, ...]


@dataclass(frozen=True)
class Training:
    """A training of the forest, and its curve where there is one."""

    name: str
    role: str
    curve: Curve | None


def tops_of(experts: int) -> list[int]:
    """Numbers of experts that are tried alone: powers of two, and all."""
    return sorted({*(2**n for n in range(experts.bit_length()) if 2**n < experts), experts})


def excerpt_length(texts: int) -> int:
    """Tokens of each excerpt, at most."""
    return min(EXCERPT_TOKENS, max(LEAST_EXCERPT_TOKENS, ALL_EXCERPTS_TOKENS // max(1, texts)))


def read_text_parts(prepared: PreparedPlan, forest: Forest, ledger: Ledger) -> list[TextParts]:
    """Each text with a test split, in the plan's order."""
    experts = forest_ensemble(prepared, forest)
    fits, seed = fits_of(prepared, experts), Ref("model", forest.foundation.seed)
    tokenizer = open_tokenizer(ledger, prepared.tokenizer)
    texts = [text for text in prepared.texts if text.tokens["test"]]
    length = excerpt_length(len(texts))
    most = max(1, MOST_SCORES // (len(experts.refs) * prepared.plan.training.block_tokens))
    found = []
    for text in texts:
        mixing = open_fits(ledger, ledger.get(fits[text.name]))[CALIBRATED]
        assert isinstance(mixing, Mixing)
        stack = stack_of(ledger, experts.refs, text, "test")
        parts = measure_parts(stack, mixing.log_prior_E, mixing.posterior, most, tops_of(len(experts.refs)))
        alone = _perplexities(stack_of(ledger, [seed], text, "test"), most)[0]
        tokens_BT = _blocks(ledger, text, min(EXCERPT_BLOCKS, most))
        excerpt = find_excerpt(stack, mixing, tokens_BT, tokenizer, length)
        found.append(TextParts(text.name, text.is_target, alone, parts, len(stack) <= most, excerpt))
    return found


def _perplexities(stack: ScoreStack, blocks: int) -> list[float]:
    """Each model's on the first blocks: [E]."""
    logp_EBT, mask_BT = stack.take(0, blocks)
    return perplexity(logp_EBT[:, mask_BT].sum(1), mask_BT.sum()).tolist()


def _blocks(ledger: Ledger, text: PreparedText, first: int) -> np.ndarray:
    blocks = Blocks([ledger.open_file(ledger.get(ref), "tokens.npy") for ref in text.tokens["test"]])
    return blocks.take(np.arange(min(first, len(blocks))))


def find_excerpt(
    stack: ScoreStack, mixing: Mixing, tokens_BT: np.ndarray, tokenizer: TextTokenizer, length: int
) -> tuple[Piece, ...]:
    """The beginning of the longest stretch of one document in the first blocks; of equal ones the first.

    The posterior has seen what stands before it in its block, as in the evaluation.
    """
    logp_EBT, _ = stack.take(0, len(tokens_BT))
    row, start, end = longest_stretch(stack.documents_BT[: len(tokens_BT)].numpy(), length)
    shares_ET = responsibilities(logp_EBT[:, row : row + 1], mixing.log_prior_E, mixing.posterior)[:, 0]
    best_T, expert_T = shares_ET.max(0)
    before, ids = tokens_BT[row, :start].tolist(), tokens_BT[row, start:end].tolist()
    texts = pieces(before, ids, tokenizer.decode_continuation)
    return tuple(
        Piece(text, int(expert_T[start + place]), float(best_T[start + place]))
        for place, (token, text) in enumerate(zip(ids, texts, strict=True))
        if token not in (tokenizer.first_token, tokenizer.end_of_text)
    )


def longest_stretch(documents_BT: np.ndarray, most: int) -> tuple[int, int, int]:
    """Block, start and end of the longest run of one document's tokens, at most so many."""
    best = (0, 0, 0)
    for row, documents_T in enumerate(documents_BT):
        cuts = [0, *(np.flatnonzero(np.diff(documents_T)) + 1).tolist(), len(documents_T)]
        for start, end in pairwise(cuts):
            end = min(end, start + most)
            if documents_T[start] >= 0 and end - start > best[2] - best[1]:
                best = (row, start, end)
    return best


def read_overlaps(prepared: PreparedPlan, ledger: Ledger) -> dict[str, dict[str, float]]:
    """The share of each text's test windows of 20 words that stand in each domain's training text: by
    text, then by domain."""
    requests = overlap_requests(prepared.texts, prepared.domains)
    found = ledger.find_all([request.ref for request in requests])
    overlaps: dict[str, dict[str, float]] = {text.name: {} for text in prepared.texts}
    for request, overlap in zip(requests, found, strict=True):
        for text in prepared.texts:
            file = f"{text.identity}-windows.npy"
            if overlap is not None and overlap.has(file):
                seen = np.load(ledger.open_file(overlap, file))
                overlaps[text.name][request.label] = float(seen.mean()) if len(seen) else 0.0
    return overlaps


def read_trainings(forest: Forest, baseline: Ref | None, ledger: Ledger) -> list[Training]:
    """Seed, experts and Transformer-LM, as far as they were trained here."""
    models = {"seed": ("seed", Ref("model", forest.foundation.seed))}
    models |= {expert.domain: ("expert", Ref("model", expert.identity)) for expert in forest.experts}
    if baseline is not None:
        models["Transformer-LM"] = ("transformer-lm", baseline)
    found = ledger.find_all([ref for _, ref in models.values()])
    return [
        Training(name, role, None if model is None else read_curve(ledger, model))
        for (name, (role, _)), model in zip(models.items(), found, strict=True)
    ]
