"""A chat template: what renders messages as the text that a model reads."""

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may name. A record of a few kB."""

    source: str
    """In Jinja."""
    special_tokens: tuple[tuple[str, str], ...] = ()
    """By name, such as `bos_token`, as the tokenizer spells them."""
    origin: str = "the chat template"
    """Where it is from, for messages."""

    @property
    def sha256(self) -> str:
        """Identifies what it renders."""
        return hashlib.sha256(json.dumps([self.source, self.special_tokens]).encode()).hexdigest()
