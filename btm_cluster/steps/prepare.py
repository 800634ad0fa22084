"""The verb *prepare*: sources to texts, texts to tokenizers and token blocks, and what texts have in common."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from btm_cluster.errors import IntegrityError
from btm_cluster.language_model.blocks import pack_blocks
from btm_cluster.language_model.corpus import Text, read_shard, write_random_part, write_text
from btm_cluster.language_model.data_sets import pinned
from btm_cluster.language_model.overlap import TestText, mark_seen
from btm_cluster.language_model.tokenizer import (
    TOKENIZER_FILES,
    TextTokenizer,
    load_tokenizer,
    take_characters,
    train_tokenizer,
)
from btm_cluster.ledger import Artifact, Ledger, Ref, artifact_key
from btm_cluster.requests import (
    FindOverlap,
    ImportTokenizer,
    PrepareRequest,
    ReadText,
    ShuffleTexts,
    Tokenize,
    TrainTokenizer,
)
from btm_cluster.storage.scratch import scratch_folder
from btm_cluster.workers import Control, Progress


def prepare(request: PrepareRequest, ledger: Ledger, control: Control) -> Artifact:
    """Does what the request asks and commits it."""
    with scratch_folder() as folder:
        match request:
            case ReadText():
                control.report(Progress(request.label, "reading"))
                return _read_text(request, ledger, folder)
            case ShuffleTexts():
                control.report(Progress(request.label, "shuffling"))
                documents = (d for text in sorted(request.texts) for d in documents_of(ledger, text, "train"))
                parts = len(request.texts)
                return _commit_text(
                    request, write_random_part(documents, request.part, parts, request.random_seed, folder), ledger
                )
            case TrainTokenizer():
                control.report(Progress(request.label, "training the tokenizer"))
                return _train_tokenizer(request, ledger, folder)
            case ImportTokenizer():
                from btm_cluster.language_model.pretrained import import_pretrained_tokenizer  # and torch with it

                files, tokenizer = import_pretrained_tokenizer(request, folder)
                return _commit_tokenizer(request, ledger, files, tokenizer)
            case Tokenize():
                control.report(Progress(request.label, "tokenising"))
                return _tokenize(request, ledger, folder)
            case FindOverlap():
                control.report(Progress(request.label, "comparing"))
                return _find_overlap(request, ledger, folder)


def _read_text(request: ReadText, ledger: Ledger, folder: Path) -> Artifact:
    source = pinned(request.source, request.fingerprint)
    text = write_text(source, request.reading, request.is_target, folder, request.most_bytes)
    return _commit_text(request, text, ledger)


def _commit_text(request: ReadText | ShuffleTexts, text: Text, ledger: Ledger) -> Artifact:
    ledger.check_not_purged(Ref("text", text.identity))
    # The text first, its memo last: a memo must never name a text that is not there.
    ledger.commit(Ref("text", text.identity), {"documents": text.identity}, text.files, text.facts)
    facts = {"text": text.identity, "skipped": dict(sorted(text.bad.items()))}
    memo = ledger.commit(request.ref, request.recipe, {}, facts, {"name": request.label})
    if memo.facts["text"] != text.identity:
        raise IntegrityError(
            f"the text {memo.facts['text'][:12]} of {request.label!r} was lost, and reading its source again gives another",
            found=f"text {text.identity[:12]}",
            expected=artifact_key(Ref("text", memo.facts["text"])),
            remedy=f"restore that from a backup, or delete {artifact_key(request.ref)} to go on with the other text",
        )
    return memo


def documents_of(ledger: Ledger, text: str, split: str) -> Iterator[str]:
    """The documents of one split of a stored text, streaming, in hash order."""
    artifact = ledger.get(Ref("text", text))
    for shard in artifact.facts["splits"][split]["shards"]:
        yield from read_shard(ledger.open_file(artifact, shard))


def open_tokenizer(ledger: Ledger, ref: Ref) -> TextTokenizer:
    """A stored tokenizer."""
    artifact = ledger.get(ref)
    files = {name: ledger.open_file(artifact, name) for name in TOKENIZER_FILES}
    return load_tokenizer(files, artifact.facts.get("first_token"))


def first_token_of(ledger: Ledger, tokens: Sequence[Ref]) -> int:
    """What models read before these token blocks."""
    tokenizer = Ref("tokenizer", ledger.get(tokens[0]).recipe["tokenizer"])
    known = ledger.get(tokenizer).facts.get("first_token")
    return open_tokenizer(ledger, tokenizer).first_token if known is None else int(known)


def _train_tokenizer(request: TrainTokenizer, ledger: Ledger, folder: Path) -> Artifact:
    limit = request.settings.characters_per_domain
    documents = (
        document for text in request.texts for document in take_characters(documents_of(ledger, text, "train"), limit)
    )
    train_tokenizer(documents, request.settings.vocabulary, folder)
    files = {name: folder / name for name in TOKENIZER_FILES}
    return _commit_tokenizer(request, ledger, files, load_tokenizer(files))


def _commit_tokenizer(
    request: TrainTokenizer | ImportTokenizer, ledger: Ledger, files: Mapping[str, Path], tokenizer: TextTokenizer
) -> Artifact:
    facts = {"vocabulary": tokenizer.vocabulary, "first_token": tokenizer.first_token}
    return ledger.commit(request.ref, request.recipe, files, facts)


def _tokenize(request: Tokenize, ledger: Ledger, folder: Path) -> Artifact:
    text = ledger.get(Ref("text", request.text))
    tokenizer = open_tokenizer(ledger, request.tokenizer)
    documents = read_shard(ledger.open_file(text, request.shard))
    held_out = request.split != "train"
    tokens, owners = pack_blocks(documents, tokenizer, request.block_tokens, keep_rest=held_out)
    files = {"tokens.npy": folder / "tokens.npy"}
    np.save(files["tokens.npy"], tokens)
    if held_out:
        files["documents.npy"] = folder / "documents.npy"
        np.save(files["documents.npy"], owners)
    real = int((owners >= 0).sum())
    return ledger.commit(request.ref, request.recipe, files, {"blocks": len(tokens), "tokens": real})


def _find_overlap(request: FindOverlap, ledger: Ledger, folder: Path) -> Artifact:
    tests = {text: TestText(documents_of(ledger, text, "test")) for text in request.tests}
    mark_seen(list(tests.values()), documents_of(ledger, request.text, "train"))
    files: dict[str, Path] = {}
    for text, test in tests.items():
        for name, seen in (("documents", test.seen_documents), ("windows", test.seen_windows)):
            files[f"{text}-{name}.npy"] = folder / f"{text}-{name}.npy"
            np.save(files[f"{text}-{name}.npy"], seen)
    return ledger.commit(request.ref, request.recipe, files, {})
