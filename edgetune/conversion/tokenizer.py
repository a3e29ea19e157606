"""Turn the tokenizer of a GGUF file into the files of a Hugging Face folder.

The ids of a text are those that llama.cpp gives it, with and without control tokens; tests compare them. One difference is
intended: text that merely spells a control token stays text, even where llama.cpp's merges make a token of it. transformers
reads the same ids from the files, except that its class for qwen2 composes accents first (NFC), which llama.cpp does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from edgetune.conversion.gguf_vocabulary import GgufVocabulary, refusal
from edgetune.export.gguf.vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED
from edgetune.runtime.untrusted_file import MOST_SPLIT_WORK, TOKENIZER_CONFIG, TOKENIZER_JSON

_SPACE = "▁"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Names in generation_config.json for GGUF's keys general.sampling.…"""
_KEEP_SPACE_AFTER = ("<unk>", "<s>", "<|endoftext|>")
"""Phi-3's tokens that leave the white space after them alone, unlike its other control tokens (llama.cpp's llama-vocab.cpp)."""


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a Hugging Face folder, by name, for the tokenizer in a GGUF file's metadata.

    tokenizer.json, tokenizer_config.json, generation_config.json, and chat_template.jinja where the file has a template.
    Raises TokenizerError for a tokenizer that is damaged or that edgetune cannot reproduce.
    """
    vocabulary = GgufVocabulary.read(metadata)
    files = {
        "tokenizer.json": _json(_tokenizer(vocabulary, _takes_space_after(metadata))),
        "tokenizer_config.json": _json(_config(vocabulary)),
        "generation_config.json": _json(_generation(vocabulary, metadata)),
    }
    template = _template(metadata)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    for name, data in files.items():
        limit = TOKENIZER_JSON.limit if name == "tokenizer.json" else TOKENIZER_CONFIG.limit
        if len(data) > limit:
            raise refusal(f"would take {len(data) >> 20} MiB as {name}, expected at most {limit >> 20} MiB")
    return files


def tokenizer_notices(metadata: Mapping[str, Any]) -> list[str]:
    """Return what a user should know about a tokenizer that can be converted, a sentence each."""
    notices = []
    others = sorted(key for key in metadata if key.startswith("tokenizer.chat_template."))
    if others:
        used = "the default one is used" if _template(metadata) is not None else "none is used, because none is the default"
        notices.append(f"The GGUF file has {len(others)} more chat template{'s' * (len(others) > 1)}; {used}.")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and not metadata.get("tokenizer.ggml.pre"):
        notices.append(
            "The GGUF file does not say how its tokenizer splits texts, so llama.cpp's default is used; a newer file of the "
            "same model would read texts better."
        )
    return notices


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _tokenizer(vocabulary: GgufVocabulary, takes_space_after: bool) -> dict[str, Any]:
    """Return the content of tokenizer.json; `takes_space_after`: control tokens take the white space after them."""
    parts = _sentencepiece(vocabulary) if vocabulary.pre is None else _byte_level(vocabulary)
    added = [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": takes_space_after and token not in _KEEP_SPACE_AFTER,
            "normalized": False,
            "special": id in vocabulary.control,
        }
        for id, token in enumerate(vocabulary.tokens)
        if id in vocabulary.control or vocabulary.types[id] == USER_DEFINED
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}


def _byte_level(vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Return the parts of tokenizer.json for byte-level BPE."""
    assert vocabulary.pre is not None
    return {
        "normalizer": None,
        "pre_tokenizer": vocabulary.pre.as_json(),
        "post_processor": _post_processor(vocabulary),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, vocabulary.merges, ignore_merges=vocabulary.pre.ignore_merges),
    }


def _sentencepiece(vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Return the parts of tokenizer.json for sentencepiece's BPE, which puts a space before each text between two tokens."""
    if not all(byte in vocabulary.ids for byte in _BYTES):
        raise refusal("lacks some of the 256 byte tokens <0x00> to <0xFF>")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    restore = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if vocabulary.adds_space else [])]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*([prepend] if vocabulary.adds_space else []), replace]},
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, _merges_by_score(vocabulary), byte_fallback=True),
    }


