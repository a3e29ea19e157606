"""Tokenizer files: damaged, hostile or contradictory ones, and odd ones that must keep their ids."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus.case import CASES, PROMPT, Case, Place, change_json, of_kind, plain_model
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.tokenizer import Tokenizer

KIND = "tokenizer files"
case = of_kind(KIND)
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 126504\n"


def byte_level() -> dict[str, Any]:
    """Return a tokenizer.json with three special tokens and one piece for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    special = ["<unk>", "<s>", "</s>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_and_words = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": content, **flags} for id, content in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **bytes_and_words},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **bytes_and_words},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {piece: id for id, piece in enumerate([*special, *signs])}, "merges": [],
        },
    }  # fmt: skip


def with_json(place: Place, value: Any) -> Path:
    """Write the tiny LLaMA with a tokenizer.json instead of its tokenizer.model."""
    model = place.model()
    (model / "tokenizer.model").unlink()
    (model / "tokenizer.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return model


def edited(*keys: str, to: Any) -> dict[str, Any]:
    """Return the byte-level tokenizer.json with the value under a path of keys replaced."""
    whole = byte_level()
    *parents, last = keys
    functools.reduce(lambda value, key: value[key], parents, whole)[last] = to
    return whole


def added(id: int, content: str, **flags: Any) -> list[dict[str, Any]]:
    """Return the byte-level tokenizer's added tokens and one more."""
    first = byte_level()["added_tokens"]
    return [*first, {**first[0], "id": id, "content": content, **flags}]


def vocabulary(**pieces: Any) -> dict[str, Any]:
    """Return the byte-level tokenizer.json with more pieces."""
    return edited("model", "vocab", to=byte_level()["model"]["vocab"] | pieces)


UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["h", -2.0]], "byte_fallback": False}
WORDPIECE = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}

