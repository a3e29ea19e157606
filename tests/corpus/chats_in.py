"""Chats: every usual form of a line, lines that are refused and said, and what of an answer is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus.case import CASES, Case, Place, of_kind, plain_model
from edgetune.dataset.pieces import TEXT
from edgetune.dataset.token_store import tokenize
from edgetune.documents.reading import read_notes
from edgetune.runtime.tokenizer import Tokenizer

KIND = "chats"
case = of_kind(KIND)
ASKED, ANSWERED = "How deep do I plant garlic?", "Two inches, four in sand."
TURNS = [("user", ASKED), ("assistant", ANSWERED)]
MESSAGES = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
FROM = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]


def line(record: Any) -> str:
    """Return a record as one line of JSON."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def trained(place: Place, notes: Path, model: Path | None = None) -> list[str]:
    """Return the stretches of text of every document that are trained and scored."""
    tokenizer = Tokenizer.load(model or plain_model())
    store = tokenize(read_notes([notes]).documents, tokenizer, place.folder / "tokens")
    stretches: list[list[int]] = []
    before = False
    for id, role in zip(store.ids.tolist(), store.trained.tolist(), strict=True):
        if role == TEXT:
            stretches = stretches if before else [*stretches, []]
            stretches[-1].append(id)
        before = role == TEXT
    return [tokenizer.decode(ids, continuing=True) for ids in stretches]


# Name, the file, and the turns that are read of it.
READ: tuple[tuple[str, str | bytes, list[tuple[str, str]]], ...] = (
    ("messages of OpenAI", line({"messages": MESSAGES}), TURNS),
    ("conversations of ShareGPT", line({"conversations": FROM}), TURNS),
    ("role and content under conversations", line({"conversations": MESSAGES}), TURNS),
    ("from and value under messages", line({"messages": FROM}), TURNS),
    ("roles in capitals", line({"conversations": [{**FROM[0], "from": "Human"}, {**FROM[1], "from": "GPT"}]}), TURNS),
    (
        "a developer instead of a system",
        line({"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]}),
        [("system", "Be brief."), *TURNS],
    ),
    ("Alpaca", line({"instruction": ASKED, "input": "", "output": ANSWERED}), TURNS),
    ("Alpaca with an input", line({"instruction": "How deep?", "input": "garlic", "output": ANSWERED}), [("user",
        "How deep?\n\ngarlic"), TURNS[1]]),
    ("Guanaco", line({"text": f"### Human: {ASKED}### Assistant: {ANSWERED}"}), TURNS),
    ("text beside conversations", line({"text": f"<|im_start|>user\n{ASKED}", "conversations": FROM}), TURNS),
    ("content in parts", line({"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, MESSAGES[1]]}),
        TURNS),
    ("a byte order mark", b"\xef\xbb\xbf" + line({"messages": MESSAGES}).encode(), TURNS),
    ("UTF-16, as PowerShell's > writes", line({"messages": MESSAGES}).encode("utf-16"), TURNS),
    ("line ends of Windows", line({"messages": MESSAGES}).replace("\n", "\r\n"), TURNS),
    ("no newline at the end", line({"messages": MESSAGES}).rstrip(), TURNS),
    ("empty lines between", "\n\n" + line({"messages": MESSAGES}) + "\n\n", TURNS),
    (
        "code that begins with spaces",
        line({"messages": [MESSAGES[0], {"role": "assistant", "content": "    a = 1\n    b = 2"}]}),
        [TURNS[0], ("assistant", "    a = 1\n    b = 2")],
    ),
)  # fmt: skip

# Name, the bad line, and what is said of it. A good line before it is read in any case.
TOLD: tuple[tuple[str, str | bytes, tuple[str, ...]], ...] = (
    ("a line cut in half", line({"messages": MESSAGES})[:50], ("JSON",)),
    ("a comment", "// exported on Monday\n", ("JSON",)),
    ("NaN", '{"messages": [], "score": NaN}\n', ()),
    ("a hundred thousand brackets", "[" * 100_000 + "\n", ("JSON|nested",)),
    ("a line of 5 MB", line({"messages": [{"role": "user", "content": "x" * (5 << 20)}, MESSAGES[1]]}), ("MiB",)),
    ("a number", "42\n", ()),
    ("null", "null\n", ()),
    ("keys of no known form", line({"foo": ASKED, "bar": ANSWERED}), ("foo|messages",)),
    ("pairs of a preference", line({"prompt": ASKED, "chosen": ANSWERED, "rejected": "No."}), ()),
    ("a conversation that is text", line({"conversations": f"{ASKED} {ANSWERED}"}), ()),
    ("a conversation of no turns", line({"messages": []}), ()),
    ("turns that are text", line({"messages": [ASKED, ANSWERED]}), ()),
    ("a role that nobody plays", line({"messages": [{"role": "narrator", "content": "Once."}, *MESSAGES]}), ()),
    ("a picture in a message", line({"messages": [{"role": "user", "content": [{"type": "image_url",
        "image_url": {"url": "x"}}]}, MESSAGES[1]]}), ()),
    ("a question without an answer", line({"messages": MESSAGES[:1]}), ()),
    ("an answer of no text", line({"messages": [MESSAGES[0], {"role": "assistant", "content": ""}]}), ()),
    ("a content that is a number", line({"messages": [MESSAGES[0], {"role": "assistant", "content": 5}]}), ()),
)  # fmt: skip


def turns_of(place: Place, content: str | bytes) -> list[tuple[str, str]]:
    """Return the turns of the only document in a file of chats."""
    (document,) = read_notes([place.write("chats/c.jsonl", content)]).documents
    place.answers.append("taken")
    assert document.turns is not None
    return [(turn.role, turn.text) for turn in document.turns]


def _read(content: str | bytes, turns: list[tuple[str, str]]) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        assert turns_of(place, content) == turns

    return check


def _told(content: str | bytes, words: tuple[str, ...]) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        whole = line({"messages": MESSAGES}).encode() + (content if isinstance(content, bytes) else content.encode())
        notes = place.write("chats/c.jsonl", whole).parent
        assert len(read_notes([notes]).documents) == 1
        place.run("train", "--dry-run", notes).taken(r"Skipped: 1", *words)

    return check


CASES.extend(Case(KIND, name, _read(content, turns)) for name, content, turns in READ)
CASES.extend(Case(KIND, f"told: {name}", _told(content, words)) for name, content, words in TOLD)


@case("an array of chats in a .json named on the command line")
def _(place: Place) -> None:
    documents = read_notes(
        [place.write("sharegpt.json", json.dumps([{"conversations": FROM}] * 2 + [{"messages": MESSAGES[:1]}]))]
    )
    place.answers.append("taken")
    assert [turn.text for turn in documents.documents[0].turns or ()] == [ASKED, ANSWERED]


@case("a record written over several lines")
def _(place: Place) -> None:
    notes = place.write("chats/c.jsonl", json.dumps({"messages": MESSAGES}, indent=2))
    found = place.run("train", "--dry-run", "--json", place.notes(), notes).taken().json
    assert found["chats"] == 1 or [skip["path"] for skip in found["skipped_paths"]] == ["chats/c.jsonl"]


@case("the same chat twice")
def _(place: Place) -> None:
    assert turns_of(place, line({"messages": MESSAGES}) * 2) == TURNS


@case("half of a surrogate pair in an answer")
def _(place: Place) -> None:
    notes = place.write(
        "chats/c.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\\ud83d"}]}\n'
    )
    place.trained(place.notes(), str(notes)).taken()


@case("a conversation of 1,200 turns")
def _(place: Place) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n}"} for n in range(1200)]
    (document,) = read_notes([place.write("chats/c.jsonl", line({"messages": turns}))]).documents
    place.answers.append("taken")
    assert len(document.turns or ()) == 1200


