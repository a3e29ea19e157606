"""The two tokenizer libraries behind one protocol, and what a model's configuration files say about special tokens.

Every file is untrusted: it is measured before it is parsed, and whatever a library says about it becomes one sentence.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.json_file import (
    SENTENCEPIECE_MODEL,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    read_limited,
    read_object_if_there,
)

MOST_IDS = 1 << 22


@dataclass(frozen=True)
class AddedToken:
    """A token that a library looks for before it splits a text into pieces."""

    spelling: str
    id: int
    special: bool
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        word = r"(?<!\w){}(?!\w)" if self.single_word else "{}"
        return (r"\s*" if self.lstrip else "") + word.format(re.escape(self.spelling)) + (r"\s*" if self.rstrip else "")


class Pieces(Protocol):
    """What a library gives: ids of a text in which no special token is looked for, and the bytes behind an id."""

    size: int
    added: list[AddedToken]
    strips_space: bool  # the first piece's leading space is not part of the text

    def encode(self, text: str, first: bool) -> list[int]: ...
    def id_of(self, token: str) -> int | None: ...
    def bytes_of(self, id: int) -> bytes: ...


NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def _spelling(value: Any) -> str | None:
    """A token is written as its spelling or as an object that holds it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _ids(value: Any) -> list[int]:
    """An id or a list of them, as generation_config.json writes them."""
    return [id for id in (value if isinstance(value, list) else [value]) if type(id) is int and id >= 0]


@dataclass
class SpecialNames:
    """What the five JSON files beside a tokenizer say about its special tokens.

    spelled: name -> spelling, None where a file says that the model has no such token.
    declared: added tokens, with id -1 where only the spelling is given.
    bos, pad, eos: ids from the model's own configuration, used where `spelled` is silent (eos: besides).
    """

    template: str = ""
    spelled: dict[str, str | None] = field(default_factory=dict)
    declared: list[AddedToken] = field(default_factory=list)
    bos: int | None = None
    pad: int | None = None
    eos: list[int] = field(default_factory=list)
    rebuilds_llama: bool = False
    prefix: str = "first"  # where a space is put before a text: "first", "always" (after control tokens too), "never"

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any], template: str) -> SpecialNames:
        """`config` is tokenizer_config.json's content, `template` the chat template's source or ""."""
        older = read_object_if_there(folder / "special_tokens_map.json", TOKENIZER_CONFIG)
        generation = read_object_if_there(folder / "generation_config.json", TOKENIZER_CONFIG)
        model = read_object_if_there(folder / "config.json", TOKENIZER_CONFIG)
        names = cls(template)
        for name in NAMES:
            for source in (config, older):
                if name in source:
                    names.spelled.setdefault(name, _spelling(source[name]))
        names.declared = list(_declared(config, older, read_object_if_there(folder / "added_tokens.json", TOKENIZER_CONFIG)))
        known = {token.spelling for token in names.declared}
        for spelling in names.spelled.values():
            if spelling is not None and spelling not in known:
                names.declared.append(AddedToken(spelling, -1, True))
        named = set(names.spelled.values())
        names.declared = [
            AddedToken(token.spelling, token.id, True, token.lstrip, token.rstrip, token.single_word)
            if token.spelling in named
            else token
            for token in names.declared
        ]
        names.bos = next(iter(_ids(model.get("bos_token_id"))), None)
        names.pad = next(iter(_ids(model.get("pad_token_id"))), None)
        names.eos = _ids(generation.get("eos_token_id")) + _ids(model.get("eos_token_id"))
        kind = str(config.get("tokenizer_class") or "LlamaTokenizer").removesuffix("Fast")
        names.rebuilds_llama = kind == "LlamaTokenizer" and model.get("model_type") == "llama"
        if config.get("add_prefix_space") is False:
            names.prefix = "never"
        elif config.get("legacy") is True:
            names.prefix = "always"
        return names

    def is_control(self, spelling: str) -> bool:
        """Whether an added token not marked special nevertheless steers: the template writes `<|such|>` itself."""
        return spelling.startswith("<|") and spelling.endswith("|>") and spelling in self.template


def _declared(config: dict[str, Any], older: dict[str, Any], added: dict[str, Any]) -> Iterator[AddedToken]:
    """Added tokens of the configuration files, each spelling once, those with an id first and by id."""
    seen: set[str] = set()
    decoder = config.get("added_tokens_decoder")
    with_ids = [(int(id), value) for id, value in (decoder if isinstance(decoder, dict) else {}).items() if id.isdecimal()]
    with_ids += [(id, spelling) for spelling, id in added.items() if type(id) is int and id >= 0]
    extra: list[Any] = []
    for source in (config, older):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(key)
            extra += values.values() if isinstance(values, dict) else values if isinstance(values, list) else []
    special = {_spelling(value) for value in extra}
    for id, value in [*sorted(with_ids, key=lambda item: item[0]), *((-1, value) for value in extra)]:
        spelling = _spelling(value)
        if spelling is None or spelling in seen or id >= MOST_IDS:
            continue
        seen.add(spelling)
        flags = value if isinstance(value, dict) else {}
        yield AddedToken(
            spelling,
            id,
            spelling in special or flags.get("special") is True,
            flags.get("lstrip") is True,
            flags.get("rstrip") is True,
            flags.get("single_word") is True,
        )


