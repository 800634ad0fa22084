"""The texts of a run in numbers: sizes by domain (the paper's Table 7), what was skipped, test text seen in
training, and which texts a forest and its baselines are not compared on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText, overlap_requests, stored_text
from btm_cluster.evaluation.judgement import ADDED_LATER
from btm_cluster.forest import Forest
from btm_cluster.ledger import Artifact, Ref

MOST_SEEN = 0.01
"""Share of a target's test documents that may stand in a text which one side
alone learned from: short ones do by chance."""


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
    """Test documents that stand in the training text of any domain, the text's own included."""
    test_windows: int
    """Distinct runs of 20 words in the test documents."""
    test_windows_in_training: int


def report_texts(prepared: PreparedPlan, driver: Driver) -> list[TextReport]:
    """A row for each domain and target; compares test with training text where that has not been done."""
    overlaps = driver.require(overlap_requests(prepared.texts, prepared.domains))
    return [_report_text(text, overlaps, driver) for text in prepared.texts]


def left_out_of_comparison(prepared: PreparedPlan, forest: Forest, driver: Driver) -> dict[str, str]:
    """Texts, each with a reason, from which the forest's experts learned and its
    baselines did not, or the other way round.

    Seed, Transformer-LM and DEMix learn from the founding domains, whatever becomes of the forest. What is
    left is the founding domains that have an expert, and the targets of which no documents stand in a text
    that one side alone learned from.
    """
    founding = dict(forest.foundation.domains)
    experts = {expert.domain: expert.text for expert in forest.experts}
    reasons = {name: ADDED_LATER for name in experts if name not in founding}
    reasons |= {name: "founding domain without an expert" for name in founding if name not in experts}
    reasons |= {
        domain.name: "no expert yet"
        for domain in prepared.domains
        if domain.name not in {**founding, **experts}
    }
    one_sided = {name: text for name, text in (founding | experts).items() if name in reasons}
    return reasons | targets_seen_in(prepared, one_sided, driver)


def targets_seen_in(prepared: PreparedPlan, domains: Mapping[str, str], driver: Driver) -> dict[str, str]:
    """Targets of which documents stand in the training text of a domain, and how many.

    `domains` are text identities by name.
    """
    targets = [
        text for text in prepared.texts if text.is_target and text.facts["splits"]["test"]["documents"]
    ]
    if not targets:
        return {}
    standing = {
        name: text for name, text in domains.items() if driver.ledger.find(Ref("text", text)) is not None
    }
    trained_on = [stored_text(name, text, prepared, driver.ledger) for name, text in standing.items()]
    overlaps = driver.require(overlap_requests(prepared.texts, trained_on))
    seen: dict[str, str] = {}
    for name, overlap in zip(standing, overlaps, strict=True):
        for target in targets:
            seen_D = np.load(driver.ledger.open_file(overlap, f"{target.identity}-documents.npy"))
            if seen_D.mean() > MOST_SEEN:
                seen[target.name] = f"{seen_D.mean():.0%} of it in the training text of {name}"
    return seen


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
