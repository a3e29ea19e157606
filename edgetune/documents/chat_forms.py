"""Knows the forms in which data sets write a chat, and turns a record of any of them into a Document with turns.

    {"messages": [{"role": "user", "content": "How deep?"}, ...]}          OpenAI's and Hugging Face's
    {"conversations": [{"from": "human", "value": "How deep?"}, ...]}      ShareGPT
    {"instruction": "How deep?", "input": "", "output": "Two inches."}     Alpaca
    {"prompt": "How deep?", "completion": "Two inches."}                   prompt and completion, each a text or messages
    {"text": "### Human: How deep? ### Assistant: Two inches."}            Guanaco (QLoRA's OASST1)

A {"text": ...} without the markers of turns is a plain text. If a record also holds a conversation, the text is ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from edgetune.documents.document import Document, Turn
from edgetune.documents.encoding import unify_line_ends
from edgetune.documents.reasons import Reason

_CONVERSATION_KEYS = ("messages", "conversations", "conversation")
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_QUESTION_KEYS, _ANSWER_KEYS = ("instruction", "prompt", "question"), ("output", "completion", "response", "answer")
_MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
REASONING_KEYS = frozenset({"reasoning_content", "reasoning", "thinking"})
"""Keys under which a message has what the assistant thought before it answered."""
_TRAINED_KEYS = ("weight", "train", "training", "loss")
"""Keys with which a message says whether it is to be learnt: weight in OpenAI's form, the others in those of trainers."""
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "ipython": "tool",
}
_OLD_TOOL_ROLES = {"function", "function_call", "function_response", "observation", "tool_call", "tool_response"}
_MARKER = re.compile(r"### (Human|Assistant):")
_GUANACO_NAMES = {"user": "### Human: ", "assistant": "### Assistant: ", "system": "", "tool": "### Tool: "}
_ZERO = re.compile(r"-?0+(?:\.0*)?")
_KEY = re.compile(r"[A-Za-z_][\w.-]{0,23}")
_KEYS_SHOWN = 6
"""Most keys of a record that an account of it names. Chosen by hand."""


class Unread(Exception):
    """A record that cannot be read. `detail` names the keys found; neither holds any text of the record."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason.value)
        self.reason, self.detail = reason, detail


def read_record(record: Any, path: str) -> Document:
    """Return the document in one parsed record. Raises Unread if it is neither a text nor a chat that can be read."""
    if is_messages(record):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise Unread(Reason.NOT_A_CHAT, "no object with keys")
    given, record = record, {key.lower(): value for key, value in record.items()} | record
    turns = conversation(record)
    if turns is not None:
        tidied = tidy(turns)
        return Document.of(path, guanaco_text(tidied), tidied, tools_of(record))
    if isinstance(record.get("text"), str):
        return from_text(drop_invalid(record["text"]), path)
    raise Unread(Reason.NOT_A_CHAT, f"keys found: {named_keys(given)}")


def tools_of(record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the tools that a record describes: a list of objects, or the JSON text of one. Raises Unread for an older form."""
    if record.get("functions"):
        raise Unread(Reason.OLD_TOOLS)
    if not record.get("tools"):
        return ()
    tools = list_of(record["tools"])
    if tools is None or not all(isinstance(tool, dict) for tool in tools):
        raise Unread(Reason.OLD_TOOLS)
    return tuple(cleaned(tools))


def list_of(value: Any) -> list[Any] | None:
    """Return a value that is a list, or the JSON text of one, as tables have it; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def is_messages(value: Any) -> bool:
    """Return True for a list of messages, without the object that usually holds it."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and any(key in item for key in _ROLE_KEYS) for item in value)
    )


