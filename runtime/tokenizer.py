"""Text to token ids and back: `tokenizers` and `sentencepiece` behind one small face.

`encode` never makes a control token out of what a text merely spells (`</s>`, `<|eot_id|>`): control ids come from a
chat template or from the caller. `decode` is defined byte by byte, so that streaming is the same thing done piecewise.
Ids are transformers' (version 5) on the same text; where `tokenizer.json` exists it is used, else `tokenizer.model`.
"""

from __future__ import annotations

import codecs
import functools
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.json_file import TOKENIZER_CONFIG, read_limited, read_object_if_there
from edgetune.runtime.pieces import (
    JsonPieces,
    Pieces,
    SentencePieces,
    SpecialNames,
)

if TYPE_CHECKING:
    from edgetune.runtime.templates import ChatTemplate

STRETCH = 1 << 20  # characters given to a library at once
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
# A chat model ends its turn with one of these, whatever its config calls the end of a text.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")


class Tokenizer:
    """The face. `folder` is a model folder as Hugging Face lays it out; see `load`.

    vocab_size: one more than the highest id. bos_id, pad_id: or None. eos_ids: every id that stops generation, the
    one that ends a document first. start_ids: what a document begins with.
    """

    def __init__(self, pieces: Pieces, names: SpecialNames, template: tuple[str, str] | None, folder: str) -> None:
        self._pieces, self._names, self._template_source, self._folder = pieces, names, template, folder
        self.vocab_size = pieces.size
        self.bos_id = self._named("bos_token", names.bos)
        self.pad_id = self._named("pad_token", names.pad)
        eos = [self._named("eos_token", None), *names.eos]
        eos += [pieces.id_of(end) for end in TURN_ENDS if end in names.template]
        self.eos_ids = tuple(dict.fromkeys(id for id in eos if id is not None and id < pieces.size))
        # Qwen's tokenizer has no bos, but its config.json names the token that stood between texts in training.
        start = [self.bos_id, names.bos, *self.eos_ids]
        self.start_ids = [id for id in start if id is not None and id < pieces.size][:1]
        special = [token for token in pieces.added if token.special and token.spelling]
        self._special = [token.spelling for token in special]
        self._control = frozenset(token.id for token in special)
        steering = {self.bos_id, self.pad_id, *self.eos_ids}
        self._never = self._control - ({self._named("unk_token", None)} - steering)  # what no text may become
        special.sort(key=lambda token: -len(token.spelling))
        self._split = re.compile("|".join(f"({token.pattern})" for token in special) or "(?!)")
        self._bytes: dict[int, bytes] = {}
        self._split_ids = [token.id for token in special]
        self._spelled = re.compile("|".join(re.escape(token.spelling) for token in special) or "(?!)")

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Open the tokenizer of a model folder. Raises TokenizerError, one sentence, for anything unusable."""
        folder = Path(folder)
        config = read_object_if_there(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        template = read_template(folder, config)
        names = SpecialNames.read(folder, config, template[0] if template else "")
        pieces: Pieces
        if (folder / "tokenizer.json").is_file():
            pieces = JsonPieces(folder / "tokenizer.json", names)
        elif (folder / "tokenizer.model").is_file():
            pieces = SentencePieces(folder / "tokenizer.model", names)
        else:
            raise TokenizerError(
                f"{folder} has neither tokenizer.json nor tokenizer.model; copy one of them from the model's publisher."
            )
        return cls(pieces, names, template, str(folder))

    def _named(self, name: str, fallback: int | None) -> int | None:
        """Id of the token that the configuration files call `name`; `fallback` where they say nothing."""
        if name not in self._names.spelled:
            return fallback if fallback is not None and 0 <= fallback < self._pieces.size else None
        spelling = self._names.spelled[name]
        id = None if spelling is None else self._pieces.id_of(spelling)
        if id is None and spelling is not None and name == "eos_token":
            raise TokenizerError(
                f"{self._folder} names an end-of-text token that its vocabulary does not hold; "
                "take tokenizer_config.json and the tokenizer from the same model."
            )
        return id

    # --- text -> ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with nothing added, and no control token whatever it spells."""
        return self._encode(text, first=True)

    def _encode(self, text: str, first: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, from a broken JSON file or file name
            text = text.encode("utf-8", "replace").decode()
        ids = self._encode_parts(_stretches(text), first)
        if self._never.isdisjoint(ids):
            return ids
        # A vocabulary may hold a control token's spelling as a piece of text: cut the spelling after its first sign.
        cuts = [match.start() + 1 for match in self._spelled.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = self._encode_parts(parts, first)
        if not self._never.isdisjoint(ids):
            raise TokenizerError(
                f"The tokenizer in {self._folder} turns ordinary text into control tokens; take it from its publisher."
            )
        return ids

    def _encode_parts(self, parts: Iterable[str], first: bool) -> list[int]:
        return [id for n, part in enumerate(parts) for id in self._pieces.encode(part, first and n == 0)]

    # --- ids -> text --------------------------------------------------------------------------------------------------

    def _bytes_of(self, id: int) -> bytes:
        known = self._bytes.get(id)
        if known is None:
            inside = 0 <= id < self._pieces.size and id not in self._control
            known = self._bytes[id] = self._pieces.bytes_of(id) if inside else b""
        return known

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        """Text of `ids`. Control tokens and ids beyond the vocabulary give nothing; broken UTF-8 gives U+FFFD.

        `continuing`: the ids follow others, so that the space before their first word belongs to the text.
        """
        text = b"".join(self._bytes_of(int(id)) for id in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._pieces.strips_space and not continuing else text

    def stream_decoder(self, continuing: bool = False) -> StreamDecoder:
        """A decoder that is given one id at a time; what it returns, joined, is `decode` of them all."""
        return StreamDecoder(self._bytes_of, self._pieces.strips_space and not continuing)

    # --- chats --------------------------------------------------------------------------------------------------------

    @property
    def has_template(self) -> bool:
        return self._template_source is not None

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        from edgetune.runtime.templates import ChatTemplate  # jinja2 is slow to import, and most commands need none

        if self._template_source is None:
            raise TokenizerError(
                f"{self._folder} has no chat template; use an instruction-tuned model, or `edgetune generate`."
            )
        source, where = self._template_source
        return ChatTemplate(source, where, {name: token for name, token in self._names.spelled.items() if token is not None})

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it; messages are {"role": ..., "content": ...}."""
        return self._template.render(messages, add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of the conversation: the template's control tokens as such, those spelled inside a message as text.

        Nothing is added: a template that writes no beginning-of-text token gives none.
        """
        nonce = f"{secrets.randbelow(10**24):024d}"  # digits: no filter of a template alters them
        marked = [_Marker(self._spelled, self._special, nonce).mark(message) for message in messages]
        text = self.render_chat(marked, add_generation_prompt)
        ids: list[int] = []
        at = 0
        for match in self._split.finditer(text):
            ids += self._text_between(text[at : match.start()], nonce, first=at == 0)
            ids.append(self._split_ids[(match.lastindex or 1) - 1])
            at = match.end()
        return ids + self._text_between(text[at:], nonce, first=at == 0)

    def _text_between(self, text: str, nonce: str, first: bool) -> list[int]:
        text = text.replace(nonce, "")
        return self._encode(text, first) if text else []


def _stretches(text: str) -> Iterator[str]:
    """Cut a very long text before a space between two letters, where every tokenizer cuts, too.

    The libraries need a hundred bytes of memory a character.
    """
    start = 0
    while len(text) - start > STRETCH:
        cut = _BETWEEN_WORDS.search(text, start + STRETCH)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


class StreamDecoder:
    """Whole characters only, in constant time a token."""

    def __init__(self, bytes_of: Any, strip_space: bool) -> None:
        self._bytes_of, self._strip = bytes_of, strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that became certain with token `id`; often "" in the middle of a character."""
        return self._stripped(self._utf8.decode(self._bytes_of(int(id))))

    def flush(self) -> str:
        """What is left at the end: "" or U+FFFD for half a character."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _Marker:
    """Puts a nonce inside each special token that a message spells, so that it is none after rendering.

    So too where a message ends, or begins, with part of one, which the template's text or the next message's could
    complete. The sign that is cut off stays at the edge, so that a template's trimming sees what it would have seen.
    """

    def __init__(self, spelled: re.Pattern[str], special: list[str], nonce: str) -> None:
        self._spelled, self._nonce = spelled, nonce
        self._special = special

    def mark(self, value: Any, whole: bool = False) -> Any:
        if isinstance(value, str):
            text = self._spelled.sub(lambda match: self._cut(match[0], 1), value)
            return text if whole else self._edges(text)
        if isinstance(value, Mapping):  # a role is part of the template's own words: `<|assistant|>`
            return {self.mark(key, True): self.mark(item, key == "role") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def _cut(self, text: str, at: int) -> str:
        return text[:at] + self._nonce + text[at:]

    def _edges(self, text: str) -> str:
        body = text.strip()
        if not body:
            return text
        start = len(text) - len(text.lstrip())
        tails = [n for token in self._special for n in range(1, min(len(token), len(body) + 1)) if body.endswith(token[:n])]
        if tails:
            text = self._cut(text, start + len(body) - max(tails) + 1)
        if any(body.startswith(token[-n:]) for token in self._special for n in range(1, len(token))):
            text = self._cut(text, start + 1)
        return text


def read_template(folder: Path, config: dict[str, Any] | None = None) -> tuple[str, str] | None:
    """(source, file) of a model folder's chat template, or None; chat_template.jinja wins, as in transformers.

    `config` is tokenizer_config.json's content, read where it is not given. Raises TokenizerError.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_limited(path, TOKENIZER_CONFIG).decode("utf-8", "replace"), str(path)
    config = read_object_if_there(folder / "tokenizer_config.json", TOKENIZER_CONFIG) if config is None else config
    found = config.get("chat_template")
    if isinstance(found, list):  # named templates: the one called "default", or the only one
        named = {str(item.get("name")): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    return (found, str(folder / "tokenizer_config.json")) if isinstance(found, str) and found else None
