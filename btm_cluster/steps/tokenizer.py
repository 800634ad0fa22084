"""Trains a tokenizer on texts, or brings a pretrained one into the store."""

from collections.abc import Mapping
from pathlib import Path

from btm_cluster.data.tokenizer import TOKENIZER_FILES, TextTokenizer, load_tokenizer
from btm_cluster.data.tokenizer_training import take_characters
from btm_cluster.data.tokenizer_training import train_tokenizer as train_on
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import ImportTokenizer, TrainTokenizer
from btm_cluster.requests.progress import Control, Counter, Progress
from btm_cluster.steps.stored import documents_of
from btm_cluster.storage.scratch import scratch_folder


def train_tokenizer(request: TrainTokenizer, ledger: Ledger, control: Control) -> Artifact:
    """Trains one on the first characters of each text."""
    limit = request.settings.characters_per_domain
    held = [ledger.get(Ref("text", text)).facts["splits"]["train"]["characters"] for text in request.texts]
    total = sum(min(characters, limit) for characters in held)
    counter = Counter(control, request.label, "training", total, "characters")
    documents = counter.over(
        (
            document
            for text in request.texts
            for document in take_characters(documents_of(ledger, text, "train"), limit)
        ),
        size=len,
    )
    with scratch_folder() as folder:
        train_on(documents, request.settings.vocabulary, folder)
        files = {name: folder / name for name in TOKENIZER_FILES}
        return _commit(request, ledger, files, load_tokenizer(files))


def import_tokenizer(request: ImportTokenizer, ledger: Ledger, control: Control) -> Artifact:
    """Stores a pretrained tokenizer as it is."""
    from btm_cluster.language_model.pretrained import import_pretrained_tokenizer  # and torch with it

    control.report(Progress(request.label, "importing"))
    with scratch_folder() as folder:
        return _commit(request, ledger, *import_pretrained_tokenizer(request, folder))


def _commit(
    request: TrainTokenizer | ImportTokenizer,
    ledger: Ledger,
    files: Mapping[str, Path],
    tokenizer: TextTokenizer,
) -> Artifact:
    facts = {"vocabulary": tokenizer.vocabulary, "first_token": tokenizer.first_token}
    return ledger.commit(request, files, facts)
