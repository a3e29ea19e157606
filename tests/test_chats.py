"""Chats are read in every usual form, trained as they are marked, and what cannot be read or rendered is told by its cause."""

from __future__ import annotations

import json
import re
import shutil
import time
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_answer_spans import CHATML, GEMMA, QWEN3

import edgetune
from edgetune.chat import Chat
from edgetune.config import DataConfig, TrainConfig
from edgetune.dataset.chat_notices import ChatNotices
from edgetune.dataset.chat_writer import join_system
from edgetune.dataset.pieces import STOP, TEXT
from edgetune.dataset.token_store import TokenStore, tokenize
from edgetune.documents.document import Document, Turn
from edgetune.documents.heldout import split_held_out
from edgetune.documents.reading import read_notes
from edgetune.documents.reasons import Reason
from edgetune.documents.summary import unread_chats
from edgetune.events import Finished, Sampled, Started
from edgetune.runtime.errors import DataError, TokenizerError
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.training.train import train

DEMO = Path(edgetune.__file__).parent / "demo"
QUESTION, ANSWER = Turn("user", "How deep?"), Turn("assistant", "Two inches.")
ASKED, ANSWERED = {"role": "user", "content": "How deep?"}, {"role": "assistant", "content": "Two inches."}
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "deep?"}]}


def put(folder: Path, *records: Any, name: str = "c.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return path


def read(folder: Path, *records: Any, name: str = "c.jsonl") -> list[Document]:
    return read_notes([put(folder, *records, name=name)]).documents


def tokenizer(folder: Path, template: str | None) -> Tokenizer:
    """Return the demo's tokenizer with another chat template, or without any."""
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", "</s>").replace("<end_of_turn>", "</s>"))
    return Tokenizer.load(folder)


def trained(folder: Path, documents: list[Document], template: str | None, mark: int = TEXT) -> list[str]:
    """Return the runs of tokens with this mark, as text."""
    model = tokenizer(folder / "model", template)
    store = tokenize(documents, model, folder / "store")
    runs: list[list[int]] = []
    for at, (id, role) in enumerate(zip(store.ids.tolist(), store.trained.tolist(), strict=True)):
        if role == mark:
            if not at or store.trained[at - 1] != mark:
                runs.append([])
            runs[-1].append(id)
    texts = [model.decode(run, continuing=True) for run in runs]
    if mark == TEXT:
        assert store.bytes == sum(len(text.encode()) for text in texts)
    return texts


def told(documents: list[Document], model: Tokenizer, folder: Path) -> tuple[TokenStore, tuple[str, ...]]:
    """Tokenize, and return what the user is told of it too."""
    notices = ChatNotices()
    return tokenize(documents, model, folder, notices=notices), notices.sentences()


# Forms


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [ASKED, ANSWERED]},
        {"text": "### Human: How deep?\n### Assistant:Two inches.\n"},
        {"messages": [{"role": "assistant", "content": "Hello!"}, IN_PARTS, ANSWERED]},
        {"messages": [{"from": "human", "value": "How deep?"}, {"from": "gpt", "value": "Two inches."}]},
        {"messages": [{"role": "Human", "content": "How deep?"}, {"role": "AI", "content": "Two inches."}]},
        {"conversations": [{"from": "USER", "value": "How deep?"}, {"from": "ChatGPT", "value": "Two inches."}]},
        {"instruction": "How deep?", "input": "", "output": "Two inches."},
        {"prompt": "How deep?", "completion": "Two inches."},
        {"prompt": "How deep?", "response": "Two inches."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"text": "<|im_start|>user ...", "messages": [ASKED, ANSWERED]},
        {"text": "Below is ...", "instruction": "How deep?", "output": "Two inches."},
        {"messages": None, "text": "### Human: How deep? ### Assistant: Two inches."},
        {"Messages": json.dumps([ASKED, ANSWERED])},
        {"Question": "How deep?", "Answer": "Two inches."},
        [ASKED, ANSWERED],
        [{"messages": [ASKED, ANSWERED]}],
        json.dumps({"messages": [ASKED, ANSWERED]}, indent=2),
        json.dumps([{"conversations": [ASKED, ANSWERED]}], indent=1),
    ],
)
def test_every_usual_form_gives_the_same_turns(tmp_path: Path, record: Any) -> None:
    (document,) = read(tmp_path, record)
    assert document.turns == (QUESTION, ANSWER)


