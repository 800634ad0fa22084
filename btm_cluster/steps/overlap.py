"""Finds test documents, and windows of them, in a training text."""

from pathlib import Path

import numpy as np

from btm_cluster.data.overlap import TestText, mark_seen
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.requests import FindOverlap
from btm_cluster.requests.progress import Control, Counter
from btm_cluster.steps.stored import count_documents, documents_of
from btm_cluster.storage.scratch import scratch_folder


def find_overlap(request: FindOverlap, ledger: Ledger, control: Control) -> Artifact:
    """Marks, for each test text, the documents and windows that also stand in
    the training text: bool arrays."""
    total = count_documents(ledger, request.text, "train")
    compared = Counter(control, request.shown, "comparing", total, "documents")
    tests = {text: TestText(documents_of(ledger, text, "test")) for text in request.tests}
    mark_seen(list(tests.values()), compared.over(documents_of(ledger, request.text, "train")))
    with scratch_folder() as folder:
        files: dict[str, Path] = {}
        for text, test in tests.items():
            for name, seen in (("documents", test.seen_documents), ("windows", test.seen_windows)):
                files[f"{text}-{name}.npy"] = folder / f"{text}-{name}.npy"
                np.save(files[f"{text}-{name}.npy"], seen)
        return ledger.commit(request, files, {})
