"""Chat data: messages of a row in their forms, rendered by a template, as tokens that are predicted or read alone."""

import csv
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from btm_cluster.data.blocks import END, READ, TEXT, PackedBlocks, TokenisedDocument, pack_blocks, tokenised
from btm_cluster.data.chat_tokens import tokenised_documents
from btm_cluster.data.conversations import Conversation
from btm_cluster.data.corpus import write_random_part, write_text
from btm_cluster.data.documents import BadDocument, Document
from btm_cluster.data.shards import read_shard
from btm_cluster.data.sources import read_documents
from btm_cluster.data.tokenizer import (
    TOKENIZER_FILES,
    TextTokenizer,
    load_tokenizer,
    open_pretrained_tokenizer,
)
from btm_cluster.data.tokenizer_training import train_tokenizer
from btm_cluster.driver.chat_template import chat_template_of
from btm_cluster.driver.text_requests import read_requests
from btm_cluster.errors import PlanError, TextError, UserError
from btm_cluster.operations.init import CHAT_TEMPLATE
from btm_cluster.plan import ChatTemplate, Plan, ReadingPlan, TextPlan
from tests.chatting import MARKED, TURN_BY_TURN, conversations, write_conversations, write_tokenizer
from tests.conftest import made_up_documents
from tests.reading import reasons

ASKED = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A ship."}]


def read_rows(path: Path, template: str | None = None, **fields: Any) -> list[Document | BadDocument]:
    source = TextPlan(name="chat", text=(str(path),), **({"messages": ("messages",)} | fields))
    chat = None if template is None else ChatTemplate(template)
    return list(read_documents(source, ReadingPlan(), template=chat))


def documents_in(path: Path) -> list[Document]:
    return [item for item in read_rows(path) if isinstance(item, Document)]


def as_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def as_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(
            {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
            for row in rows
        )


@pytest.mark.parametrize(
    ("ending", "write"), [("jsonl", as_json_lines), ("parquet", as_parquet), ("csv", as_table)]
)
@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": ASKED}, {}),
        (
            {
                "conversations": [
                    {"from": "human", "value": "What is it?"},
                    {"from": "gpt", "value": "A ship."},
                ]
            },
            {"messages": ("conversations",)},
        ),
        ({"question": "What is it?", "answer": "A ship."}, {"messages": ("question", "answer")}),
        (
            {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in ASKED]},
            {},
        ),
    ],
    ids=["role-and-content", "from-and-value", "prompt-and-completion", "parts"],
)
def test_each_form_of_chat_data_is_the_same_conversation(
    row: dict[str, Any],
    fields: dict[str, Any],
    ending: str,
    write: Callable[[Path, list[dict[str, Any]]], None],
    tmp_path: Path,
) -> None:
    write(tmp_path / f"a.{ending}", [row, row])
    for item in read_rows(tmp_path / f"a.{ending}", **fields):
        assert isinstance(item, Document)
        assert item.conversation is not None
        assert item.conversation.messages == ASKED
        assert item.text == "What is it?\n\nA ship."


def test_json_lines_and_parquet_of_the_same_messages_are_the_same_conversations(tmp_path: Path) -> None:
    """Parquet gives every tool call the arguments of all others, as null; a time is no JSON."""

    def call(**arguments: Any) -> list[dict[str, Any]]:
        calls = [{"function": {"name": "find", "arguments": arguments}}]
        return [ASKED[0], {"role": "assistant", "tool_calls": calls}]

    rows = [{"messages": messages} for messages in (ASKED, call(city="Rome"), call(days=[1, 2]))]
    as_json_lines(tmp_path / "a.jsonl", rows)
    timed = [
        {"messages": [m | {"at": datetime(2024, 7, 26), "raw": b"x"} for m in r["messages"]]} for r in rows
    ]
    as_parquet(tmp_path / "a.parquet", timed)
    by_file = [
        [one.conversation.to_json() for one in documents_in(path) if one.conversation]
        for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet")
    ]
    assert by_file[0] == by_file[1]
    assert by_file[0] == [Conversation(row["messages"]).to_json() for row in rows]


