"""Turn text into token ids and back, for any supported model folder.

`encode` never makes a control token of a text that merely spells one (`</s>`, `<|eot_id|>`): control ids come from a
chat template or from the caller. `decode` is defined byte by byte, so that streaming gives the same text in parts.
The ids are those of transformers 5 for the same text. tokenizer.json is used if it exists, otherwise tokenizer.model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.runtime.answer_spans import RenderedChat, common_prefix
from edgetune.runtime.control_marks import Marker, new_nonce
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.json_file import read_object_if_there
from edgetune.runtime.json_tokenizer import JsonTokenizer
from edgetune.runtime.sentencepiece_tokenizer import SentencePieceTokenizer
from edgetune.runtime.special_tokens import SpecialTokens
from edgetune.runtime.start_tokens import TEXT_ENDS, start_tokens
from edgetune.runtime.token_bytes import StreamDecoder
from edgetune.runtime.tokenizer_libraries import TokenFinder, TokenizerLibrary
from edgetune.runtime.untrusted_file import TOKENIZER_CONFIG, read_untrusted

if TYPE_CHECKING:
    from edgetune.runtime.templates import ChatTemplate

STRETCH, LONGEST_STRETCH = 1 << 14, 1 << 15
"""The characters after which a text is cut between two words, and the most that a library encodes at once: hostile regular
expressions take time that grows with the square, 5 s at 32,768 characters. Chosen by hand."""
_BLANK = re.compile(r"\s{2048}")
"""White space after which a text is cut, for the same reason. No piece of a vocabulary is as long."""
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")
"""Tokens with which a chat model ends its turn, even if its configuration names another end-of-text token."""
_NAMES = {"bos_token": "a beginning-of-text", "eos_token": "an end-of-text"}
"""The named tokens that a model cannot do without, as error messages call them."""


class Tokenizer:
    """The tokenizer of one model folder, in the layout of Hugging Face; open it with `Tokenizer.load`.

    vocab_size: one more than the highest id. bos_id, pad_id: the ids of those tokens, or None.
    eos_ids: every id that ends generation, starting with the one that ends a document.
    start: the ids that texts and chats begin with.
    """

    def __init__(
        self, library: TokenizerLibrary, special: SpecialTokens, template: tuple[str, str] | None, folder: str
    ) -> None:
        self._library, self._special, self._template_source, self._folder = library, special, template, folder
        self.vocab_size = library.size
        self._check_rows()
        control = [token for token in library.added if token.special and token.spelling and self._has_row(token.id)]
        self.bos_id = self._id_of_name("bos_token", next(iter(library.leading), special.bos))
        self.pad_id = self._id_of_name("pad_token", special.pad)
        text_ends = [token.id for end in TEXT_ENDS for token in control if token.spelling == end]
        self.eos_ids = self._end_ids(text_ends)
        # Qwen's tokenizer has no bos, but its config.json names the token that stood between texts in training.
        turn_ends = {library.id_of(end) for end in TURN_ENDS}
        others = [special.bos, *sorted(self.eos_ids, key=turn_ends.__contains__)]
        text_ends += [id for id in others if id is not None and self._has_row(id)]
        self.start = start_tokens(special.config, self.bos_id, library.leading, library.starts_as_llama, text_ends)

        self._control_spellings = [token.spelling for token in control]
        self._control = frozenset(token.id for token in control)
        # Ordinary text may become the unknown token, unless the model uses that token to control something as well.
        used_for_control = {self.bos_id, self.pad_id, *self.eos_ids}
        self._forbidden_in_text = self._control - ({self._id_of_name("unk_token", None)} - used_for_control)
        # The longest spelling comes first, so that a token whose spelling begins another's does not hide it.
        control.sort(key=lambda token: -len(token.spelling))
        self._finder = TokenFinder(control)
        self._spelled = re.compile("|".join(re.escape(token.spelling) for token in control) or "(?!)")
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Open the tokenizer of a model folder. Raises TokenizerError for a missing, damaged or unsupported tokenizer."""
        folder = Path(folder)
        config = read_object_if_there(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        template = read_template(folder, config)
        special = SpecialTokens.read(folder, config, template[0] if template else "")
        library: TokenizerLibrary
        if (folder / "tokenizer.json").is_file():
            library = JsonTokenizer(folder / "tokenizer.json", special)
        elif (folder / "tokenizer.model").is_file():
            library = SentencePieceTokenizer(folder / "tokenizer.model", special)
        else:
            raise TokenizerError(
                f"{folder} has neither tokenizer.json nor tokenizer.model; copy one of them from the model's publisher."
            )
        return cls(library, special, template, str(folder))

    @property
    def start_ids(self) -> list[int]:
        """Return the ids that a note or a prompt begins with, at most one."""
        return list(self.start.text)

    def prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a text to continue, which begins as a note does in training."""
        return self.start.before_text(self.encode(text))

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of a conversation to answer, which begins as a chat does in training.

        Raises TokenizerError as `render_chat` does.
        """
        return self.start.before_chat(self.encode_chat(messages, add_generation_prompt=True))

    @property
    def start_text(self) -> str:
        """Return the spelling of what a note or a prompt begins with."""
        spelling = {token.id: token.spelling for token in self._library.added}
        return "".join(spelling.get(id, "") for id in self.start.text)

    @property
    def leading(self) -> tuple[int, ...]:
        """Return the ids that the post-processor in tokenizer.json puts before a text, which `start` may overrule."""
        return self._library.leading

    @property
    def rebuilt_as_llama(self) -> bool:
        """Return True if transformers ignores part of tokenizer.json for this model and builds LLaMA's tokenizer itself."""
        return self._special.rebuilt_as_llama and self._library.starts_as_llama

    def _has_row(self, id: int) -> bool:
        """Return True for an id of the vocabulary that has a row in the model's embedding."""
        rows = self._special.rows
        return 0 <= id < self._library.size and (rows is None or id < rows)

    def _check_rows(self) -> None:
        """Raise TokenizerError if a text or the chat template can give an id for which the embedding has no row.

        A control token that neither can give, such as the pad token that many LLaMA models have beyond their rows, is left out.
        """
        rows, library = self._special.rows, self._library
        if rows is None or library.size <= rows:
            return
        added = {token.id: token for token in library.added}
        for id in range(rows, library.size):
            token = added.get(id)
            if library.is_used(id) if token is None else not token.special or token.spelling in self._special.template:
                raise TokenizerError(
                    f"The tokenizer in {self._folder} gives the id {id} to a token, but the model's embedding has only {rows} "
                    "rows; take the tokenizer and the weights from the same model."
                )

    def _end_ids(self, text_ends: Sequence[int]) -> tuple[int, ...]:
        """Return every id that ends generation: the named end, those of the configuration files, the turn ends of the template.

        `text_ends` are used where nothing names an end. A bos that config.json numbers as an end does not end a text.
        """
        special, library = self._special, self._library
        named = self._id_of_name("eos_token", None)
        found = [named, *special.eos, *(library.id_of(end) for end in TURN_ENDS if end in special.template)]
        ends = [id for id in found if id is not None and self._has_row(id) and (id == named or id != self.bos_id)]
        return tuple(dict.fromkeys(ends or [*text_ends[:1], *(id for id in special.eos if self._has_row(id))]))

    def _id_of_name(self, name: str, fallback: int | None) -> int | None:
        """Return the id of the token that the configuration files call `name`, or `fallback` if no file mentions it.

        Raises TokenizerError if the vocabulary lacks a beginning- or end-of-text token that they name, or the embedding has no
        row for it; other names may lack an id.
        """
        spelling = self._special.spelled.get(name)
        id = fallback if spelling is None and name not in self._special.spelled else None
        if spelling is not None:
            id = self._library.id_of(spelling)
            if name in _NAMES and (id is None or not self._has_row(id)):
                raise TokenizerError(
                    f"{self._folder} names {_NAMES[name]} token that is missing from its vocabulary; "
                    "take tokenizer_config.json and the tokenizer from the same model."
                )
        return id if id is not None and self._has_row(id) else None

    # --- text -> ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. No token is added, and no control token is made whatever the text spells."""
        return self._encode(text, first=True)

    def _encode(self, text: str, first: bool) -> list[int]:
        """Return the ids of `text`; `first` says that nothing stands before it, which decides about a leading space."""
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, from a broken JSON file or file name
            text = text.encode("utf-8", "replace").decode()
        ids = self._encode_parts(_stretches(text), first)
        if self._forbidden_in_text.isdisjoint(ids):
            return ids
        # A vocabulary may have the spelling of a control token as an ordinary piece with the same id. Cut each such
        # spelling after its first character and encode the parts by themselves, so that no piece can hold all of it.
        cuts = [match.start() + 1 for match in self._spelled.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = self._encode_parts((stretch for part in parts for stretch in _stretches(part)), first)
        if not self._forbidden_in_text.isdisjoint(ids):
            raise TokenizerError(
                f"The tokenizer in {self._folder} turns ordinary text into control tokens; take it from its publisher."
            )
        return ids

    def _encode_parts(self, parts: Iterable[str], first: bool) -> list[int]:
        """Return the ids of parts of one text, each encoded by itself."""
        return [id for n, part in enumerate(parts) for id in self._library.encode(part, first and n == 0, inside=n > 0)]

    # --- ids -> text --------------------------------------------------------------------------------------------------

    def _bytes_of(self, id: int) -> bytes:
        """Return the bytes of an id, b"" for a control token or an id outside the vocabulary, and remember them."""
        data = self._bytes.get(id)
        if data is None:
            is_text = 0 <= id < self._library.size and id not in self._control
            data = self._bytes[id] = self._library.bytes_of(id) if is_text else b""
        return data

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        """Return the text of `ids`. Control tokens and ids outside the vocabulary give ""; broken UTF-8 gives U+FFFD.

        `continuing`: the ids follow others, so the space before their first word is part of the text and is kept.
        """
        text = b"".join(self._bytes_of(int(id)) for id in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._library.strips_space and not continuing else text

    def stream_decoder(self, continuing: bool = False) -> StreamDecoder:
        """Return a decoder for one id at a time; the texts that it returns, joined, equal `decode` of all the ids."""
        return StreamDecoder(self._bytes_of, self._library.strips_space and not continuing)

    # --- chats --------------------------------------------------------------------------------------------------------

    @property
    def has_template(self) -> bool:
        """Return True if the model folder has a chat template."""
        return self._template_source is not None

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        """Return the compiled chat template. Raises TokenizerError if the model has none."""
        from edgetune.runtime.templates import ChatTemplate  # jinja2 is slow to import, and most commands need none

        if self._template_source is None:
            raise TokenizerError(
                f"{self._folder} has no chat template; use an instruction-tuned model, or `edgetune generate`."
            )
        source, where = self._template_source
        return ChatTemplate(source, where, {name: token for name, token in self._special.spelled.items() if token is not None})

    def check_template(self) -> None:
        """Raise TokenizerError if the model has no chat template, or one that cannot be compiled."""
        _ = self._template

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, tools: Sequence[Any] = ()
    ) -> str:
        """Return a conversation as the model's chat template writes it; messages are {"role": ..., "content": ...}.

        Raises TokenizerError if the model has no template or the template fails.
        """
        return self._template.render(messages, add_generation_prompt, tools)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, tools: Sequence[Any] = ()
    ) -> list[int]:
        """Return the ids of a conversation: control tokens of the template as such, those that a message spells as text.

        No token is added: if the template writes no beginning-of-text token, the ids begin without one.
        Raises TokenizerError as `render_chat` does.
        """
        nonce = new_nonce()
        text = self.render_chat(self._marked(messages, nonce), add_generation_prompt, self._marked(tools, nonce))
        return self._encode_rendered(text, nonce)[0]

    def encode_answers(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> EncodedChat:
        """Return the ids of a conversation as `encode_chat` gives them, and where the assistant's turns stand in them.

        Raises TokenizerError as `render_chat` does.
        """
        nonce = new_nonce()
        render = functools.partial(self.render_chat, tools=self._marked(tools, nonce))
        chat = RenderedChat(render, self._marked(messages, nonce), self._ends_of)
        spans = {n: chat.answer(n) for n, message in enumerate(messages) if message.get("role") == "assistant"}
        cuts = {place for span in spans.values() if span is not None for place in (span.start, span.end)}
        ids, tokens_before = self._encode_rendered(chat.text, nonce, cuts)
        answers = {}
        for n, span in spans.items():
            if span is not None:
                start, end = tokens_before[span.start], tokens_before[span.end]
                controls = tuple(place for place in range(start, end) if ids[place] in self._control)
                parts = self._finder.split(chat.text[span.start : span.end])
                text = "".join(part for part in parts if isinstance(part, str)).replace(nonce, "")
                answers[n] = EncodedAnswer(start, end, span.stop is not None, controls, len(text.encode("utf-8", "replace")))
        return EncodedChat(ids, answers, frozenset(n for n in range(len(messages)) if chat.shows(n)))

    def _marked(self, messages: Sequence[Mapping[str, Any]], nonce: str) -> list[Any]:
        """Return the messages with every control token that they spell broken by `nonce`.

        Once rendered, the template's control tokens and those that a message merely spells would look alike.
        """
        return [Marker(self._spelled, self._control_spellings, nonce).mark(message) for message in messages]

    def _ends_of(self, text: str) -> list[int]:
        """Return the positions in a rendered conversation of the tokens that end generation."""
        return [start for start, _, id in self._finder.find(text) if id in self.eos_ids]

    def _encode_rendered(self, text: str, nonce: str, cuts: Iterable[int] = ()) -> tuple[list[int], dict[int, int]]:
        """Return the ids of a rendered conversation, and for each position in `cuts` the number of tokens before it."""
        ids: list[int] = []
        before: dict[int, int] = {}
        waiting = sorted(cuts, reverse=True)
        at = 0
        for start, end, control in [*self._finder.find(text), (len(text), len(text), None)]:
            between = self._text_between(text[at:start], nonce, first=at == 0)
            while waiting and waiting[-1] < start:
                cut = waiting.pop()
                seen = self._text_between(text[at:cut], nonce, first=at == 0)
                before[cut] = len(ids) + common_prefix(seen, between)
            ids += between
            while waiting and (waiting[-1] < end or waiting[-1] == start):
                before[waiting.pop()] = len(ids)
            ids += [] if control is None else [control]
            at = end
        return ids, before

    def _text_between(self, text: str, nonce: str, first: bool) -> list[int]:
        """Return the ids of rendered text that holds no control token of the template."""
        text = text.replace(nonce, "")
        return self._encode(text, first) if text else []


@dataclass(frozen=True)
class EncodedAnswer:
    """An assistant's turn among the ids of a conversation: tokens `start` to `end`, then its end token if `has_stop`.

    `controls` are the positions of control tokens that the template writes within it. `bytes` is the size in UTF-8 of the text
    behind the other tokens.
    """

    start: int
    end: int
    has_stop: bool
    controls: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class EncodedChat:
    """The ids of a conversation; its assistant's turns by the number of the message, where they can be told; and the numbers
    of all messages whose text stands in the rendered conversation."""

    ids: list[int]
    answers: dict[int, EncodedAnswer]
    shown: frozenset[int]


def _stretches(text: str) -> Iterator[str]:
    """Yield a very long text in parts of about STRETCH characters.

    The cut is before a space between two letters, where every tokenizer cuts too, so the ids stay the same. A text without such
    a place is cut inside white space, or after LONGEST_STRETCH characters.
    """
    start = 0
    while start < len(text):
        end = min(len(text), start + LONGEST_STRETCH)
        words = _BETWEEN_WORDS.search(text, start + STRETCH, end)
        end = end if words is None else words.start()
        blank = _BLANK.search(text, start, end)
        end = end if blank is None else blank.end()
        yield text[start:end]
        start = end


def has_tokenizer(folder: Path) -> bool:
    """Return True if a model folder has a tokenizer's file."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def read_template(folder: Path, config: dict[str, Any] | None = None) -> tuple[str, str] | None:
    """Return (source, file) of a model folder's chat template, or None; chat_template.jinja wins, as in transformers.

    `config` is the content of tokenizer_config.json, which is read if it is not given. Raises TokenizerError for a file
    that cannot be read or is too large.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_untrusted(path, TOKENIZER_CONFIG).decode("utf-8", "replace"), str(path)
    config = read_object_if_there(folder / "tokenizer_config.json", TOKENIZER_CONFIG) if config is None else config
    found = config.get("chat_template")
    if isinstance(found, list):  # several templates with names: take the one called "default", or the only one
        named = {str(item.get("name")): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    return (found, str(folder / "tokenizer_config.json")) if isinstance(found, str) and found else None
