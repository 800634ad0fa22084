"""Helpers for tests of reading: everything that a source of one pattern holds, and documents in blocks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from btm_cluster.data.blocks import pack_blocks, tokenised
from btm_cluster.data.documents import BadDocument
from btm_cluster.data.sources import Document, read_documents
from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.errors import TextError
from btm_cluster.plan import ReadingPlan, TextPlan


def zstandard(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def read(path: Path | str, reading: ReadingPlan | None = None, **fields: Any) -> list[Document | BadDocument]:
    """Everything that a source of one pattern holds."""
    return list(read_documents(TextPlan(name="a", text=(str(path),), **fields), reading or ReadingPlan()))


def texts(items: list[Document | BadDocument]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def reasons(items: list[Document | BadDocument]) -> list[str]:
    return [item.reason for item in items if isinstance(item, BadDocument)]


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(TextError) as caught:
        read(path, **fields)
    assert caught.value.found
    assert caught.value.remedy
    return str(caught.value)


def packed(
    documents: Sequence[str], tokenizer: TextTokenizer, block_tokens: int, keep_rest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of plain documents: tokens, and each token's document."""
    blocks = pack_blocks(tokenised(documents, tokenizer), tokenizer, block_tokens, keep_rest)
    return blocks.tokens, blocks.documents