def nested(depth: int) -> dict[str, Any]:
    """A message of the user with lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return ASKED[0] | {"more": value}


BAD_ROWS = {
    "a row without messages in the field 'messages'": [
        {"text": "plain"},
        {"messages": "plain"},
        {"messages": []},
    ],
    "a message without a role and content": [{"messages": ["Hello"]}],
    "a message of the unknown role 'narrator'; known are system, developer, user, assistant, tool": [
        {"messages": [{"role": "narrator", "content": "Once."}, *ASKED]}
    ],
    "a message of the user without text": [
        {"messages": [{"role": "user", "content": None}, ASKED[1]]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASKED[1]]},
    ],
    "an empty turn of the assistant": [{"messages": [ASKED[0], {"role": "assistant", "content": " \n"}]}],
    "messages without a turn of the assistant": [{"messages": ASKED[:1]}],
    "a message that is nested more than 100 deep": [{"messages": [nested(100), *ASKED]}],
    "a document that is not UTF-8": [{"messages": [{"role": "user", "content": "\ud800"}, ASKED[1]]}],
    "the chat template refuses the messages: no tools here": [
        {"messages": [*ASKED, {"role": "tool", "content": "4"}]}
    ],
}
REFUSING = (
    "{%- if messages[-1].role == 'tool' -%}{{ raise_exception('no tools here') }}{%- endif -%}" + TURN_BY_TURN
)


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_one_clear_error_or_is_counted(reason: str, tmp_path: Path) -> None:
    rows = BAD_ROWS[reason]
    as_json_lines(tmp_path / "a.jsonl", [{"messages": ASKED}, *rows])
    found = read_rows(tmp_path / "a.jsonl", REFUSING)
    assert reasons(found) == [reason] * len(rows)
    source = TextPlan(name="chat", text=(str(tmp_path / "a.jsonl"),), messages=("messages",))
    with pytest.raises(TextError, match="the text of 'chat' has a bad document") as caught:
        write_text(source, ReadingPlan(), False, tmp_path, template=ChatTemplate(REFUSING))
    assert caught.value.found == f"{tmp_path}/a.jsonl:2: {reason}"


def test_a_template_that_changes_turns_as_others_follow_is_refused_unless_it_marks_them(
    tmp_path: Path,
) -> None:
    """As those do that leave out what the assistant thought, once the user goes on."""
    last_only = "{{ 'thought: ' if loop.last and message.role == 'assistant' else '' }}"
    body = "{%- for message in messages -%}" + last_only + "{{ message.content + '|' }}{%- endfor -%}"
    as_json_lines(tmp_path / "a.jsonl", [{"messages": ASKED}, {"messages": ASKED * 2}])
    one, other = read_rows(tmp_path / "a.jsonl", body)
    assert isinstance(one, Document)
    assert isinstance(other, BadDocument)
    assert "mark what the assistant says by {% generation %}" in other.reason
    marked = body.replace("{{ message.content", "{% generation %}{{ message.content").replace(
        "'|' }}", "'|' }}{% endgeneration %}"
    )
    assert reasons(read_rows(tmp_path / "a.jsonl", marked)) == []


@pytest.mark.parametrize(
    ("before", "messages", "reason"),
    [
        ("", ASKED, "begins a turn of the assistant otherwise than its prompt for one"),
        ("{%- if messages -%}", [ASKED[1], *ASKED], "begins with the assistant"),
        ("{%- if messages[0].role != 'tool' -%}", [ASKED[1], *ASKED], "begins with the assistant"),
    ],
    ids=["prompt-opens-a-thought", "no-prompt", "refuses-no-messages"],
)
def test_a_turn_whose_header_would_be_learned_is_refused(
    before: str, messages: list[dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    thought = "{%- if add_generation_prompt -%}{{- '<think>' -}}{%- endif -%}"
    template = TURN_BY_TURN + thought if not before else before + TURN_BY_TURN + "{%- endif -%}"
    as_json_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    (found,) = reasons(read_rows(tmp_path / "a.jsonl", template))
    assert reason in found
    assert "{% generation %}" in found


def test_a_conversation_that_begins_with_the_assistant_is_read_where_there_is_a_prompt_for_it(
    tmp_path: Path,
) -> None:
    as_json_lines(tmp_path / "a.jsonl", [{"messages": [ASKED[1], *ASKED]}])
    (found,) = read_rows(tmp_path / "a.jsonl", TURN_BY_TURN)
    assert isinstance(found, Document)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "turn by turn": write_tokenizer(folder / "turn-by-turn"),
        "marked": write_tokenizer(folder / "marked", MARKED),
        "none": write_tokenizer(folder / "none", None),
        "begins": write_tokenizer(folder / "begins", "{{ bos_token }}" + TURN_BY_TURN, "<s>"),
    }


def documents(name: str = "kitchen", count: int = 20) -> list[Document]:
    found = map(Conversation, conversations(name, count))
    return [Document(one.text, conversation=one) for one in found]


def chat_tokens(folder: Path, given: list[Document]) -> tuple[TextTokenizer, list[TokenisedDocument]]:
    tokenizer = open_pretrained_tokenizer(folder)
    assert tokenizer.chat_template is not None
    return tokenizer, list(tokenised_documents(given, tokenizer, tokenizer.chat_template))


def test_tokens_and_what_is_predicted_are_those_of_transformers(tokenizers: dict[str, Path]) -> None:
    given = documents()
    tokenizer, marked = chat_tokens(tokenizers["marked"], given)
    auto = AutoTokenizer.from_pretrained(tokenizers["marked"])
    for document, tokens in zip(given, marked, strict=True):
        assert document.conversation is not None
        expected = auto.apply_chat_template(
            document.conversation.messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert tokens.ids == [*expected["input_ids"], tokenizer.end_of_text]
        assert tokens.marks is not None
        assert (tokens.marks != READ).astype(int).tolist() == [*expected["assistant_masks"], 0]
    _, by_turn = chat_tokens(tokenizers["turn by turn"], given)
    for one, other in zip(marked, by_turn, strict=True):
        assert (one.ids, one.text_bytes) == (other.ids, other.text_bytes)
        np.testing.assert_array_equal(one.marks, other.marks)


def test_bytes_are_those_of_what_the_assistant_says_and_the_token_that_ends_it_is_no_text(
    tokenizers: dict[str, Path],
) -> None:
    given = documents("harbour")
    tokenizer, found = chat_tokens(tokenizers["turn by turn"], given)
    for document, tokens in zip(given, found, strict=True):
        assert document.conversation is not None
        said = [m["content"] for m in document.conversation.messages if m["role"] == "assistant"]
        assert tokens.text_bytes == sum(len(text.encode()) for text in said)
        marks = np.array(tokens.marks)
        ids = np.array(tokens.ids)
        assert tokenizer.decode(ids[marks == TEXT].tolist()) == "".join(said)
        assert [tokenizer.name(i) for i in ids[marks == END]] == ["<|im_end|>"] * len(said)


def test_a_special_token_that_swallows_white_space_takes_none_of_an_answers_bytes(
    tokenizers: dict[str, Path],
) -> None:
    """Its span reaches into the turn before it, or out of the turn that it ends."""
    tokenizer = open_pretrained_tokenizer(tokenizers["none"])
    wide = [AddedToken(name, special=True, lstrip=True, rstrip=True) for name in ("<|asks|>", "<|ends|>")]
    tokenizer.backend.add_special_tokens(wide)
    body = "{%- for m in messages -%}{{ '<|asks|>' }}{% generation %}{{ ' ' + m.content }}{% endgeneration %}"
    ends = "{{ ' <|ends|> ' }}"
    for inside, outside in ((ends, ""), ("", ends)):
        template = (
            body.replace("{% endgeneration %}", inside + "{% endgeneration %}" + outside) + "{%- endfor -%}"
        )
        given = [Document("", conversation=Conversation([ASKED[1], ASKED[1]]))]
        (tokens,) = tokenised_documents(given, tokenizer, ChatTemplate(template))
        marks, ids = np.array(tokens.marks), np.array(tokens.ids)
        assert tokens.text_bytes == 2 * len("A ship.")
        assert tokenizer.decode(ids[marks == TEXT].tolist()) == "A ship." * 2
        ending = ["<|ends|>"] * 2 if inside else ["<|endoftext|>"]
        assert [tokenizer.name(i) for i in ids[marks == END]] == ending


@pytest.mark.parametrize(
    ("after", "last_mark"),
    [("", END), ("{{ eos_token }}", END), ("<|im_end|>\n", READ), ("{% endgeneration %}\n", END)],
)
def test_a_conversation_ends_once_and_the_model_learns_to_end_it(
    after: str, last_mark: int, tokenizers: dict[str, Path]
) -> None:
    """Where a turn ends by a token of its own, the end of text after it is read alone."""
    opened = "{% generation %}" if "endgeneration" in after else ""
    body = "{%- for m in messages -%}" + opened + "{{ m.role + ': ' + m.content }}" + after + "{%- endfor -%}"
    tokenizer = open_pretrained_tokenizer(tokenizers["none"])
    template = ChatTemplate(body, tokenizer.special_tokens_by_name)
    (tokens,) = tokenised_documents([Document("", conversation=Conversation(ASKED))], tokenizer, template)
    assert tokens.marks is not None
    assert tokens.ids[-1] == tokenizer.end_of_text
    assert tokens.ids[-2] != tokenizer.end_of_text
    assert tokens.marks[-1] == last_mark


def test_the_template_of_init_teaches_a_trained_tokenizers_model_to_end_each_turn(
    chat_fields: dict[str, Any], tmp_path: Path
) -> None:
    """Such a tokenizer has no <|im_end|>: spelled, it would be text that is learned and measured."""
    train_tokenizer(made_up_documents("kitchen", 100), 400, tmp_path / "trained")
    tokenizer = load_tokenizer({name: tmp_path / "trained" / name for name in TOKENIZER_FILES})
    (tmp_path / "init.jinja").write_text(CHAT_TEMPLATE)
    chat_fields["reading"] = {"chat_template": str(tmp_path / "init.jinja")}
    template = chat_template_of(
        Plan.model_validate(chat_fields | {"tokenizer": {"train": {"vocabulary": 400}}})
    )
    given = [Document("", conversation=Conversation([*ASKED, *ASKED]))]
    (tokens,) = tokenised_documents(given, tokenizer, template)
    assert tokens.text_bytes == 2 * len("A ship.")
    marks, ids = np.array(tokens.marks), np.array(tokens.ids)
    assert tokenizer.decode(ids[marks == TEXT].tolist()) == "A ship." * 2
    assert ids[marks == END].tolist() == [tokenizer.end_of_text] * 2
    assert ids[-1] == tokenizer.end_of_text
    assert (ids == tokenizer.end_of_text).sum() == 2, "the template's own end is the document's"


def test_plain_text_beside_conversations_stays_what_it_was(tokenizers: dict[str, Path]) -> None:
    plain = made_up_documents("kitchen", 5)
    tokenizer = open_pretrained_tokenizer(tokenizers["turn by turn"])
    mixed = [one for pair in zip(map(Document, plain), documents(count=5), strict=True) for one in pair]
    found = list(tokenised_documents(mixed, tokenizer, tokenizer.chat_template))
    assert found[::2] == list(tokenised(plain, tokenizer))
    assert all(one.marks is not None for one in found[1::2])


def packed(tokens: list[TokenisedDocument], tokenizer: TextTokenizer, block_tokens: int) -> PackedBlocks:
    return pack_blocks(tokens, tokenizer, block_tokens, keep_rest=True)


@pytest.mark.parametrize("block_tokens", [16, 37])
def test_documents_begin_with_the_tokenizers_own_token_which_is_read_alone(
    block_tokens: int, tokenizers: dict[str, Path]
) -> None:
    """A model that was trained with <s> before each text has never seen one without. A block is read after it
    anyway."""
    texts = ["", *made_up_documents("kitchen", 30, words_per_document=9)]
    tokenizer = open_pretrained_tokenizer(tokenizers["begins"])
    assert tokenizer.name(tokenizer.first_token) == "<s>"
    blocks = packed(list(tokenised(texts, tokenizer)), tokenizer, block_tokens)
    stream, owners, marks = list[int](), list[int](), list[int]()
    for number, text in enumerate(texts):
        begins = bool(len(stream) % block_tokens)
        ids = [*[tokenizer.first_token] * begins, *tokenizer.encode(text), tokenizer.end_of_text]
        stream, owners = stream + ids, owners + [number] * len(ids)
        marks += [READ] * begins + [TEXT] * (len(ids) - begins - 1) + [END]
    assert blocks.marks is not None
    padding = -len(stream) % block_tokens
    assert blocks.tokens.ravel().tolist() == stream + [tokenizer.end_of_text] * padding
    assert blocks.documents.ravel().tolist() == owners + [-1] * padding
    assert blocks.marks.ravel().tolist() == marks + [READ] * padding
    assert blocks.bytes_of_documents.tolist() == [len(text) for text in texts]


def test_a_template_that_begins_texts_itself_begins_them_once(tokenizers: dict[str, Path]) -> None:
    tokenizer, tokens = chat_tokens(tokenizers["begins"], documents(count=10))
    blocks = packed(tokens, tokenizer, 64)
    stream = blocks.tokens.ravel()[blocks.documents.ravel() >= 0]
    assert (stream == tokenizer.first_token).sum() == len(tokens) - 1, "the first block is read after one"
    whole = [i for document in tokens for i in document.ids]
    assert stream.tolist() == whole[1:], "no block of this text begins with a conversation but the first"


def test_a_text_of_messages_is_the_same_by_any_template_and_none_by_plain_text(tmp_path: Path) -> None:
    write_conversations(tmp_path / "a.jsonl", "kitchen", 30)
    source = TextPlan(name="chat", text=(str(tmp_path / "a.jsonl"),), messages=("messages",))
    found = []
    for number, template in enumerate([None, TURN_BY_TURN, MARKED]):
        chat = None if template is None else ChatTemplate(template)
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(write_text(source, ReadingPlan(), False, folder, template=chat))
    assert len({text.identity for text in found}) == 1
    assert found[0].facts["conversations"] == 30
    stored = [document for name in sorted(found[0].files) for document in read_shard(found[0].files[name])]
    assert sorted(d.conversation.to_json() for d in stored if d.conversation) == sorted(
        Conversation(messages).to_json() for messages in conversations("kitchen", 30)
    )
    as_json_lines(tmp_path / "b.jsonl", [{"text": document.text} for document in stored])
    (tmp_path / "plain").mkdir()
    plain = write_text(
        TextPlan(name="plain", text=(str(tmp_path / "b.jsonl"),)), ReadingPlan(), False, tmp_path / "plain"
    )
    assert plain.identity != found[0].identity
    assert plain.facts["splits"] == found[0].facts["splits"], "what is said decides the split"


def test_texts_dealt_at_random_keep_their_conversations(tmp_path: Path) -> None:
    given = [*documents(count=20), *map(Document, made_up_documents("harbour", 10))]
    kept = []
    for part in range(2):
        (tmp_path / str(part)).mkdir()
        text = write_random_part(given, part, 2, 0, tmp_path / str(part))
        kept += [document for name in text.files for document in read_shard(text.files[name])]

    def by_value(found: list[Document]) -> list[tuple[str, str]]:
        return sorted((d.text, d.conversation.to_json() if d.conversation else "") for d in found)

    assert by_value(kept) == by_value(given)


@pytest.fixture
def chat_fields(fields: dict[str, Any], tokenizers: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A plan with a text of messages."""
    text = {"name": "chat", "text": str(write_conversations(tmp_path / "a.jsonl", "kitchen", 9))}
    tokenizer = {"pretrained": str(tokenizers["turn by turn"])}
    domains = [*fields["domains"], text | {"messages": "messages"}]
    return fields | {"domains": domains, "tokenizer": tokenizer}


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for message in messages %}", "is not Jinja"),
        ("{{ strftime_now('%d %b %Y') }}", "writes today's date"),
        (
            "{{ date_string }}{% for m in messages %}{{ strftime_now('%Y') }}{% endfor %}",
            "writes today's date",
        ),
        (None, "cannot read the chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_before_a_text_is_read(
    template: str | None, found: str, chat_fields: dict[str, Any], tmp_path: Path
) -> None:
    if template is not None:
        (tmp_path / "own.jinja").write_text(template)
    chat_fields["reading"] = {"chat_template": str(tmp_path / "own.jinja")}
    with pytest.raises(PlanError, match=found) as caught:
        read_requests(Plan.model_validate(chat_fields))
    assert caught.value.remedy


