"""Token ids of documents, put together from those of pieces, each of which is encoded once.

Words recur, and a dictionary answers several times as fast as a tokenizer. A document is cut only where its
tokenizer always cuts, so its ids stay the same. Knows nothing of files or blocks.
"""

import json
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer

from btm_cluster.data.batches import batches

_BATCH_CHARACTERS = 1 << 20
_KNOWN_CHARACTERS = 1 << 21
"""Characters of pieces that are remembered: words take about 20 bytes of memory for each, 40 MB in all."""
_HEAD_CHARACTERS = 4
"""First characters of an added token. A document that has them is encoded as a whole, since it may have the token;
thousands of added tokens have few such beginnings."""
_PIECE = re.compile(r"[^A-Za-z]*+[A-Za-z]*+(?:[^\x00-\x7f]++[^A-Za-z]*+[A-Za-z]*+)*+")
"""A piece ends where an ASCII letter is followed by an ASCII character that is no letter."""
_PATTERNS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
}
"""How Llama 3 (three digits) and Qwen 2 (one digit) find words, as transformers writes it."""


class DocumentEncoder:
    """A tokenizer with the pieces that it encoded lately."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        added = _added_tokens(backend)
        self._heads = {token.content[:_HEAD_CHARACTERS] for token in added}
        self._cuts = _cuts_after_letters(backend)
        if backend.normalizer is not None and any(token.normalized for token in added):
            self._cuts = False  # they are looked for in another text than is seen here
        self._known: dict[str, bytes] = {}
        self._characters = 0

    def encode(self, documents: Iterable[str]) -> "Iterator[array[int]]":
        """Ids of each document alone, in batches that share the machine's cores."""
        for batch in batches(documents, len, _BATCH_CHARACTERS):
            cut = [self._pieces(document) for document in batch]
            known = self._known  # which another iterator may replace before this batch has ended
            self._learn(list(set().union(*cut).difference(known)), known)
            for pieces in cut:
                yield array("I", b"".join(map(known.__getitem__, pieces)))
            if self._characters > _KNOWN_CHARACTERS:
                self._known, self._characters = {}, 0

    def _pieces(self, document: str) -> list[str]:
        if not self._cuts or any(head in document for head in self._heads):
            return [document]
        return _PIECE.findall(document)

    def _learn(self, pieces: list[str], known: dict[str, bytes]) -> None:
        encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        for piece, encoding in zip(pieces, encodings, strict=True):
            known[piece] = array("I", encoding.ids).tobytes()
        self._characters += sum(map(len, pieces))


def _added_tokens(backend: Tokenizer) -> list[AddedToken]:
    """Tokens that are found in text before it is cut into words."""
    added = backend.get_added_tokens_decoder().values()
    return [token for token in added if not (token.special and backend.encode_special_tokens)]


def _cuts_after_letters(backend: Tokenizer) -> bool:
    """Whether words end where pieces do, and what follows does not depend on what is before.

    So it is by the patterns of GPT-2, Llama 3 and Qwen 2: none looks back, and none goes on after an ASCII
    letter with an ASCII character that is no letter. NFC changes neither of the two.
    """
    if _state(backend.normalizer) not in (None, {"type": "NFC"}):
        return False
    match _state(backend.pre_tokenizer):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern in _PATTERNS
    return False


def _state(part: Any) -> Any:
    """A normalizer or pre-tokenizer as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())
