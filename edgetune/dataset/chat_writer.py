"""Turns conversations into pieces of tokens, in the model's chat template or in Guanaco's form.

The assistant's turns and their ends are targets; everything else is context, unless the whole conversation is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

from edgetune.dataset.chat_notices import ANSWERS_LOST, LEFT_OUT, REASONING_LOST, SYSTEM_JOINED, ChatNotices
from edgetune.dataset.pieces import CONTEXT, STOP, TEXT, Piece, TextTokenizer, continuation, note_pieces
from edgetune.documents.chat_forms import REASONING_KEYS
from edgetune.documents.document import Document, Turn
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.tokenizer import EncodedChat

TrainOn = Literal["assistant", "all"]
ChatFormat = Literal["auto", "template", "guanaco"]


class Unwritable(Exception):
    """A chat that cannot be written in the chosen form. The message says why, and holds no text of the chat."""


_TOOL_KEYS = {"tool_calls"}
_ANSWERS_NOT_FOUND = "the model's chat template does not show where they begin and end"


class ChatWriter:
    """Turns conversations into pieces. `notices` receives those that were changed or left out, with the cause."""

    # Finding the ends of a turn renders everything before it again, so the cost grows with the square of the turns. A long
    # conversation is therefore rendered in parts that begin at a user's turn.
    PART_TURNS = 32
    """Most turns of a part; chosen by hand."""
    PART_CHARS = 1 << 15
    """Most characters of a part; chosen by hand."""

    def __init__(self, tokenizer: TextTokenizer, train_on: TrainOn, chat_format: ChatFormat, notices: ChatNotices) -> None:
        self.tokenizer = tokenizer
        self.train_all = train_on == "all"
        self.template = tokenizer.has_template if chat_format == "auto" else chat_format == "template"
        self.end = tuple(tokenizer.eos_ids[:1])
        self.notices = notices

    def pieces(self, document: Document) -> tuple[list[Piece], int]:
        """Return the tokens of one conversation, and the bytes of text behind those marked TEXT.

        These are the assistant's texts; in Guanaco's recipe they are the whole conversation. A conversation that cannot be
        written has no tokens, and `notices` tells its cause.
        """
        if self.template:
            self.tokenizer.check_template()
        try:
            if self.template:
                return self._template_pieces(document)
            return self._guanaco_pieces(document)
        except Unwritable as problem:
            self.notices.add(LEFT_OUT, str(problem), document.path)
            return [], 0

    def _guanaco_pieces(self, document: Document) -> tuple[list[Piece], int]:
        """Return `### Human: ... ### Assistant:` as context, and every answer and its end as targets."""
        turns = document.turns or ()
        if any(turn.role == "tool" or turn.extras.keys() & _TOOL_KEYS for turn in turns):
            raise Unwritable("they call tools, which only a model's chat template can write")
        if any(turn.extras.keys() & REASONING_KEYS for turn in turns):
            self.notices.add(REASONING_LOST, "only a model's chat template can write it", document.path)
        if self.train_all and all(turn.trained for turn in turns):
            return list(note_pieces(self.tokenizer, document.blocks())), document.size
        pieces: list[Piece] = [(self.tokenizer.start_ids, [CONTEXT] * len(self.tokenizer.start_ids))]
        prompt, scored = "", 0
        for turn in turns:
            if turn.role != "assistant":
                prompt += f"### Human: {turn.text} " if turn.role == "user" else f"{turn.text} "
                continue
            prompt += "### Assistant:"
            answer = f" {turn.text}"
            seen = self.tokenizer.encode(prompt)
            ids = continuation(self.tokenizer, prompt, answer)
            as_prompt, as_answer = (TEXT if self.train_all else CONTEXT), (TEXT if turn.trained else CONTEXT)
            pieces.append((seen, [as_prompt] * len(seen)))
            pieces.append(([*ids, *self.end], [as_answer] * len(ids) + [STOP if turn.trained else CONTEXT] * len(self.end)))
            scored += (len(prompt.encode()) if self.train_all else 0) + (len(answer.encode()) if turn.trained else 0)
            prompt = ""
        return (pieces, scored) if any(TEXT in marks for _, marks in pieces) else ([], 0)

    def _template_pieces(self, document: Document) -> tuple[list[Piece], int]:
        """Return the conversation as the model's template renders it, with the answers and their ends as targets."""
        pieces: list[Piece] = []
        scored = lost = 0
        for part in split_turns(document.turns or (), self.PART_TURNS, self.PART_CHARS):
            part, chat = self._encode(document, part)
            marks = [STOP if self.train_all else CONTEXT] * len(chat.ids)
            for number, turn in enumerate(part):
                answer = chat.answers.get(number)
                if turn.role != "assistant" or not turn.trained:
                    continue
                if answer is None:
                    lost += 1
                    continue
                marks[answer.start : answer.end] = [TEXT] * (answer.end - answer.start)
                for control in answer.controls:
                    marks[control] = STOP
                if answer.has_stop:
                    marks[answer.end] = STOP
                scored += answer.bytes
            pieces.append(self._complete(list(chat.ids), marks))
        if lost and not scored:
            raise Unwritable(_ANSWERS_NOT_FOUND)
        if lost:
            self.notices.add(ANSWERS_LOST, _ANSWERS_NOT_FOUND, document.path)
        return pieces, scored

    def _encode(self, document: Document, part: list[Turn]) -> tuple[list[Turn], EncodedChat]:
        """Render and encode a part. Raises Unwritable if the template refuses it, or leaves out what it says to tools."""
        try:
            chat = self._encode_answers(part, document)
        except TokenizerError as error:
            part, chat = self._encode_joined(document, part, str(error))
        tools = [number for number, turn in enumerate(part) if turn.role == "tool" and turn.text.strip()]
        if not chat.shown.issuperset(tools) or self._ignores(part, document, chat, _TOOL_KEYS):
            raise Unwritable("they call tools, which the model's chat template does not write")
        if self._ignores(part, document, chat, REASONING_KEYS):
            self.notices.add(REASONING_LOST, "the model's chat template does not write it", document.path)
        return part, chat

    def _encode_joined(self, document: Document, part: list[Turn], refusal: str) -> tuple[list[Turn], EncodedChat]:
        """Encode a part that the template refused as it is, with the system's turns joined to the user's."""
        joined = join_system(part)
        try:
            if joined != part:
                chat = self._encode_answers(joined, document)
                self.notices.add(SYSTEM_JOINED, "the model's chat template refuses a system's turn there", document.path)
                return joined, chat
        except TokenizerError:
            pass
        raise Unwritable(f"{refusal[:1].lower()}{refusal[1:].removesuffix('.')}")

    def _encode_answers(self, part: Sequence[Turn], document: Document) -> EncodedChat:
        return self.tokenizer.encode_answers([turn.message() for turn in part], document.tools)

    def _ignores(self, part: Sequence[Turn], document: Document, chat: EncodedChat, keys: AbstractSet[str]) -> bool:
        """Return True if the part has some of `keys` and the template renders it as if it had none."""
        if not any(turn.extras.keys() & keys for turn in part):
            return False
        bare = [{key: value for key, value in turn.message().items() if key not in keys} for turn in part]
        try:
            return self.tokenizer.encode_chat(bare, False, document.tools) == chat.ids
        except TokenizerError:
            return False

    def _complete(self, ids: list[int], marks: list[int]) -> Piece:
        """Complete a rendered conversation: a start id, an end id to learn, and nothing after the last answer."""
        while marks and marks[-1] == CONTEXT:  # tokens after the last answer teach nothing
            del ids[-1], marks[-1]
        if not ids:
            return [], []
        if ids[-1] not in self.tokenizer.eos_ids and not self.train_all:
            ids, marks = [*ids, *self.end], marks + [STOP] * len(self.end)
        started = self.tokenizer.start.before_chat(ids)
        ids, marks = started, [CONTEXT] * (len(started) - len(ids)) + marks
        marks[0] = CONTEXT
        return ids, marks