def test_the_parts_of_a_record_become_turns(tmp_path: Path) -> None:
    alpaca = {"system": "Be brief.", "instruction": "How deep?", "input": "garlic", "output": "2 in", "history": [["q", "a"]]}
    developer = {"messages": [{"role": "developer", "content": "Be brief."}, ASKED, ANSWERED]}
    sharegpt = {"system": "Be kind.", "conversations": [ASKED, ANSWERED]}
    first, second, third = (document.turns for document in read(tmp_path, alpaca, developer, sharegpt))
    system = Turn("system", "Be brief.")
    last = (Turn("user", "How deep?\n\ngarlic"), Turn("assistant", "2 in"))
    assert first == (system, Turn("user", "q"), Turn("assistant", "a"), *last)
    assert second == (system, QUESTION, ANSWER)
    assert third == (Turn("system", "Be kind."), QUESTION, ANSWER)


def test_only_the_completion_of_a_pair_is_trained(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, ASKED]
    (document,) = read(tmp_path, {"prompt": messages, "completion": [ANSWERED]})
    assert [turn.trained for turn in document.turns or ()] == [True, False, True, True]


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-16", "utf-16 with BOM"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
        ("utf-32", "utf-32 with BOM"),
        ("utf-8-sig", "utf-8 with BOM"),
    ],
)
def test_chats_in_other_unicode_encodings_are_read(tmp_path: Path, encoding: str, name: str) -> None:
    line = json.dumps({"messages": [ASKED, {"role": "assistant", "content": "Où ? 日本語"}]}, ensure_ascii=False)
    (tmp_path / "c.jsonl").write_bytes(f"{line}\r\n{line}\r\n".encode(encoding))
    reading = read_notes([tmp_path])
    assert [document.turns for document in reading.documents] == [(QUESTION, Turn("assistant", "Où ? 日本語"))]
    assert reading.encodings == {name: 1}


@pytest.mark.parametrize("indent", [None, 1])
def test_a_byte_that_is_no_text_costs_its_own_record_alone(tmp_path: Path, indent: int | None) -> None:
    records = [{"messages": [ASKED, {"role": "assistant", "content": text}]} for text in ("one", "two?", "three")]
    text = "\n".join(map(json.dumps, records)) if indent is None else json.dumps(records, indent=indent)
    (tmp_path / "c.jsonl").write_bytes(text.encode().replace(b"two?", b"two\xe9"))
    reading = read_notes([tmp_path])
    assert [document.path for document in reading.documents] == ["c.jsonl#1", "c.jsonl#3"]
    assert [(skip.reason, skip.lines) for skip in reading.skipped] == [(Reason.NOT_UTF8, (2,))]


@pytest.mark.parametrize("form", ["lines", "array", "long line"])
def test_a_long_file_is_read_through_a_small_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr("edgetune.documents.chats.MAX_RECORD_CHARS", 3000)
    monkeypatch.setattr("edgetune.documents.reading.BLOCK_BYTES", 997)
    answers = [f"{number} ☕" + " inches" * (number % 300) for number in range(500)]
    answers[77] = "x" * 20_000
    records = [{"messages": [ASKED, {"role": "assistant", "content": text}]} for text in answers]
    whole = {
        "lines": "\n".join(map(json.dumps, records)),
        "array": json.dumps(records, indent=1),
        "long line": json.dumps(records),
    }
    reading = read_notes([put(tmp_path, whole[form], name="c.json")])
    told = [((document.turns or ())[1].text, document.path) for document in reading.documents]
    good = [(text, f"c.json#{number}") for number, text in enumerate(answers, 1) if number != 78]
    # Within one line, nothing says where the record after one that is too long begins.
    assert told == (good[:77] if form == "long line" else good)
    assert [(skip.reason, skip.lines) for skip in reading.skipped] == [(Reason.LONG_LINE, (78,))]


