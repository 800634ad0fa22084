"""What a report says of its texts: sizes by domain (the paper's Table 7), what was skipped, and test text seen in training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from btm_cluster.driver import Driver
from btm_cluster.ground import Ground, PreparedText, overlap_requests
from btm_cluster.ledger import Artifact, Ref


@dataclass(frozen=True)
class TextReport:
    """One domain's or target's text in numbers."""

    name: str
    is_target: bool
    documents: dict[str, int]
    """By split, as are words (between spaces) and tokens."""
    words: dict[str, int]
    tokens: dict[str, int]
    duplicates: int
    skipped: dict[str, int]
    """Documents left out, by reason."""
    development_blocks: int
    test_documents_in_training: int
    """Of any domain, the text's own included."""
    test_windows: int
    """Distinct runs of 20 words in the test documents."""
    test_windows_in_training: int


def report_texts(ground: Ground, driver: Driver) -> list[TextReport]:
    """A row for each domain and target; compares test with training text where that has not been done."""
    overlaps = driver.require(driver.workers.prepare, overlap_requests(ground.texts))
    return [_report_text(text, overlaps, driver) for text in ground.texts]


def _report_text(text: PreparedText, overlaps: Sequence[Artifact], driver: Driver) -> TextReport:
    ledger = driver.ledger
    counts = text.facts["splits"]
    used = [split for split in counts if not (text.is_target and split == "train")]
    blocks = {split: [_facts(driver, ref) for ref in text.tokens[split]] for split in used}

    def seen_in_any(name: str) -> np.ndarray:
        files = [ledger.open_file(overlap, f"{text.identity}-{name}.npy") for overlap in overlaps]
        seen: np.ndarray = np.logical_or.reduce([np.load(file) for file in files])
        return seen

    windows = seen_in_any("windows")
    return TextReport(
        text.name,
        text.is_target,
        {split: counts[split]["documents"] for split in used},
        {split: counts[split]["words"] for split in used},
        {split: sum(facts["tokens"] for facts in blocks[split]) for split in used},
        text.facts["duplicates"],
        dict(text.skipped),
        sum(facts["blocks"] for facts in blocks["development"]),
        int(seen_in_any("documents").sum()),
        len(windows),
        int(windows.sum()),
    )


def _facts(driver: Driver, ref: Ref) -> dict[str, int]:
    return dict(driver.ledger.get(ref).facts)
