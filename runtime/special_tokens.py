"""Find out which tokens of a model are special, and what each is for, from the JSON files beside its tokenizer.

The files are tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and config.json.
All of them are untrusted: `json_file` checks their size, and a value of an unexpected type is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetune.runtime.json_file import read_object_if_there
from edgetune.runtime.untrusted_file import MAX_IDS, TOKENIZER_CONFIG

NO_ID = -1
"""The id of a declared token for which the files give a spelling only."""
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""The keys under which the configuration files write special tokens."""


@dataclass(frozen=True)
class AddedToken:
    """A token that a tokenizer looks for in a text before it splits the rest into pieces.

    special: the token controls the model (<s>, <|eot_id|>); no text may become it. lstrip, rstrip: the token takes the
    white space before or after it. single_word: the token counts only where no letter or digit touches it.
    """

    spelling: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        """Return a regular expression that matches the token in a text, with the white space after it that it takes."""
        spelling = re.escape(self.spelling)
        return (rf"(?<!\w){spelling}(?!\w)" if self.single_word else spelling) + (r"\s*" if self.rstrip else "")


@dataclass
class SpecialTokens:
    """The special tokens of a model, as its configuration files describe them.

    template: the chat template's source, or "".
    spelled: the spelling of each token in TOKEN_NAMES that a file mentions; None if it says that there is no such token.
    declared: the added tokens, with NO_ID where a file gives only the spelling.
    config: the content of tokenizer_config.json.
    bos, pad, eos: ids from config.json and generation_config.json. bos and pad are used where `spelled` has no entry;
        eos adds to the one in `spelled`.
    rows: the rows of the model's embedding by config.json, None if it does not say.
    rebuilt_as_llama: transformers 5 ignores part of tokenizer.json for this model and builds a LlamaTokenizer itself.
    space_prefix: where a space is put before a text: "first" (at the very beginning), "always" (after control tokens
        too) or "never".
    """

    template: str = ""
    spelled: dict[str, str | None] = field(default_factory=dict)
    declared: list[AddedToken] = field(default_factory=list)
    bos: int | None = None
    pad: int | None = None
    eos: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    rebuilt_as_llama: bool = False
    space_prefix: str = "first"

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any], template: str) -> SpecialTokens:
        """Read the special tokens of a model folder; `config` is the content of its tokenizer_config.json.

        `template` is the chat template's source, or "". Raises TokenizerError for a file that is not a JSON object.
        """
        # Older models keep the same entries in special_tokens_map.json; tokenizer_config.json wins, as in transformers.
        older = read_object_if_there(folder / "special_tokens_map.json", TOKENIZER_CONFIG)
        generation = read_object_if_there(folder / "generation_config.json", TOKENIZER_CONFIG)
        model = read_object_if_there(folder / "config.json", TOKENIZER_CONFIG)
        added = read_object_if_there(folder / "added_tokens.json", TOKENIZER_CONFIG)

        tokens = cls(template, config=config, rows=next(iter(_ids(model.get("vocab_size"))), None))
        for name in TOKEN_NAMES:
            for source in (config, older):
                if name in source and not _is_blank(source[name]):
                    tokens.spelled.setdefault(name, _spelling(source[name]))
        tokens.declared = _declared_with_named(list(_declared(config, older, added)), tokens.spelled)
        tokens.bos = next(iter(_ids(model.get("bos_token_id"))), None)
        tokens.pad = next(iter(_ids(model.get("pad_token_id"))), None)
        tokens.eos = _ids(generation.get("eos_token_id")) + _ids(model.get("eos_token_id"))
        kind = str(config.get("tokenizer_class") or "LlamaTokenizer").removesuffix("Fast")
        tokens.rebuilt_as_llama = kind == "LlamaTokenizer" and model.get("model_type") == "llama"
        if config.get("add_prefix_space") is False:
            tokens.space_prefix = "never"
        elif config.get("legacy") is True:
            tokens.space_prefix = "always"
        return tokens

    def is_control(self, spelling: str) -> bool:
        """Return True if an added token controls the model even though no file marks it as special.

        Such a token looks like `<|name|>` and the chat template itself writes it.
        """
        return spelling.startswith("<|") and spelling.endswith("|>") and spelling in self.template


def _spelling(value: Any) -> str | None:
    """Return the spelling of a token, which the files write as a string or as an object with the key "content"."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _is_blank(value: Any) -> bool:
    """Return True for a token spelled "", as some converters write one that they do not know: it says nothing."""
    return (value.get("content") if isinstance(value, dict) else value) == ""


def _ids(value: Any) -> list[int]:
    """Return the valid ids in a value that is one id or a list of them, as in generation_config.json."""
    return [id for id in (value if isinstance(value, list) else [value]) if type(id) is int and id >= 0]


def _is_id(text: str) -> bool:
    """Return True for a token id as JSON's keys write it."""
    return text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_IDS))


def _declared(config: dict[str, Any], older: dict[str, Any], added: dict[str, Any]) -> Iterator[AddedToken]:
    """Yield each added token of the configuration files once: first those with an id, by id, then those without."""
    decoder = config.get("added_tokens_decoder")
    with_ids = [(int(id), value) for id, value in (decoder if isinstance(decoder, dict) else {}).items() if _is_id(id)]
    with_ids += [(id, spelling) for spelling, id in added.items() if type(id) is int and id >= 0]
    extra: list[Any] = []
    for source in (config, older):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(key)
            extra += values.values() if isinstance(values, dict) else values if isinstance(values, list) else []
    extra_spellings = {_spelling(value) for value in extra}
    seen: set[str] = set()
    for id, value in [*sorted(with_ids, key=lambda item: item[0]), *((NO_ID, value) for value in extra)]:
        spelling = _spelling(value)
        if spelling is None or spelling in seen or id >= MAX_IDS:
            continue
        seen.add(spelling)
        flags = value if isinstance(value, dict) else {}
        yield AddedToken(
            spelling,
            id,
            spelling in extra_spellings or flags.get("special") is True,
            flags.get("lstrip") is True,
            flags.get("rstrip") is True,
            flags.get("single_word") is True,
        )


def _declared_with_named(declared: list[AddedToken], spelled: dict[str, str | None]) -> list[AddedToken]:
    """Return `declared` with every token that has a name in it, marked special whatever its own entry says."""
    named = [spelling for spelling in spelled.values() if spelling is not None]
    known = {token.spelling for token in declared}
    missing = [AddedToken(spelling, NO_ID, True) for spelling in named if spelling not in known]
    return [replace(token, special=True) if token.spelling in named else token for token in declared] + missing