@pytest.mark.slow
def test_a_long_file_of_chats_is_read_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.documents.spool.MEMORY_BYTES", 1 << 16)
    monkeypatch.setattr("edgetune.documents.chats.MAX_RECORD_CHARS", 1 << 18)
    monkeypatch.setattr("edgetune.documents.reading.BLOCK_BYTES", 1 << 16)
    records = [{"messages": [ASKED, {"role": "assistant", "content": f"{n} " + "inches " * 10_000}]} for n in range(200)]
    put(tmp_path, json.dumps(records, indent=1))
    del records
    tracemalloc.start()
    reading = read_notes([tmp_path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reading.chats == 200
    assert reading.bytes > 14_000_000
    assert peak < 5_000_000


def test_a_record_nested_deeper_than_any_chat_is_told(tmp_path: Path) -> None:
    call = '{"function": {"name": "f", "arguments": ' + "[" * 900 + "]" * 900 + "}}"
    deep = json.dumps({"messages": [ASKED, {**ANSWERED, "tool_calls": ["CALL"]}]}).replace('"CALL"', call)
    reading = read_notes([put(tmp_path, {"messages": [ASKED, ANSWERED]}, deep)])
    assert [document.path for document in reading.documents] == ["c.jsonl#1"]
    assert [(skip.reason, skip.lines) for skip in reading.skipped] == [(Reason.BAD_LINE, (2,))]


def test_an_array_in_a_json_file_is_read_if_it_is_named(tmp_path: Path) -> None:
    records = [{"conversations": [ASKED, {"role": "assistant", "content": f"{n} inches"}]} for n in range(3)]
    path = put(tmp_path, json.dumps(records), name="sharegpt.json")
    assert [document.path for document in read_notes([path]).documents] == [f"sharegpt.json#{n}" for n in (1, 2, 3)]
    put(tmp_path, "a note", name="a.md")
    assert [document.path for document in read_notes([tmp_path]).documents] == ["a.md"]


def test_objects_over_several_lines_are_read_and_a_broken_one_costs_no_other(tmp_path: Path) -> None:
    good = [json.dumps({"messages": [ASKED, {"role": "assistant", "content": str(n)}]}, indent=2) for n in range(3)]
    broken = '{\n  "messages": [oops\n}'
    reading = read_notes([put(tmp_path, good[0], broken, good[1], good[2])])
    assert [document.path for document in reading.documents] == ["c.jsonl#1", "c.jsonl#3", "c.jsonl#4"]
    assert [(skip.reason, skip.lines) for skip in reading.skipped] == [(Reason.BAD_LINE, (2,))]


def test_hostile_files_are_read_in_little_time(tmp_path: Path) -> None:
    for text in ("[" * 5_000_000, '{"a":\n' * 300_000, "[{\n" * 300_000, '{"a":1,"a":1,"b":\n' * 100_000, "[1,\n" * 300_000):
        begun = time.process_time()
        reading = read_notes([put(tmp_path, "a note", name="a.md"), put(tmp_path, text)])
        assert [document.path for document in reading.documents] == ["a.md"]
        assert time.process_time() - begun < 3


def test_a_conversation_of_any_length_is_read(tmp_path: Path) -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n}."} for n in range(1200)]
    documents = read(tmp_path, {"messages": messages})
    assert "".join(trained(tmp_path, documents, QWEN3)).count(".") == 600


# What is not read


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"a": 1, "My dear diary, today": 2}, Reason.NOT_A_CHAT),
        (3, Reason.NOT_A_CHAT),
        ({"messages": [ASKED]}, Reason.NO_ANSWER),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0}]}, Reason.NOT_TRAINED),
        ({"messages": [{"role": "critic", "content": "x"}, ANSWERED]}, Reason.UNKNOWN_ROLE),
        ({"messages": [{"role": "user", "content": 7}, ANSWERED]}, Reason.BAD_MESSAGE),
        ({"messages": ["How deep?", ANSWERED]}, Reason.BAD_MESSAGE),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]}, Reason.NOT_TEXT),
        ({"images": ["a.png"], "messages": [ASKED, ANSWERED]}, Reason.NOT_TEXT),
        ({"messages": [ASKED, {"role": "function", "content": "2"}, ANSWERED]}, Reason.OLD_TOOLS),
        ('{"text": "a", "text": "b"}', Reason.BAD_LINE),
        ('{"text": "a"', Reason.BAD_LINE),
    ],
)
def test_a_record_that_is_not_read_names_its_cause(tmp_path: Path, record: Any, reason: Reason) -> None:
    reading = read_notes([put(tmp_path, {"text": "a good line"}, "", record)])
    (skip,) = reading.skipped
    assert (skip.reason, skip.lines) == (reason, (3,))
    (sentence,) = unread_chats(reading)
    assert sentence.startswith(f"c.jsonl: {reason.counted(1)}")
    assert re.match(r"c.jsonl: 1 (line|record|chat) ", sentence)
    assert "no. 3; expected " in sentence
    assert "dear" not in sentence