def test_a_template_that_takes_a_given_date_may_know_the_time(
    chat_fields: dict[str, Any], tmp_path: Path
) -> None:
    """As Llama 3.2's does."""
    given = (
        "{%- if date_string is not defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
    )
    (tmp_path / "own.jinja").write_text(given + "{{ date_string }}" + TURN_BY_TURN)
    chat_fields["reading"] = {"chat_template": str(tmp_path / "own.jinja")}
    assert chat_template_of(Plan.model_validate(chat_fields)).source.startswith(given)


def test_messages_without_any_template_are_refused(
    chat_fields: dict[str, Any], tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    for tokenizer in ({"train": {"vocabulary": 400}}, {"pretrained": str(tokenizers["none"])}):
        plan = Plan.model_validate(chat_fields | {"tokenizer": tokenizer})
        with pytest.raises(UserError, match="messages need a chat template") as caught:
            read_requests(plan)
        assert "reading.chat_template" in caught.value.remedy
        (tmp_path / "own.jinja").write_text(TURN_BY_TURN)
        own = plan.reading.model_copy(update={"chat_template": str(tmp_path / "own.jinja")})
        requests = read_requests(plan.model_copy(update={"reading": own}))
        assert [request.label for request in requests if request.template] == ["chat"]


def test_only_a_text_of_messages_hangs_on_the_template(
    chat_fields: dict[str, Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    before = read_requests(Plan.model_validate(chat_fields))
    (tmp_path / "own.jinja").write_text(TURN_BY_TURN + "\n")
    chat_fields["reading"] = fields.get("reading", {}) | {"chat_template": str(tmp_path / "own.jinja")}
    after = read_requests(Plan.model_validate(chat_fields))
    same = [one.ref == other.ref for one, other in zip(before, after, strict=True)]
    assert [one.label for one, kept in zip(before, same, strict=True) if not kept] == ["chat"]


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"text": "a.txt"}, "messages only in files with rows"),
        ({"text": "a.jsonl", "field": "body"}, "either a `field` that holds a document, or `messages`"),
        ({"text": "a.jsonl", "messages": ["a", "b", "c"]}, "messages"),
    ],
)
def test_messages_that_fit_no_file_are_refused(
    more: dict[str, Any], found: str, fields: dict[str, Any]
) -> None:
    fields["domains"].append({"name": "chat", "messages": "messages"} | more)
    with pytest.raises(ValueError, match=found):
        Plan.model_validate(fields)
