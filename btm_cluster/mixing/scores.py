"""Stored token log-probabilities as arrays: several models on one split of one text, streamed by blocks.

U is tokens and bytes, as `equations/perplexity.py` has them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from btm_cluster.data.blocks import END, MARKS_FILE, READ, TEXT
from btm_cluster.equations.gates import Gate, log_gated_mixture
from btm_cluster.equations.learned_gate import TextScores
from btm_cluster.equations.mixture import document_sums, ends_of_documents, log_mixture
from btm_cluster.equations.posterior import Posterior
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import ScoredSplit
from btm_cluster.storage.open_files import allow_open_files

Made = TypeVar("Made")
BLOCKS_AT_ONCE = 64
OPENED_AT_ONCE = 8
"""Files of scores that are fetched and checked at once."""
SCORES_AT_ONCE = 512
"""Blocks times experts, at most: 4 MB of float64 at 1,024 tokens, of which arithmetic holds a dozen."""


class ScoreStack:
    """E models' scores on B blocks of T tokens, memory-mapped; taken as float64, a few blocks at a time."""

    def __init__(
        self, ledger: Ledger, scores: Sequence[Artifact], tokens: Sequence[Ref], threads: int = 1
    ) -> None:
        """`threads` take a few blocks each at a time, where torch has one."""
        allow_open_files()  # a mapped file stays open
        self._threads = threads
        self._ledger, self._artifacts, self._tokens = ledger, scores, tokens
        self._scores = self._open("logp.npy")
        self.documents_BT = _documents(ledger, tokens)
        self._marks_BT = _marks(ledger, tokens, self.documents_BT)

    @staticmethod
    def of(ledger: Ledger, split: ScoredSplit, threads: int = 1) -> "ScoreStack":
        """The stored scores of a split."""
        found = ledger.find_all(split.scores)
        scores = [one or ledger.get(ref) for one, ref in zip(found, split.scores, strict=True)]
        return ScoreStack(ledger, scores, split.tokens, threads)

    def _open(self, name: str) -> list[np.ndarray]:
        def mapped(artifact: Artifact) -> np.ndarray:
            return np.load(self._ledger.open_file(artifact, name), mmap_mode="r")  # type: ignore[no-any-return]

        with ThreadPoolExecutor(OPENED_AT_ONCE, thread_name_prefix="scores") as pool:
            return list(pool.map(mapped, self._artifacts))

    @cached_property
    def _entropies(self) -> list[np.ndarray]:
        """Only gates look at them."""
        return self._open("entropy.npy")

    def __len__(self) -> int:
        return len(self.documents_BT)

    def take(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks start … stop-1: log-probabilities [E, B, T], 0 at padding, and the mask [B, T] of predicted
        tokens. What is read alone is evidence for a posterior, as it is where the ensemble writes."""
        mask_BT = self._marks_BT[start:stop] != READ
        return self._stacked(self._scores, start, stop), mask_BT

    def sample(self, stop: int) -> TextScores:
        """The first blocks with everything that a gate may look at."""
        logp_EBT, mask_BT = self.take(0, stop)
        return TextScores(logp_EBT, self._stacked(self._entropies, 0, stop), mask_BT)

    def sizes(self) -> torch.Tensor:
        """Predicted tokens of each document, and bytes of their text: float64 [U, D]."""
        files = [self._ledger.open_file(self._ledger.get(ref), "bytes.npy") for ref in self._tokens]
        bytes_D = torch.from_numpy(np.concatenate([np.load(file) for file in files]))
        tokens_D = document_sums((self._marks_BT != READ).double(), self.documents_BT)
        return torch.stack([tokens_D, bytes_D.double()])

    def sums(self) -> torch.Tensor:
        """Each model's summed log-probability by document: [E, U, D]."""
        return self.by_document(lambda logp_EBT, _: logp_EBT)

    def gated_sums(self, gate: Gate) -> torch.Tensor:
        """The summed log-probability by document of the ensemble under a gate: [U, D]."""

        def mixture(logp_EBT: torch.Tensor, start: int) -> torch.Tensor:
            entropy_EBT = self._stacked(self._entropies, start, start + logp_EBT.shape[1])
            return log_gated_mixture(gate, logp_EBT, entropy_EBT)[None]

        return self.by_document(mixture)[0]

    def mixture_sums(self, log_prior_E: torch.Tensor, posterior: Posterior) -> torch.Tensor:
        """The ensemble's summed log-probability by document: [U, D]."""
        return self.by_document(lambda logp_EBT, _: log_mixture(logp_EBT, log_prior_E, posterior)[None])[0]

    def by_document(self, values_of: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        """Sums by document of what a function makes of a few blocks' scores: [S, U, D].

        It gets [E, B, T] and the number of the first block, and returns log-probabilities [S, B, T].
        """
        size = max(1, min(BLOCKS_AT_ONCE, SCORES_AT_ONCE // max(1, len(self._scores))))

        def sums_from(start: int) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = slice(start, start + size)
            values_SBT = values_of(self.take(blocks.start, blocks.stop)[0], start)
            held_D, documents_BT = _renumbered(self.documents_BT[blocks])
            marks_BT = self._marks_BT[blocks]
            sums = [_sums(values_BT, documents_BT, marks_BT) for values_BT in values_SBT]
            return held_D, torch.stack(sums)

        documents = int(self.documents_BT.max()) + 1
        total_SUD: torch.Tensor | None = None
        for held_D, part_SUD in _in_order(sums_from, range(0, len(self), size), self._threads):
            if total_SUD is None:
                total_SUD = torch.zeros(*part_SUD.shape[:2], documents, dtype=torch.float64)
            total_SUD[:, :, held_D] += part_SUD
        assert total_SUD is not None, "a split has blocks"
        return total_SUD

    def _stacked(self, arrays: Sequence[np.ndarray], start: int, stop: int) -> torch.Tensor:
        """[E, B, T], 0 at padding."""
        stacked = np.stack([array[start:stop] for array in arrays], dtype=np.float64)
        return torch.from_numpy(stacked).masked_fill_(self.documents_BT[start:stop] < 0, 0.0)


def _in_order(act: Callable[[int], Made], starts: Iterable[int], threads: int) -> Iterator[Made]:
    """Results of `act` on each start, in order; by several threads, two for each are under way or wait at most."""
    if threads == 1:
        yield from map(act, starts)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Made]] = deque()
        for start in starts:
            if len(pending) == 2 * threads:
                yield pending.popleft().result()
            pending.append(pool.submit(act, start))
        while pending:
            yield pending.popleft().result()


def _renumbered(documents_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The documents that a few blocks hold, [D], and each token's place among them, -1 for padding."""
    held_D, places_BT = torch.unique(documents_BT, return_inverse=True)
    padding = int((held_D < 0).sum())
    return held_D[padding:], places_BT - padding


def _sums(values_BT: torch.Tensor, documents_BT: torch.Tensor, marks_BT: torch.Tensor) -> torch.Tensor:
    """Sums by document over what is predicted, and over what is text of it: [U, D]."""
    total_D = document_sums(values_BT.masked_fill(marks_BT == READ, 0.0), documents_BT)
    is_end_BT = marks_BT == END
    text_D = total_D.index_add(0, documents_BT[is_end_BT], -values_BT[is_end_BT].double())
    return torch.stack([total_D, text_D])


def _marks(ledger: Ledger, tokens: Sequence[Ref], documents_BT: torch.Tensor) -> torch.Tensor:
    """The mark of each token over all shards of a split: uint8 [B, T], READ for padding."""
    artifacts = [ledger.get(ref) for ref in tokens]
    if artifacts and artifacts[0].has(MARKS_FILE):
        files = [np.load(ledger.open_file(artifact, MARKS_FILE)) for artifact in artifacts]
        return torch.from_numpy(np.concatenate(files))
    marks_BT = torch.where(documents_BT >= 0, TEXT, READ).to(torch.uint8)
    return marks_BT.masked_fill(ends_of_documents(documents_BT), END)


def _documents(ledger: Ledger, tokens: Sequence[Ref]) -> torch.Tensor:
    """The document of each token over all shards of a split, numbered
    through: int64 [B, T], -1 for padding."""
    shards, before = [], 0
    for ref in tokens:
        owners = np.load(ledger.open_file(ledger.get(ref), "documents.npy")).astype(np.int64)
        shards.append(np.where(owners >= 0, owners + before, owners))
        before += int(owners.max(initial=-1)) + 1
    return torch.from_numpy(np.concatenate(shards))