def test_the_keys_of_an_unknown_form_are_named(tmp_path: Path) -> None:
    reading = read_notes([put(tmp_path, {"text": "a"}, *[{"chosen": "x", "rejected": n} for n in range(30)])])
    (sentence,) = unread_chats(reading)
    assert "30 records that are neither a text nor a chat (keys found: chosen, rejected), no. 2, 3," in sentence
    assert "21 and 10 more; expected messages or conversations" in sentence


def test_a_json_file_without_chats_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"package.json: 1 record that is neither a text nor a chat \(keys found: name, version\)"
    ):
        read_notes([put(tmp_path, json.dumps({"name": "x", "version": 1}, indent=2), name="package.json")])


# What is trained


def test_answers_with_weight_zero_are_context(tmp_path: Path) -> None:
    messages = [ASKED, {"role": "assistant", "content": "Two miles."}, {"role": "user", "content": "Sure?"}, ANSWERED]
    for number, mark in enumerate(({"weight": 0}, {"weight": -0.0}, {"train": False}, {"weight": "0.00"})):
        marked = [messages[0], {**messages[1], **mark}, *messages[2:]]
        for template in (None, QWEN3):
            folder = tmp_path / f"{number}{template is None}"
            folder.mkdir()
            (text,) = trained(folder, read(folder, {"messages": marked}), template)
            assert text.split("\n")[-1].strip() == "Two inches."


def test_a_model_that_thinks_learns_every_answer(tmp_path: Path) -> None:
    texts = ["How deep?", "Two inches.", "When?", "In October.", "How far?", "A hand's width.", "Thanks"]
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    documents = read(tmp_path, {"messages": messages})
    assert trained(tmp_path, documents, QWEN3) == ["Two inches.", "In October.", "A hand's width."]


def test_the_end_of_every_turn_is_learnt_but_not_scored(tmp_path: Path) -> None:
    documents = read(tmp_path, {"messages": [ASKED, ANSWERED, {"role": "user", "content": "Why?"}, ANSWERED]})
    assert trained(tmp_path, documents, QWEN3, STOP) == ["", ""]


def test_the_indentation_of_an_answer_is_kept(tmp_path: Path) -> None:
    code = "    x = 1\n    y = 2"
    guanaco = f"### Human: Code?\n### Assistant:\n{code}\n"
    record = {"messages": [{"role": "user", "content": "Code?"}, {"role": "assistant", "content": code}]}
    for document in read(tmp_path, record) + read(tmp_path, {"text": guanaco}):
        assert (document.turns or ())[1].text == code
    (text,) = trained(tmp_path, read(tmp_path, record), None)
    assert text == " " + code


def test_reasoning_reaches_the_template_or_is_told(tmp_path: Path) -> None:
    documents = read(tmp_path, {"messages": [ASKED, {**ANSWERED, "reasoning_content": "Garlic is small."}]})
    assert trained(tmp_path, documents, QWEN3) == ["<think>\nGarlic is small.\n</think>\n\nTwo inches."]
    assert told(documents, tokenizer(tmp_path / "plain", GEMMA), tmp_path / "other")[1] == (
        "Left out the reasoning in 1 chat (c.jsonl#1), because the model's chat template does not write it.",
    )


# What the template refuses