# Name, the tokenizer.json, and what the refusal names.
REFUSED: tuple[tuple[str, Callable[[], Any], tuple[str, ...]], ...] = (
    ("an empty object", lambda: {}, (r"tokenizer\.json",)),
    ("an empty file", lambda: "", (r"tokenizer\.json",)),
    ("a pointer of Git LFS instead of tokenizer.json", lambda: LFS_POINTER, (r"tokenizer\.json",)),
    ("a page of HTML instead of tokenizer.json", lambda: "<!DOCTYPE html><title>401</title>", (r"tokenizer\.json",)),
    ("tokenizer.json cut in half", lambda: json.dumps(byte_level())[:3000], (r"tokenizer\.json",)),
    ("a decoder of null", lambda: edited("decoder", to=None), ("decode",)),
    ("a decoder in a sequence of none", lambda: edited("decoder", to={"type": "Sequence", "decoders": []}), ("decode",)),
    ("a model of null", lambda: edited("model", to=None), (r"tokenizer\.json",)),
    ("an unknown type of model", lambda: edited("model", "type", to="Neural"), (r"tokenizer\.json",)),
    ("an unknown pre-tokenizer", lambda: edited("pre_tokenizer", to={"type": "Custom"}), (r"tokenizer\.json",)),
    ("a version that does not exist", lambda: edited("version", to="2.0"), (r"tokenizer\.json",)),
    ("a merge of pieces that are not there", lambda: edited("model", "merges", to=["qq zz"]), (r"tokenizer\.json",)),
    ("a merge of one piece", lambda: edited("model", "merges", to=["q"]), (r"tokenizer\.json",)),
    ("an id in quotes", lambda: vocabulary(word="300"), (r"tokenizer\.json",)),
    ("a negative id", lambda: vocabulary(word=-1), (r"tokenizer\.json",)),
    ("an id of four thousand million", lambda: vocabulary(word=2**32 - 1), (r"tokenizer\.json|token id",)),
    ("a piece beyond the embedding's rows", lambda: vocabulary(word=8192), ("8192|8193",)),
    (
        "an added word beyond the embedding's rows",
        lambda: vocabulary(**{f"w{n}": n for n in range(259, 8192)}) | {"added_tokens": added(8192, "<note>", special=False)},
        ("8192|8193",),
    ),
    ("half of a surrogate pair in a piece", lambda: json.dumps(byte_level()).replace('"<unk>"', '"\\ud800"'), ()),
    ("a hundred thousand brackets in tokenizer.json", lambda: "[" * 100_000, (r"tokenizer\.json",)),
    ("a special token of 3 MB", lambda: edited("added_tokens", to=added(259, "x" * 3_000_000)), ()),
    (
        "WordPiece",
        lambda: edited("model", to={**WORDPIECE, "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}})
        | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        ("decode",),
    ),
    (
        "twenty normalizers that each double every letter",
        lambda: edited(
            "normalizer",
            to={
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 20,
            },
        ),
        (),
    ),
    (
        "a unigram model without an unknown token",
        lambda: edited("model", to=UNIGRAM) | {"decoder": {"type": "Metaspace", "replacement": "▁"}, "added_tokens": []},
        (),
    ),
)  # fmt: skip


def _refusing(value: Callable[[], Any], words: tuple[str, ...]) -> Callable[[Place], None]:
    return lambda place: place.opened(with_json(place, value())).refused(*words)


CASES.extend(Case(KIND, name, _refusing(value, words)) for name, value, words in REFUSED)


@case("truncation left over from training")
def _(place: Place) -> None:
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer = place.tokenizer(with_json(place, edited("truncation", to=cut)))
    assert len(tokenizer.encode(PROMPT)) == len(PROMPT)


@case("padding left over from training")
def _(place: Place) -> None:
    pad = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    tokenizer = place.tokenizer(with_json(place, edited("padding", to={**pad, "pad_token": "<unk>"})))
    assert len(tokenizer.encode(PROMPT)) == len(PROMPT)


@case("a post-processor that adds start and end")
def _(place: Place) -> None:
    parts = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    processor = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": known}
    tokenizer = place.tokenizer(with_json(place, edited("post_processor", to=processor)))
    assert 1 not in tokenizer.encode(PROMPT)


@case("BPE dropout left over from training")
def _(place: Place) -> None:
    value = vocabulary(Th=259) | {}
    value["model"] |= {"merges": ["T h"], "dropout": 0.5}
    tokenizer = place.tokenizer(with_json(place, value))
    assert {tuple(tokenizer.encode(PROMPT)) for _ in range(20)} == {
        tuple(tokenizer.encode("Th") + tokenizer.encode(PROMPT[2:]))
    }
    assert tokenizer.encode("Th") == [259]


@case("a special token that takes the white space around it, before 100,000 spaces")
def _(place: Place) -> None:
    tokens = added(259, "<|end|>", lstrip=True, rstrip=True)
    model = with_json(place, edited("added_tokens", to=tokens))
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    ids = place.tokenizer(model).encode_chat([{"role": "user", "content": "a" + " " * 100_000 + "b"}])
    assert ids[-1] == 259


@case("tokenizer.json beyond its limit of 64 MiB, though sparse")
def _(place: Place) -> None:
    model = with_json(place, byte_level())
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate(65 << 20)
    place.opened(model).refused(r"tokenizer\.json", "MiB")


@case("neither tokenizer.json nor tokenizer.model")
def _(place: Place) -> None:
    model = place.model()
    (model / "tokenizer.model").unlink()
    (model / "vocab.json").write_text("{}")
    place.opened(model).refused("neither tokenizer.json nor tokenizer.model")


def with_model(place: Place, content: bytes) -> Path:
    """Write the tiny LLaMA with other bytes for its tokenizer.model."""
    model = place.model()
    (model / "tokenizer.model").write_bytes(content)
    return model


@case("an empty tokenizer.model")
def _(place: Place) -> None:
    place.opened(with_model(place, b"")).refused(r"tokenizer\.model")


@case("a pointer of Git LFS instead of tokenizer.model")
def _(place: Place) -> None:
    place.opened(with_model(place, LFS_POINTER.encode())).refused(r"tokenizer\.model")


@case("tokenizer.model cut in half")
def _(place: Place) -> None:
    whole = (plain_model() / "tokenizer.model").read_bytes()
    place.opened(with_model(place, whole[: len(whole) // 2])).refused(r"tokenizer\.model")


@case("a piece of tokenizer.model that is not UTF-8")
def _(place: Place) -> None:
    whole, piece = (plain_model() / "tokenizer.model").read_bytes(), "▁must".encode()
    assert piece in whole
    model = with_model(place, whole.replace(piece, b"\xf4" * len(piece)))
    try:
        tokenizer = Tokenizer.load(model)
        tokenizer.decode(range(tokenizer.vocab_size)).encode()
        place.answers.append("taken")
    except TokenizerError:
        place.answers.append("refused")


@case("a tiktoken file called tokenizer.model, as Llama 3 has")
def _(place: Place) -> None:
    place.opened(with_model(place, b"IQ== 0\nIg== 1\nIw== 2\n" * 100)).refused(r"tokenizer\.model")


@case("the tokenizer.model of another model beside the right tokenizer.json")
def _(place: Place) -> None:
    model = place.model()
    (model / "tokenizer.json").write_text(json.dumps(byte_level()))
    assert place.tokenizer(model).encode("The") == [byte_level()["model"]["vocab"][sign] for sign in "The"]


def with_settings(place: Place, **changes: Any) -> Path:
    """Write the tiny LLaMA with keys of its tokenizer_config.json changed."""
    model = place.model()
    change_json(model / "tokenizer_config.json", changes)
    return model


@case("add_bos_token: false")
def _(place: Place) -> None:
    tokenizer = place.tokenizer(with_settings(place, add_bos_token=False))
    assert 1 not in tokenizer.start_ids


@case("an end-of-text token that the vocabulary lacks")
def _(place: Place) -> None:
    place.opened(with_settings(place, eos_token="<|im_end|>")).refused("end-of-text token")


@case("an end-of-text token of no letters")
def _(place: Place) -> None:
    assert place.tokenizer(with_settings(place, eos_token="")).eos_ids[:1] == (2,)


@case("a start token of no letters")
def _(place: Place) -> None:
    assert place.tokenizer(with_settings(place, bos_token="")).start_ids == [1]


@case("a start token in an object, as transformers 4 writes it")
def _(place: Place) -> None:
    written = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "special": True}
    place.opens_as_plain(with_settings(place, bos_token=written))


@case("a tokenizer class that transformers does not have")
def _(place: Place) -> None:
    model = with_settings(place, tokenizer_class="TokenizersBackend")
    assert place.tokenizer(model).encode(PROMPT) == Tokenizer.load(plain_model()).encode(PROMPT)


@case("an added word that tokenizer.model has no row for")
def _(place: Place) -> None:
    word = {"content": "<note>", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
    place.opened(with_settings(place, added_tokens_decoder={"8192": word})).refused("8192|8193")


@case("an added word of no letters")
def _(place: Place) -> None:
    place.opens_as_plain(with_settings(place, added_tokens_decoder={"5": {"content": "", "special": False}}))


@case("tokenizer_config.json and tokenizer.json that give one token two ids")
def _(place: Place) -> None:
    model = with_json(place, byte_level())
    change_json(model / "tokenizer_config.json", {"added_tokens_decoder": {"77": {"content": "<|end|>", "special": True}}})
    place.opened(model).refused("77", "same model")


@case("an array for tokenizer_config.json")
def _(place: Place) -> None:
    model = place.model()
    (model / "tokenizer_config.json").write_text("[]")
    place.opened(model).refused(r"tokenizer_config\.json", "object")


@case("add_bos_token given twice")
def _(place: Place) -> None:
    model = place.model()
    (model / "tokenizer_config.json").write_text('{"add_bos_token": true, "add_bos_token": false}')
    place.opened(model).refused(r"tokenizer_config\.json", "repeated|twice")


@case("a list for added_tokens.json")
def _(place: Place) -> None:
    model = place.model()
    (model / "added_tokens.json").write_text('["<note>"]')
    place.opened(model).refused(r"added_tokens\.json", "object")


@case("special_tokens_map.json cut in half")
def _(place: Place) -> None:
    model = place.model()
    (model / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s')
    place.opened(model).refused(r"special_tokens_map\.json")
