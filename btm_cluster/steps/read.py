"""Reads sources into texts, and deals texts into random parts.

Either ends in an artifact that names the text as its part.
"""

from collections.abc import Iterator
from pathlib import Path

from btm_cluster.data.corpus import Text, write_random_part, write_text
from btm_cluster.data.data_sets import pinned
from btm_cluster.errors import IntegrityError
from btm_cluster.ledger import Artifact, Ledger, Origin, Ref, artifact_key
from btm_cluster.requests import ReadText, ShuffleTexts
from btm_cluster.requests.progress import Control, Counter
from btm_cluster.steps.stored import count_documents, whole_documents_of
from btm_cluster.storage.scratch import scratch_folder


def read_text(request: ReadText, ledger: Ledger, control: Control) -> Artifact:
    """Reads a source: its documents become shards of a text."""
    size = request.source_bytes
    read = Counter(control, request.label, "reading", size, "bytes" if size else "documents")

    def sorting(parts: list[Path]) -> Iterator[Path]:
        return Counter(control, request.label, "sorting", len(parts), "parts").over(parts)

    source = pinned(request.source, request.fingerprint)
    with scratch_folder() as folder:
        text = write_text(
            source,
            request.reading,
            request.is_target,
            folder,
            request.most_bytes,
            read.add,
            sorting,
            request.template,
        )
        return _commit_text(request, text, ledger)


def shuffle_texts(request: ShuffleTexts, ledger: Ledger, control: Control) -> Artifact:
    """Writes one of the parts that the texts' training documents are dealt into."""
    texts = sorted(request.texts)
    total = sum(count_documents(ledger, text, "train") for text in texts)
    shuffled = Counter(control, request.label, "shuffling", total, "documents")
    documents = shuffled.over(d for text in texts for d in whole_documents_of(ledger, text, "train"))
    with scratch_folder() as folder:
        part = write_random_part(documents, request.part, len(request.texts), request.random_seed, folder)
        return _commit_text(request, part, ledger)


def _commit_text(request: ReadText | ShuffleTexts, text: Text, ledger: Ledger) -> Artifact:
    ref = Ref("text", text.identity)
    ledger.check_not_purged(ref)
    files: dict[str, Path] = text.files
    # The text first, then what names it: a text that is named must be there.
    ledger.commit(Origin(ref, {"documents": text.identity}, {}), files, text.facts)
    facts = {"skipped": dict(sorted(text.bad.items()))}
    read = ledger.commit(request, {}, facts, {"name": request.label}, parts=[ref])
    (named,) = read.parts
    if named != ref:
        raise IntegrityError(
            f"the text {named.identity[:12]} of {request.label!r} was lost, and reading its source again "
            "gives another",
            found=f"text {ref.identity[:12]}",
            expected=artifact_key(named),
            remedy=f"restore that from a backup, or delete {artifact_key(request.ref)} to go on with the "
            "other text",
        )
    return read