def _bpe(
    vocabulary: GgufVocabulary, merges: list[tuple[str, str]], ignore_merges: bool = False, byte_fallback: bool = False
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.spelling("unknown") if byte_fallback else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _merges_by_score(vocabulary: GgufVocabulary) -> list[tuple[str, str]]:
    """Return the pairs that sentencepiece merges, the best score first: every way to make a piece of two others.

    Of equal scores, the pair whose left piece is longest comes first: runs of spaces then grow from the left, as in llama.cpp.
    Raises TokenizerError for pieces so long that this would take minutes.
    """
    apart = {BYTE, CONTROL, UNKNOWN}
    pieces = [
        (token, vocabulary.scores[id])
        for id, token in enumerate(vocabulary.tokens)
        if len(token) > 1 and vocabulary.types[id] not in apart and id not in vocabulary.control
    ]
    work = sum(len(token) ** 2 for token, _ in pieces)
    if work > MOST_SPLIT_WORK:
        raise refusal("has too many long tokens")
    known = {token for id, token in enumerate(vocabulary.tokens) if vocabulary.types[id] not in apart}
    found = [
        (score, at, token)
        for token, score in pieces
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    found.sort(key=lambda merge: (-merge[0], -merge[1], -len(merge[2]), merge[2]))
    return [(token[:at], token[at:]) for _, at, token in found]


def _post_processor(vocabulary: GgufVocabulary) -> dict[str, Any] | None:
    """Return the part of tokenizer.json that puts tokens before or after each text, or None where none is put."""
    before = [vocabulary.named["bos"]] if vocabulary.adds_bos else []
    after = [vocabulary.named["eos"]] if vocabulary.adds_eos else []
    if not before + after:
        return None

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        def special(id: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": vocabulary.tokens[id], "type_id": type_id}}

        return [*map(special, before), {"Sequence": {"id": sequence, "type_id": type_id}}, *map(special, after)]

    tokens = {vocabulary.tokens[id]: id for id in before + after}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in tokens.items()},
    }


def _config(vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Return the content of tokenizer_config.json. The class is the one that takes tokenizer.json as it is."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    spelled = {key: vocabulary.spelling(name) for key, name in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        "clean_up_tokenization_spaces": False,
        **{key: token for key, token in spelled.items() if token is not None},
    }


def _generation(vocabulary: GgufVocabulary, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of generation_config.json: the ids that end generation, and the publisher's sampling settings."""
    ids = {"bos_token_id": vocabulary.named.get("bos"), "pad_token_id": vocabulary.named.get("padding")}
    content: dict[str, Any] = {key: id for key, id in ids.items() if id is not None}
    if vocabulary.ends:
        content["eos_token_id"] = list(vocabulary.ends)
    for key, name in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and type(value) is not bool and math.isfinite(value):
            content[name] = value
    if "temperature" in content:
        content["do_sample"] = content["temperature"] > 0
    return content


def _template(metadata: Mapping[str, Any]) -> str | None:
    """Return the default chat template, the only one where there is one under another name, or None."""
    named = {key: value for key, value in metadata.items() if key.startswith("tokenizer.chat_template.")}
    default = metadata.get("tokenizer.chat_template") or named.get("tokenizer.chat_template.default")
    if default is None and len(named) == 1:
        default = next(iter(named.values()))
    if default is not None and not isinstance(default, str):
        raise refusal("has a chat template that is no text")
    try:
        return default if default and default.encode() else None
    except UnicodeEncodeError:
        raise refusal("has a chat template that is not UTF-8") from None


def _takes_space_after(metadata: Mapping[str, Any]) -> bool:
    """Return True for Phi-3, whose control tokens take the white space after them; llama.cpp knows it by the model's name."""
    name = metadata.get("general.name")
    return isinstance(name, str) and ("phi-3" in name.lower() or "phi3" in name.lower())