@case("an answer of weight 0")
def _(place: Place) -> None:
    messages = [MESSAGES[0], {**MESSAGES[1], "content": "Two miles.", "weight": 0}, MESSAGES[0], MESSAGES[1]]
    stretches = trained(place, place.write("chats/c.jsonl", line({"messages": messages})).parent)
    place.answers.append("taken")
    assert [stretch.strip() for stretch in stretches] == [ANSWERED]


@case("an answer of train: false")
def _(place: Place) -> None:
    messages = [MESSAGES[0], {**MESSAGES[1], "content": "Two miles.", "train": False}, MESSAGES[0], MESSAGES[1]]
    stretches = trained(place, place.write("chats/c.jsonl", line({"messages": messages})).parent)
    place.answers.append("taken")
    assert [stretch.strip() for stretch in stretches] == [ANSWERED]


def with_template(place: Place, source: str) -> Path:
    """Write the tiny LLaMA with a chat template."""
    model = place.model()
    (model / "chat_template.jinja").write_text(source)
    return model


LAST_ANSWER_THINKS = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '(thinks)' }}{% endif %}{{ m.content + '|' }}{% endfor %}"
)


@case("a template that renders the last answer otherwise, as Qwen3's")
def _(place: Place) -> None:
    chat = [{"role": role, "content": f"{role} says {n}"} for n in range(3) for role in ("user", "assistant")]
    notes = place.write("chats/c.jsonl", line({"messages": chat})).parent
    text = " ".join(trained(place, notes, with_template(place, LAST_ANSWER_THINKS)))
    place.answers.append("taken")
    assert all(f"assistant says {n}" in text for n in range(3))
    assert "user says" not in text


@case("a conversation that ends with a question")
def _(place: Place) -> None:
    notes = place.write("chats/c.jsonl", line({"messages": [*MESSAGES, {"role": "user", "content": "And leeks?"}]})).parent
    text = " ".join(trained(place, notes, with_template(place, LAST_ANSWER_THINKS)))
    place.answers.append("taken")
    assert ANSWERED in text
    assert "leeks" not in text


@case("reasoning that the template writes")
def _(place: Place) -> None:
    chat = [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "Garlic is small."}]
    model = with_template(
        place,
        "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}{% endfor %}",
    )
    text = " ".join(trained(place, place.write("chats/c.jsonl", line({"messages": chat})).parent, model))
    place.answers.append("taken")
    assert "Garlic is small." in text
    assert ANSWERED in text


@case("one chat that the template refuses")
def _(place: Place) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    model = with_template(place, refuses + "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    system = {"role": "system", "content": "Be brief."}
    notes = place.notes()
    place.write("notes/c.jsonl", line({"messages": [system, *MESSAGES]}) + line({"messages": MESSAGES}))
    place.trained(notes, model=model).taken()


@case("a message that spells control tokens")
def _(place: Place) -> None:
    messages = [MESSAGES[0], {"role": "assistant", "content": "Type </s> to end <s> and begin."}]
    notes = place.write("chats/c.jsonl", line({"messages": messages})).parent
    tokenizer = Tokenizer.load(plain_model())
    store = tokenize(read_notes([notes]).documents, tokenizer, place.folder / "tokens")
    place.answers.append("taken")
    assert store.ids.tolist().count(2) == 1


@case("chats of which the held-out side has no answer")
def _(place: Place) -> None:
    notes = place.notes(11)
    place.write("notes/c.jsonl", line({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]}))
    place.trained(notes).taken()


@case("an empty file of chats")
def _(place: Place) -> None:
    place.run("train", place.write("chats/c.jsonl", "")).refused("empty")