class JsonPieces:
    """`tokenizer.json`, read by the `tokenizers` library."""

    def __init__(self, path: Path, names: SpecialNames) -> None:
        import tokenizers

        self._where = str(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(read_limited(path, TOKENIZER_JSON).decode())
        except TokenizerError:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):  # a panic of the Rust library is neither
                raise
            raise TokenizerError(
                f"{path} is not a tokenizer that the tokenizers library can read; copy it again from its publisher."
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add(names)
        self._tokenizer.encode_special_tokens = True
        self.added = [
            AddedToken(token.content, id, token.special, token.lstrip, token.rstrip, token.single_word)
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
        ]
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 < self.size <= MOST_IDS:
            raise TokenizerError(f"{path} has {self.size} as its number of ids; copy it again from its publisher.")
        if names.rebuilds_llama:
            self._as_transformers_rebuilds_it(names.prefix)
        self._byte_level, self.strips_space = self._decoder()
        self._rest: tokenizers.Tokenizer | None = None

    def _add(self, names: SpecialNames) -> None:
        """Add what the configuration files declare; a token that is there keeps its id and becomes special."""
        import tokenizers

        have = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        steering = [token for token in have.values() if not token.special and names.is_control(token.content)]
        self._tokenizer.add_special_tokens(steering)
        for token in names.declared:
            old = have.get(token.spelling)
            if old is not None and (old.special or not token.special):
                continue
            if old is None and token.id < 0 and self.id_of(token.spelling) is None:
                continue  # a name without an id, and no such piece: _named decides whether that matters
            given = tokenizers.AddedToken(
                token.spelling,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
            )
            (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([given])
            id = self.id_of(token.spelling)
            if token.id >= 0 and id != token.id:
                raise TokenizerError(
                    f"{self._where} has id {id} for a token that tokenizer_config.json declares as {token.id}; "
                    "take both files from the same model."
                )

    def _as_transformers_rebuilds_it(self, prefix: str) -> None:
        """Older LLaMA files prepend a space by a normalizer; transformers 5 replaces it by Metaspace, and so do we."""
        from tokenizers import normalizers, pre_tokenizers

        before = self._state(self._tokenizer.normalizer)
        steps = before["normalizers"] if before.get("type") == "Sequence" else [before]
        prepends = [step.get("type") for step in steps] == ["Prepend", "Replace"] and steps[0].get("prepend") == "▁"
        metaspace = self._state(self._tokenizer.pre_tokenizer)
        if (prepends and not metaspace) or (not before and metaspace.get("type") == "Metaspace"):
            self._tokenizer.normalizer = normalizers.Sequence([])
            self._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prefix, split=False)

    @staticmethod
    def _state(part: Any) -> dict[str, Any]:
        state = json.loads(part.__getstate__()) if part is not None else {}
        return state if isinstance(state, dict) else {}

    def _decoder(self) -> tuple[bool, bool]:
        """(byte-level, strips the first space), or refused: no other decoder belongs to a model we run."""
        state = self._state(self._tokenizer.decoder)
        steps = state.get("decoders", []) if state.get("type") == "Sequence" else [state]
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            return True, False
        if kinds == ["Metaspace"] and steps[0].get("replacement") == "▁":
            return False, steps[0].get("prepend_scheme", "always") != "never"
        spaces = {"pattern": {"String": "▁"}, "content": " "}
        plain = all(step.items() >= spaces.items() for step in steps if step.get("type") == "Replace")
        strips = [(step.get("content"), step.get("start"), step.get("stop")) for step in steps if step["type"] == "Strip"]
        if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "Replace" in kinds and plain:
            if not strips or strips == [(" ", 1, 0)]:
                return False, bool(strips)
            if strips == [(" ", 0, 0)]:
                return False, False
        raise TokenizerError(
            f"{self._where} decodes with {', '.join(map(str, kinds))}; edgetune reads byte-level and "
            "sentencepiece-like tokenizers, so choose a LLaMA, Mistral, SmolLM2 or Qwen model."
        )

    def encode(self, text: str, first: bool) -> list[int]:
        tokenizer = self._tokenizer if first else self._continuing()
        try:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception:
            raise TokenizerError(
                f"{self._where} has no ids for a text it was given; its vocabulary lacks an unknown token, so copy it "
                "again from its publisher."
            ) from None

    def _continuing(self) -> Any:
        """The same tokenizer for text after a control token, where Metaspace's "first" puts no space."""
        state = self._state(self._tokenizer.pre_tokenizer)
        if state.get("type") != "Metaspace" or state.get("prepend_scheme") != "first":
            return self._tokenizer
        if self._rest is None:
            import tokenizers

            self._rest = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            self._rest.encode_special_tokens = True
            self._rest.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
                state["replacement"], "never", split=bool(state["split"])
            )
        return self._rest

    def id_of(self, token: str) -> int | None:
        id: int | None = self._tokenizer.token_to_id(token)
        return id

    def bytes_of(self, id: int) -> bytes:
        token = self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        return _byte_level_bytes(token) if self._byte_level else _piece_bytes(token)


