"""Helpers for tests of chat data: a tiny tokenizer with a chat template, and conversations."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.conftest import made_up_documents

END = "<|endoftext|>"
TURN_BY_TURN = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
MARKED = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}
{%- else -%}{{- message['content'] + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
"""The same, with what the assistant says marked."""


def write_tokenizer(folder: Path, template: str | None = TURN_BY_TURN, begins: str | None = None) -> Path:
    """A byte-level BPE of 400 tokens with ChatML's special ones; `begins` is put before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, "<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(made_up_documents("kitchen", 100), trainer)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    if begins is not None:
        place = (begins, tokenizer.token_to_id(begins))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begins} $A", pair=f"{begins} $A {begins} $B", special_tokens=[place]
        )
        config["bos_token"] = begins
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def conversations(name: str, count: int) -> list[list[dict[str, str]]]:
    """Made-up ones of one to three questions, of the words of a domain."""
    draw = random.Random(name)
    sentences = [" ".join(document.split()[:12]) for document in made_up_documents(name, 6 * count)]
    found = []
    for _ in range(count):
        messages = [{"role": "system", "content": f"You know the {name}."}]
        for _ in range(draw.randint(1, 3)):
            messages += [
                {"role": "user", "content": sentences.pop()},
                {"role": "assistant", "content": sentences.pop()},
            ]
        found.append(messages)
    return found


def write_conversations(path: Path, name: str, count: int) -> Path:
    """As JSON lines with a field `messages`."""
    rows = ({"id": i, "messages": messages} for i, messages in enumerate(conversations(name, count)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