def conversation(record: dict[str, Any]) -> list[Turn] | None:
    """Return the turns of a record as they stand; None if it holds no conversation, whatever its form.

    Raises Unread for a conversation with a part that cannot be read: that would change what the answers answer.
    """
    messages = next((found for key in _CONVERSATION_KEYS if (found := list_of(record.get(key)))), None)
    question = next((record[key] for key in _QUESTION_KEYS if record.get(key) is not None), None)
    answer = next((record[key] for key in _ANSWER_KEYS if record.get(key) is not None), None)
    if messages is not None:
        turns = [read_message(message) for message in messages]
    elif question is not None and answer is not None:
        turns = [*earlier_turns(record.get("history")), *pair_turns(question, record.get("input"), answer)]
    else:
        return None
    if any(record.get(key) for key in _MEDIA_KEYS):
        raise Unread(Reason.NOT_TEXT)
    system = record.get("system")
    if isinstance(system, str) and system.strip() and all(turn.role != "system" for turn in turns[:1]):
        turns.insert(0, Turn("system", drop_invalid(system)))
    return turns


def pair_turns(question: Any, more: Any, answer: Any) -> list[Turn]:
    """Return the turns of a question and its answer; either may be a list of messages. Only the answer is trained."""
    turns = [Turn(turn.role, turn.text, turn.role != "assistant", turn.extras) for turn in side_turns(question, "user")]
    if isinstance(more, str) and more.strip() and turns:
        turns[-1] = Turn(turns[-1].role, f"{turns[-1].text}\n\n{drop_invalid(more)}")
    return [*turns, *side_turns(answer, "assistant")]


def side_turns(side: Any, role: str) -> list[Turn]:
    """Return the turns of one side of a pair: a text of `role`, or messages."""
    if is_messages(side):
        return [read_message(message) for message in side]
    if not isinstance(side, str):
        raise Unread(Reason.BAD_MESSAGE)
    return [Turn(role, drop_invalid(side))]