def test_the_systems_turn_joins_the_users_where_a_template_refuses_it(tmp_path: Path) -> None:
    documents = read(tmp_path, {"messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED]})
    model = tokenizer(tmp_path / "model", GEMMA)
    store, notices = told(documents, model, tmp_path / "store")
    assert "user\nBe brief.\n\nHow deep?" in model.decode(store.ids.tolist())
    assert "Joined the system's turn to the user's in 1 chat (c.jsonl#1)" in notices[0]
    assert join_system([QUESTION, ANSWER, Turn("system", "S"), QUESTION, ANSWER]) == [
        QUESTION, ANSWER, Turn("user", "S\n\nHow deep?"), ANSWER,
    ]  # fmt: skip


def test_a_chat_that_the_template_refuses_ends_no_run(tmp_path: Path) -> None:
    strict = GEMMA.replace("loop.index0 % 2 == 0", "loop.index0 % 2 == 0 and m.content != 'refused'")
    refused = {"messages": [{"role": "user", "content": "refused"}, ANSWERED]}
    documents = read(tmp_path, refused, {"messages": [ASKED, ANSWERED]})
    store, notices = told(documents, tokenizer(tmp_path / "model", strict), tmp_path / "store")
    assert [document.path for document in store.documents] == ["c.jsonl#2"]
    assert notices[0].startswith("Left out 1 chat (c.jsonl#1), because the chat template in ")
    assert "it says 'Conversation roles must alternate'" in notices[0]


def test_a_broken_template_is_said_once_and_ends_the_run(tmp_path: Path) -> None:
    documents = read(tmp_path, {"messages": [ASKED, ANSWERED]}, {"text": "a note"})
    with pytest.raises(TokenizerError, match="is not valid Jinja"):
        tokenize(documents, tokenizer(tmp_path / "model", "{% for %}"), tmp_path / "store")


CALL = {"id": "1", "type": "function", "function": {"name": "depth", "arguments": '{"plant": "garlic"}'}}
TOOL_CHAT = {
    "tools": [{"type": "function", "function": {"name": "depth", "parameters": {}}}],
    "messages": [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2 in", "tool_call_id": "1"},
        ANSWERED,
    ],
}
TOOLS = """{% if tools %}{{ 'tools: ' + tools | tojson + '\\n' }}{% endif %}{% for m in messages %}
{{- m.role + ': ' + m.content + (m.tool_calls | map(attribute='function') | list | tojson if m.tool_calls else '') }}
{{- eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def test_tool_calls_are_trained_where_the_template_writes_them(tmp_path: Path) -> None:
    model = tokenizer(tmp_path / "model", TOOLS)
    documents = read(tmp_path, TOOL_CHAT)
    store, notices = told(documents, model, tmp_path / "store")
    assert model.decode(store.ids.tolist()).startswith('tools: [{"type": "function", "function": {"name": "depth"')
    text = model.decode(store.ids[store.trained == TEXT].tolist())
    assert '[{"name": "depth", "arguments": {"plant": "garlic"}}]' in text
    assert text.endswith("Two inches.")
    assert notices == ()


@pytest.mark.parametrize("template", [None, QWEN3.replace("m.role == 'user'", "m.role != 'assistant'")])
def test_tool_calls_that_nothing_writes_are_told(tmp_path: Path, template: str | None) -> None:
    documents = read(tmp_path, TOOL_CHAT, {"messages": [ASKED, ANSWERED]})
    store, notices = told(documents, tokenizer(tmp_path / "model", template), tmp_path / "store")
    assert [document.path for document in store.documents] == ["c.jsonl#2"]
    assert "Left out 1 chat (c.jsonl#1), because they call tools" in notices[0]


# Conversations


class Answering:
    """A session whose model gives prepared answers."""

    def __init__(self, model: Tokenizer, answers: list[str]) -> None:
        self.tokenizer, self.answers = model, iter(answers)
        self.model = types.SimpleNamespace(config=types.SimpleNamespace(max_positions=4096))

    def chat(self, messages: list[dict[str, str]], *_: Any) -> Iterator[str]:
        yield from next(self.answers)


@pytest.mark.parametrize(
    ("template", "said", "kept"),
    [
        (None, " Two inches.", "Two inches."),
        (GEMMA, "    x = 1\n    y = 2", "    x = 1\n    y = 2"),
        (QWEN3, "<think>\n\n</think>\n\nTwo.", "<think>\n\n</think>\n\nTwo."),
        (CHATML, "    x = 1\n", "    x = 1\n"),
    ],
)
def test_a_conversation_goes_on_from_what_the_model_wrote(tmp_path: Path, template: str | None, said: str, kept: str) -> None:
    demo = (DEMO / "chat_template.jinja").read_text()
    chat = Chat(Answering(tokenizer(tmp_path / "m", template or demo), [said]), 8, 0.0)  # type: ignore[arg-type]
    assert "".join(chat.say("How deep?")) == said
    assert chat.messages[-1] == {"role": "assistant", "content": kept}


# Whole runs


STRICT = GEMMA.replace("loop.index0 % 2 == 0", "loop.index0 % 2 == 0 and m.content != 'refused'")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that trains a tiny model with the template STRICT for a step and returns the run's events."""
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "home"))
    tiny.save_trainable(tmp_path / "tiny")
    (tmp_path / "tiny" / "chat_template.jinja").write_text(STRICT.replace("<end_of_turn>", "</s>"))

    def run(folder: Path) -> list[Any]:
        data = DataConfig(notes=(str(folder),), seq_len=64, batch_tokens=128)
        return list(train(TrainConfig(data=data, model=str(tmp_path / "tiny"), steps=1, rank=2)))

    return run