class SentencePieces:
    """`tokenizer.model`, read by the `sentencepiece` library.

    sentencepiece puts a space before every text; transformers 5 does so unless the text begins with one. To get the
    same ids, and none after a control token, the model is opened with that step off and the space is put by us.
    """

    _NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to the protobuf it merges as normalizer_spec { add_dummy_prefix: false }

    def __init__(self, path: Path, names: SpecialNames) -> None:
        import sentencepiece

        data = read_limited(path, SENTENCEPIECE_MODEL)
        try:
            whole = sentencepiece.SentencePieceProcessor(model_proto=data)
            bare = sentencepiece.SentencePieceProcessor(model_proto=data + self._NO_PREFIX)
            self._ours = whole.normalize("a") == "▁a" and bare.normalize(" a") == "▁a" and bare.normalize("a") == "a"
        except Exception:
            raise TokenizerError(
                f"{path} is not a sentencepiece model; copy it again, or put tokenizer.json beside it."
            ) from None
        self._processor = bare if self._ours else whole
        self._prefix = names.prefix
        self._count = self._processor.get_piece_size()
        self.strips_space = whole.normalize("a") == "▁a"
        self.added = self._added(names)
        self.size = max([self._count, *(token.id + 1 for token in self.added)])
        self._beyond = {token.id: token.spelling for token in self.added if token.id >= self._count}
        plain = sorted((token for token in self.added if not token.special), key=lambda token: -len(token.spelling))
        self._plain_ids = [token.id for token in plain]
        self._plain = re.compile("|".join(f"({token.pattern})" for token in plain)) if plain else None

    def _added(self, names: SpecialNames) -> list[AddedToken]:
        sp = self._processor
        added = {
            sp.id_to_piece(id): AddedToken(sp.id_to_piece(id), id, True)
            for id in range(self._count)
            if sp.is_control(id) or sp.is_unknown(id)
        }
        for token in names.declared:
            id = token.id if token.id >= 0 else self._own_id(token.spelling)
            if id is None or not 0 <= id < self._count + (1 << 16):
                continue
            special = token.special or token.spelling in added or names.is_control(token.spelling)
            added[token.spelling] = AddedToken(token.spelling, id, special, token.lstrip, token.rstrip, token.single_word)
        for name, id in ("bos_token", sp.bos_id()), ("eos_token", sp.eos_id()), ("unk_token", sp.unk_id()):
            if id >= 0:
                names.spelled.setdefault(name, sp.id_to_piece(id))
        return list(added.values())

    def _own_id(self, piece: str) -> int | None:
        id = int(self._processor.piece_to_id(piece))
        return id if self._processor.id_to_piece(id) == piece else None

    def encode(self, text: str, first: bool) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in self._plain.finditer(text) if self._plain is not None else ():
            ids += self._encode_plain(text[at : match.start()], first and at == 0)
            ids.append(self._plain_ids[(match.lastindex or 1) - 1])
            at = match.end()
        return ids + self._encode_plain(text[at:], first and at == 0)

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        if self._ours and self._prefix in ("always", "first" if first else "") and text[:1] not in ("", " ", "▁"):
            text = " " + text
        return list(self._processor.encode(text))

    def id_of(self, token: str) -> int | None:
        return next((added.id for added in self.added if added.spelling == token), self._own_id(token))

    def bytes_of(self, id: int) -> bytes:
        if id >= self._count:
            return self._beyond.get(id, "").encode()
        return _piece_bytes(self._processor.id_to_piece(id))


_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _piece_bytes(piece: str) -> bytes:
    """sentencepiece's spelling: ▁ is a space, <0x0A> one byte."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


@functools.cache
def _byte_level_table() -> dict[str, int]:
    """GPT-2's spelling of bytes: the printable ones stand for themselves, the others move up to U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_level_table()
    try:
        return bytes(table[sign] for sign in token)
    except KeyError:  # an added token with signs of its own
        return token.encode()