def earlier_turns(history: Any) -> list[Turn]:
    """Return the turns of an Alpaca record's history, which is a list of pairs of question and answer."""
    pairs = history if isinstance(history, list) else []
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise Unread(Reason.BAD_MESSAGE)
    return [Turn(role, drop_invalid(text)) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def read_message(message: Any) -> Turn:
    """Return the turn in a message. Raises Unread if it has no text, or parts that are not text."""
    if not isinstance(message, dict):
        raise Unread(Reason.BAD_MESSAGE)
    role = next((message[key] for key in _ROLE_KEYS if isinstance(message.get(key), str)), "").strip().lower()
    if message.get("function_call") or role in _OLD_TOOL_ROLES:
        raise Unread(Reason.OLD_TOOLS)
    if role not in _ROLES:
        raise Unread(Reason.UNKNOWN_ROLE)
    extras = {key: message[key] for key in sorted(REASONING_KEYS) if isinstance(message.get(key), str) and message[key].strip()}
    if _ROLES[role] == "assistant" and isinstance(message.get("tool_calls"), list) and message["tool_calls"]:
        extras["tool_calls"] = [with_arguments(call) for call in message["tool_calls"]]
    if _ROLES[role] == "tool":
        extras |= {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    content = next((message[key] for key in _TEXT_KEYS if message.get(key) is not None), None)
    if content is None and "tool_calls" in extras:
        content = ""
    text = text_of(content)
    trained = _ROLES[role] != "assistant" or not any(says_no(message.get(key)) for key in _TRAINED_KEYS)
    return Turn(_ROLES[role], text, trained, cleaned(extras))


def text_of(content: Any) -> str:
    """Return the text of a message's content, which is a string or a list of parts. Raises Unread for any other part."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if is_text_part(part) else part for part in parts]
    if any(isinstance(part, dict) for part in texts):
        raise Unread(Reason.NOT_TEXT)
    if not all(isinstance(text, str) for text in texts):
        raise Unread(Reason.BAD_MESSAGE)
    return drop_invalid("".join(texts))


def is_text_part(part: Any) -> bool:
    """Return True for a part of a message that is an object and holds text."""
    return isinstance(part, dict) and str(part.get("type", "text")) in ("text", "input_text", "output_text")


def with_arguments(call: Any) -> Any:
    """Return a tool call with its arguments as a mapping, which chat templates expect; OpenAI's form has them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def says_no(value: Any) -> bool:
    """Return True for false and any zero, also as text."""
    text = str(value).strip().lower()
    return text == "false" or bool(_ZERO.fullmatch(text))


def from_text(text: str, path: str) -> Document:
    """Return a chat in Guanaco's form if the text begins with a turn's marker, else a plain text.

    Raises Unread if the text is empty, or a chat without an answer.
    """
    if not text.strip():
        raise Unread(Reason.EMPTY)
    pieces = _MARKER.split(text)  # before, name, text, name, text, ...
    if len(pieces) == 1 or pieces[0].strip():
        return Document.of(path, text)
    names, texts = pieces[1::2], pieces[2::2]
    turns = tidy([Turn(_ROLES[name.lower()], after_marker(text)) for name, text in zip(names, texts, strict=True)])
    return Document.of(path, text, turns)


def after_marker(text: str) -> str:
    """Return a turn's text without the white space that belongs to Guanaco's form; the first line keeps its indentation."""
    text = text.rstrip()
    first = len(text) - len(text.lstrip())
    line = text.rfind("\n", 0, first) + 1
    return text[line:] if line else text.removeprefix(" ")


def tidy(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Return the conversation as chat templates expect it: alternating turns, the user's first.

    Empty turns and an assistant's greeting before any question are dropped; neighbouring turns of one role become one. Raises
    Unread if no answer is left, or none to train.
    """
    tidied: list[Turn] = []
    for turn in turns:
        if not (turn.text.strip() or turn.extras or turn.role == "tool"):
            continue
        if turn.role == "assistant" and not any(old.role == "user" for old in tidied):
            continue
        if tidied and is_continued(tidied[-1], turn):
            tidied[-1] = Turn(turn.role, f"{tidied[-1].text}\n\n{turn.text}", turn.trained)
        else:
            tidied.append(turn)
    answers = [turn for turn in tidied if turn.role == "assistant"]
    if not answers:
        raise Unread(Reason.NO_ANSWER)
    if not any(turn.trained for turn in answers):
        raise Unread(Reason.NOT_TRAINED)
    return tuple(tidied)


def is_continued(turn: Turn, following: Turn) -> bool:
    """Return True if two neighbouring turns can become one."""
    same = turn.role == following.role != "tool" and not turn.extras and not following.extras
    return same and (turn.role != "assistant" or turn.trained == following.trained)


def guanaco_text(turns: Sequence[Turn]) -> str:
    """Return a conversation in Guanaco's form, in which QLoRA was trained; tool calls follow their turn as JSON."""
    calls = (json.dumps(turn.extras["tool_calls"]) if "tool_calls" in turn.extras else "" for turn in turns)
    return " ".join(_GUANACO_NAMES[turn.role] + turn.text + call for turn, call in zip(turns, calls, strict=True))


def named_keys(record: dict[str, Any]) -> str:
    """Return the keys of a record for an account of it; one that may be a text itself is not shown."""
    keys = [key for key in record if _KEY.fullmatch(key)]
    more = ", ..." if len(keys) > _KEYS_SHOWN else ""
    return ", ".join(keys[:_KEYS_SHOWN]) + more if keys else "none that is a name"


def cleaned(value: Any) -> Any:
    """Return a JSON value with `drop_invalid` applied to every text in it."""
    if isinstance(value, dict):
        return {drop_invalid(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return drop_invalid(value) if isinstance(value, str) else value


def drop_invalid(text: str) -> str:
    """Return `text` without what JSON can spell but no text holds: NUL, halves of surrogate pairs; unify its line ends."""
    return unify_line_ends(re.sub("[\ud800-\udfff]", "\ufffd", text.replace("\0", "")))
