"""Text that nobody wrote, for measurements: words of a made-up language by Zipf's law, as JSON lines.

The same number gives the same text. Knows nothing of tokenizers.
"""

import json
from pathlib import Path

import numpy as np

WORDS = 50_000
WORDS_A_DOCUMENT = (100, 700)
SYLLABLES = [
    a + b + c
    for a in "bdfghklmnprstvz"
    for b in ("a", "e", "i", "o", "u", "ai", "ou")
    for c in ("", "n", "r")
]


def write_jsonl(target: Path, size_bytes: int, random_seed: int) -> int:
    """Writes documents until the file has so many bytes; returns the bytes of their text."""
    random = np.random.default_rng(random_seed)
    words = np.array(_words())
    shares = 1 / (np.arange(WORDS) + 3.0)
    shares /= shares.sum()
    written = text_bytes = 0
    with target.open("w", encoding="utf-8") as file:
        while written < size_bytes:
            drawn = words[random.choice(WORDS, 200_000, p=shares)]
            ends = random.random(len(drawn)) < 0.08
            at = 0
            while at < len(drawn):
                count = int(random.integers(*WORDS_A_DOCUMENT))
                text = _sentences(drawn[at : at + count], ends[at : at + count])
                line = json.dumps({"id": f"{random_seed}-{written}", "text": text}) + "\n"
                written, text_bytes, at = written + file.write(line), text_bytes + len(text), at + count
    return text_bytes


def _words() -> list[str]:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 5, WORDS)
    drawn = iter(random.integers(0, len(SYLLABLES), int(lengths.sum())))
    return ["".join(SYLLABLES[next(drawn)] for _ in range(length)) for length in lengths]


def _sentences(words: np.ndarray, ends: np.ndarray) -> str:
    return " ".join(f"{word}." if end else word for word, end in zip(words, ends, strict=True))