def chats(folder: Path, answers: list[str], question: str = "How deep?") -> None:
    folder.mkdir(exist_ok=True)
    put(folder, *[{"messages": [{"role": "user", "content": question}, {**ANSWERED, "content": text}]} for text in answers])


def test_a_run_tells_what_it_left_out_before_its_first_step(tmp_path: Path, run: Any) -> None:
    chats(tmp_path / "notes", ["a", "b"])
    put(tmp_path / "notes", {"messages": [{"role": "user", "content": "refused"}, ANSWERED]}, "{oops", name="d.jsonl")
    started = run(tmp_path / "notes")[0]
    assert isinstance(started, Started)
    assert started.documents == 2
    assert started.notices[0].startswith("d.jsonl: 1 line that is not JSON, no. 2; expected one JSON object a line")
    assert started.notices[1].startswith("Left out 1 chat (d.jsonl#1), because the chat template")


def test_samples_ask_in_the_models_template_and_tell_nothing_of_the_answer(tmp_path: Path, run: Any) -> None:
    chats(tmp_path / "notes", ["Two inches.", "Three inches."])
    prompts = {event.prompt for event in run(tmp_path / "notes") if isinstance(event, Sampled)}
    assert prompts == {"<s><start_of_turn>user\nHow deep?</s>\n<start_of_turn>model\n"}


def hold_out_refused_chats(notes: Path, good: int) -> None:
    """Write some good chats, and two that the template refuses, of which one or both are all that is held out."""
    chats(notes, [f"{number} " + "inches " * 40 for number in range(good)])
    for number in range(1000):
        texts = [f"{number}.{part} " + "miles " * 20 for part in range(2)]
        put(
            notes,
            *[{"messages": [{"role": "user", "content": "refused"}, {**ANSWERED, "content": text}]} for text in texts],
            name="d.jsonl",
        )
        held_out = split_held_out(read_notes([notes]).documents).held_out
        if held_out and all(document.path.startswith("d.jsonl#") for document in held_out):
            return
    raise AssertionError("a good chat is held out each time")


def test_another_document_is_held_out_where_the_held_out_side_has_no_answer(tmp_path: Path, run: Any) -> None:
    hold_out_refused_chats(tmp_path / "notes", 12)
    events = run(tmp_path / "notes")
    started, finished = events[0], events[-1]
    assert isinstance(started, Started)
    assert started.heldout_documents == 1
    assert started.documents == 11
    assert started.heldout_paths[0].startswith("c.jsonl#")
    (notice,) = started.notices
    assert notice.startswith("Left out 2 chats (d.jsonl#")
    assert isinstance(finished, Finished)
    assert finished.heldout_bits_per_byte_after is not None


def test_a_held_out_side_without_an_answer_ends_no_run(tmp_path: Path, run: Any) -> None:
    hold_out_refused_chats(tmp_path / "notes", 9)  # too few to hold out another
    events = run(tmp_path / "notes")
    started, finished = events[0], events[-1]
    assert isinstance(started, Started)
    assert (started.documents, started.heldout_documents) == (9, 0)
    assert re.match("None of the [12] held-out documents holds an answer to score", started.notices[-1])
    assert isinstance(finished, Finished)
    assert finished.heldout_bits_per_byte_after is None