def join_system(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with each system's turn put in front of the user's turn that follows it, as LLaMA 2 has it.

    Without one, it joins the user's turn before it; at the end, after the last answer, it is dropped.
    """
    joined: list[Turn] = []
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "system":
            waiting.append(turn.text)
        elif turn.role == "user" and waiting:
            joined.append(Turn("user", "\n\n".join([*waiting, turn.text]), turn.trained, turn.extras))
            waiting = []
        else:
            if waiting and joined and joined[-1].role == "user":
                joined[-1] = Turn("user", "\n\n".join([joined[-1].text, *waiting]), joined[-1].trained, joined[-1].extras)
                waiting = []
            joined.append(turn)
    return joined


def split_turns(turns: Sequence[Turn], most_turns: int, most_chars: int) -> Iterator[list[Turn]]:
    """Split `turns` into parts that begin at a user's turn; each part repeats the system's turn that opened the chat."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    part: list[Turn] = []
    chars = 0
    for at, turn in enumerate(turns[len(system) :], len(system)):
        pair = turn.text + (turns[at + 1].text if at + 1 < len(turns) else "")
        if part and turn.role == "user" and (len(part) + 2 > most_turns or chars + len(pair) > most_chars):
            yield system + part
            part, chars = [], 0
        part.append(turn)
        chars += len(turn.text)
    if part:
        yield system + part
