"""Shards of a stored text: zstd-compressed JSON lines, a document or a conversation each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from btm_cluster.data.conversations import Conversation
from btm_cluster.data.documents import Document

SHARD_CHARACTERS = 32_000_000


def read_shard(path: Path) -> Iterator[Document]:
    """The documents of a shard file."""
    with pyarrow.input_stream(str(path), compression="zstd") as stream:
        rest = b""
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                row = json.loads(line)
                messages = row.get("messages")
                yield Document(row["text"], conversation=None if messages is None else Conversation(messages))


class ShardWriter:
    """Writes one split's documents into .jsonl.zst files of about SHARD_CHARACTERS each."""

    def __init__(self, split: str, folder: Path) -> None:
        self.documents = self.characters = self.words = self.conversations = 0
        self.names: list[str] = []
        self._split, self._folder = split, folder
        self._stream: Any = None
        self._room = 0

    def write(self, document: str, is_conversation: bool) -> None:
        """Takes a document's text, or a conversation as JSON."""
        if self._stream is None or self._room <= 0:
            self._next_shard()
        row: dict[str, Any] = {"text": document}
        if is_conversation:
            conversation = Conversation.of(document)
            row = {"text": conversation.text, "messages": conversation.messages}
            self.conversations += 1
        text = row["text"]
        self._stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._room -= len(text)
        self.documents += 1
        self.characters += len(text)
        self.words += len(text.split())

    def close(self) -> dict[str, Path]:
        """Ends the last file. All of them, by name."""
        if self._stream is not None:
            self._stream.close()
        return {name: self._folder / name for name in self.names}

    def _next_shard(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self.names.append(f"{self._split}-{len(self.names):05d}.jsonl.zst")
        self._stream = pyarrow.output_stream(str(self._folder / self.names[-1]), compression="zstd")
        self._room = SHARD_CHARACTERS
