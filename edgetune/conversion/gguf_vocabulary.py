"""Read and check the tokenizer in a GGUF file's metadata, which is untrusted: lengths agree, ids exist, tokens are distinct."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.conversion.end_tokens import control_ids, end_ids
from edgetune.export.gguf.pre_tokenizers import PreTokenizer
from edgetune.export.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.untrusted_file import LONGEST_PIECE, LONGEST_TOKEN, MAX_IDS, MOST_ADDED_TOKENS

_PREFIX = "tokenizer.ggml."
_NAMED = ["bos", "eos", "eot", "eom", "unknown", "padding", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"]
"""GGUF's keys tokenizer.ggml.…_token_id that are read."""
_LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""The ids that a sentencepiece vocabulary has where its file lacks the keys, as in llama.cpp."""
_UNDEFINED = 0
"""The type of tokens without one: llama.h's llama_token_type."""
_ADVICE = "download the GGUF file again, or choose another one of the same model"


def refusal(fault: str) -> TokenizerError:
    """Return the error for a file whose tokenizer has this fault."""
    return TokenizerError(f"The GGUF file's tokenizer {fault}; {_ADVICE}.")


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer as GGUF's keys describe it.

    tokens: the spelling of each id. types: the type of each. ids: the id of each spelling. named: ids by the keys that give
    them, as {"bos": 1}. control: ids that no ordinary text may become. ends: ids that end generation, the named end first.
    pre, merges: for byte-level BPE; None and empty for sentencepiece. scores, adds_space: for sentencepiece.
    """

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    named: dict[str, int]
    control: frozenset[int]
    ends: tuple[int, ...]
    adds_bos: bool
    adds_eos: bool
    pre: PreTokenizer | None
    merges: list[tuple[str, str]]
    scores: list[float]
    adds_space: bool

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> GgufVocabulary:
        """Read the keys tokenizer.ggml.*. Raises TokenizerError for a kind of tokenizer that edgetune cannot reproduce."""
        kind = _value(metadata, "model", str)
        if kind not in ("gpt2", "llama"):
            raise TokenizerError(
                f"The GGUF file has a tokenizer of the kind {_shown(kind)}, which edgetune cannot convert; it converts gpt2 "
                "(byte-level BPE) and llama (sentencepiece): choose a LLaMA, Mistral, SmolLM2 or Qwen model."
            )
        pre = None if kind == "llama" else _pre_tokenizer(metadata)
        tokens = _tokens(metadata)
        ids = {token: id for id, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            raise refusal(f"has {len(tokens) - len(ids):,} tokens twice")
        types = _types(metadata, len(tokens))
        named = _named_ids(metadata, len(tokens), {} if pre is not None else _LLAMA_IDS)
        ends = end_ids(ids, named)
        control = control_ids(ids, (id for id, type in enumerate(types) if type in (CONTROL, UNKNOWN)), ends)
        _check_added(tokens, [id for id, type in enumerate(types) if id in control or type == USER_DEFINED])
        adds_bos = _flag(metadata, "add_bos_token", pre.adds_bos if pre is not None else True)
        adds_eos = _flag(metadata, "add_eos_token", False)
        for name, adds in ("bos", adds_bos), ("eos", adds_eos):
            if adds and name not in named:
                raise refusal(f"adds a token to every text but lacks the key {_PREFIX}{name}_token_id")
        return cls(
            tokens,
            types,
            ids,
            named,
            control,
            ends,
            adds_bos,
            adds_eos,
            pre,
            [] if pre is None else _merges(metadata, ids),
            _scores(metadata, len(tokens)) if pre is None else [],
            pre is None and _flag(metadata, "add_space_prefix", True),
        )

    def spelling(self, name: str) -> str | None:
        """Return the spelling of the token that the file gives this name ("bos"), or None."""
        return self.tokens[self.named[name]] if name in self.named else None


def _shown(value: Any) -> str:
    """Return an untrusted value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _value(metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return the value of tokenizer.ggml.`key`. Raises TokenizerError where it is missing or of another kind."""
    value = metadata.get(_PREFIX + key)
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        raise refusal(f"has {found} under {_PREFIX}{key}, expected {'text' if kind is str else kind.__name__}")
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    return bool(_value(metadata, key, bool)) if _PREFIX + key in metadata else default


def _array(metadata: Mapping[str, Any], key: str, size: int | None) -> Sequence[Any]:
    """Return the array tokenizer.ggml.`key`, of `size` items. Raises TokenizerError where there is none."""
    value = metadata.get(_PREFIX + key)
    if value is None or isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        raise refusal(f"has no list under {_PREFIX}{key}")
    if size is not None and len(value) != size:
        raise refusal(f"has {len(value):,} items under {_PREFIX}{key}, expected {size:,}, one for each token")
    if len(value) > MAX_IDS:
        raise refusal(f"has {len(value):,} items under {_PREFIX}{key}, expected at most {MAX_IDS:,}")
    items: Sequence[Any] = value.tolist() if hasattr(value, "tolist") else value
    return items


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    """Return an array of texts. Raises TokenizerError for items that are none."""
    items = _array(metadata, key, None)
    if not all(type(item) is str for item in items):
        raise refusal(f"has items that are no text under {_PREFIX}{key}")
    try:
        "".join(items).encode()
    except UnicodeEncodeError:
        raise refusal(f"has items that are not UTF-8 under {_PREFIX}{key}") from None
    return list(items)


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _texts(metadata, "tokens")
    if not tokens:
        raise refusal("has no tokens")
    longest = max(map(len, tokens))
    if longest > LONGEST_PIECE:
        raise refusal(f"has a token of {longest:,} characters, expected at most {LONGEST_PIECE:,}")
    return [token or f"[EMPTY_{id}]" for id, token in enumerate(tokens)]


def _types(metadata: Mapping[str, Any], size: int) -> list[int]:
    if _PREFIX + "token_type" not in metadata:
        return [NORMAL] * size
    types = _array(metadata, "token_type", size)
    if not all(type(item) is int and _UNDEFINED <= item <= BYTE for item in types):
        raise refusal(f"has values under {_PREFIX}token_type that are no types, expected whole numbers from 1 to {BYTE}")
    return list(types)


def _scores(metadata: Mapping[str, Any], size: int) -> list[float]:
    scores = _array(metadata, "scores", size)
    if not all(type(score) in (int, float) and not math.isnan(score) for score in scores):
        raise refusal(f"has values under {_PREFIX}scores that are no numbers")
    return [float(score) for score in scores]


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that merge, the first ones first. Raises TokenizerError for a pair that the vocabulary lacks."""
    pairs: dict[tuple[str, str], None] = {}
    for merge in _texts(metadata, "merges"):
        space = merge.find(" ", 1)
        left, right = merge[:space], merge[space + 1 :]
        if space < 0 or left not in ids or right not in ids or left + right not in ids:
            raise refusal(f"has merges under {_PREFIX}merges that are no pair of its tokens")
        pairs[left, right] = None
    return list(pairs)


def _named_ids(metadata: Mapping[str, Any], size: int, defaults: Mapping[str, int]) -> dict[str, int]:
    """Return the ids that the keys …_token_id give, with `defaults` for missing ones.

    An id beyond the tokens counts as missing, as in llama.cpp: for no padding, files have 4294967295, which is -1.
    """
    named = {name: id for name, id in defaults.items() if id < size}
    for name in _NAMED:
        key = f"{_PREFIX}{name}_token_id"
        if key in metadata:
            id = metadata[key]
            if type(id) is not int:
                raise refusal(f"has {_shown(id)} under {key}, expected an id from 0 to {size - 1:,}")
            if 0 <= id < size:
                named[name] = id
    return named


def _check_added(tokens: Sequence[str], added: Sequence[int]) -> None:
    """Raise TokenizerError if too many tokens, or too long ones, are looked for in texts."""
    longest = max((len(tokens[id]) for id in added), default=0)
    if len(added) > MOST_ADDED_TOKENS:
        raise refusal(f"has {len(added):,} control and user-defined tokens, expected at most {MOST_ADDED_TOKENS:,}")
    if longest > LONGEST_TOKEN:
        raise refusal(f"has a control or user-defined token of {longest:,} characters, expected at most {LONGEST_TOKEN:,}")


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    """Return the pre-tokenizer of a byte-level BPE, "default" where the file names none."""
    name = _value(metadata, "pre", str) if _PREFIX + "pre" in metadata else "default"
    pre = PreTokenizer.named(name or "default")
    if pre is None:
        raise TokenizerError(
            f"The GGUF file's tokenizer splits texts in the way {_shown(name)}, which edgetune cannot reproduce; choose "
            "another model, or its original folder from Hugging Face."
        )
    return pre
