"""A tokenizer from a stranger takes no more time and memory than its size deserves, and every fault of it is one sentence."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgetune.runtime import tokenizer_libraries
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.tokenizer import LONGEST_STRETCH, Tokenizer, _stretches
from edgetune.runtime.tokenizer_limits import fault_of_sentencepiece, longest_replacement

DOUBLES = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def charsmap(*texts: bytes) -> bytes:
    """Return a sentencepiece character map with an empty trie that replaces by these texts."""
    return struct.pack("<I", 0) + b"\0".join(texts) + b"\0"


def added(content: str, id: Any = 31, special: Any = True) -> dict[str, Any]:
    return {"added_tokens": [{"id": id, "content": content, "special": special, **FLAGS}]}


def replaced(**changes: Any) -> dict[str, Any]:
    """Return tokenizer.json's model with changed keys."""
    vocab = {piece: id for id, piece in enumerate(["<unk>", *"ab▁"])}
    return {"model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": [], **changes}}


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "normalizers that double": ({"normalizer": sequence(*[DOUBLES] * 40)}, "more than 64 times longer"),
    "sequences in sequences": ({"normalizer": sequence(*[sequence(*[DOUBLES] * 10)] * 4)}, "more than 64 times longer"),
    "a regular expression that doubles": (
        {"normalizer": sequence(*[{**DOUBLES, "pattern": {"Regex": r"\x{71}"}}] * 40)},
        "more than 64 times longer",
    ),
    "two letters that feed each other": (
        {"normalizer": sequence(*[{**DOUBLES, "content": "bb"}, {**DOUBLES, "pattern": {"String": "b"}}] * 20)},
        "more than 64 times longer",
    ),
    "a replacement of 3 MB": ({"normalizer": {**DOUBLES, "content": "a" * 3_000_000}}, "more than 64 times longer"),
    "a prefix of 3 MB": ({"normalizer": {"type": "Prepend", "prepend": "a" * 3_000_000}}, "more than 64 times longer"),
    "a character map with a long text": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap(b"x" * 9999)).decode()}},
        "copy it again",
    ),
    "a special token of 3 MB": (added("<" * 3_000_000), "an added token of 3,000,000 characters"),
    "a piece of 3 MB": (replaced(vocab={"<unk>": 0, "a" * 3_000_000: 1}), "a piece of 3,000,000 characters"),
    "20,000 special tokens": (
        {"added_tokens": [added(f"<{n}>", 31 + n)["added_tokens"][0] for n in range(20_000)]},
        "20,000 added tokens",
    ),
    "an exponential expression": ({"pre_tokenizer": regex(r"(a|a)*$")}, "copy it again"),
    "another one, on white space": ({"pre_tokenizer": regex(r"(\s+)+$")}, "copy it again"),
    "an expression that is none": ({"pre_tokenizer": regex("(")}, "copy it again"),
    "no decoder": ({"decoder": None}, "decodes with nothing, which edgetune does not support"),
    "an empty decoder": ({"decoder": {"type": "Sequence", "decoders": []}}, "decodes with nothing"),
    "an id as text": (added("<x>", "31"), "copy it again"),
    "an id below zero": (added("<x>", -1), "copy it again"),
    "an id beyond 64 bits": (added("<x>", 1 << 70), "copy it again"),
    "special as text": (added("<x>", 31, "yes"), "copy it again"),
    "an id of the vocabulary as text": (replaced(vocab={"<unk>": "0", "a": "1"}), "copy it again"),
    "an id of the vocabulary beyond 32 bits": (replaced(vocab={"<unk>": 0, "a": 1 << 33}), "copy it again"),
    "an id of the vocabulary out of reach": (replaced(vocab={"<unk>": 0, "a": 4_000_000_000}), "token ids, expected 1 to"),
    "merges of numbers": (replaced(merges=[[1, 2]]), "copy it again"),
    "no model": ({"model": None}, "copy it again"),
    "a model of another type": ({"model": {"type": "Nothing"}}, "copy it again"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_json_is_one_sentence_at_once(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes, expected = HOSTILE[name]
    tiny.save_letters(tmp_path, **changes)
    start = time.monotonic()
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(tmp_path)
    assert time.monotonic() - start < 5
    sentence = str(caught.value)
    assert expected in sentence
    assert "\n" not in sentence
    assert len(sentence) < 500
    assert capfd.readouterr().err == ""  # a panic in Rust prints a report of its own


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "NFKC"},
        sequence({"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
        sequence(*({"type": "Replace", "pattern": {"String": sign}, "content": "..."} for sign in "…‥⋯⋮‧․")),
    ],
)
def test_normalizers_in_use_are_taken(normalizer: dict[str, Any], tmp_path: Path) -> None:
    tiny.save_letters(tmp_path, normalizer=normalizer)
    assert Tokenizer.load(tmp_path).encode("a.")


@pytest.mark.parametrize("strip", ["lstrip", "rstrip"])
def test_a_token_that_takes_white_space_is_found_in_linear_time(strip: str, tmp_path: Path) -> None:
    token = {"id": 2, "content": "</s>", "special": True, **FLAGS, strip: True}
    tiny.save_letters(tmp_path, added_tokens=[token])
    template = "{% for m in messages %}{{ m.content }}</s>  a{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    ours = Tokenizer.load(tmp_path)
    start = time.monotonic()
    ids = ours.encode_chat([{"role": "user", "content": "a" + " " * 60_000 + "b" + "  "}])
    assert time.monotonic() - start < 5
    space, a, b = (ours._library.id_of(piece) for piece in "▁ab")
    assert ids[-6:] == ([space, b, 2, space, space, a] if strip == "lstrip" else [space, b, space, space, 2, a])


def test_a_long_run_of_white_space_is_cut() -> None:
    text = "a" + " " * 100_000 + "b"
    parts = list(_stretches(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 2049
    words = "long words " * 20_000
    assert "".join(_stretches(words)) == words
    letters = "日本" * 50_000
    assert [len(part) for part in _stretches(letters)] == [LONGEST_STRETCH] * 3 + [100_000 - 3 * LONGEST_STRETCH]


def test_a_quadratic_expression_ends_in_time(tmp_path: Path) -> None:
    tiny.save_letters(tmp_path, pre_tokenizer=regex(r"\s+$"))
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}')
    ours, start = Tokenizer.load(tmp_path), time.monotonic()
    ours.encode("a" + " " * 100_000 + "b")  # whole, it would take 45 s
    assert time.monotonic() - start < 10


def test_a_panic_inside_the_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """Like pyo3_runtime.PanicException, which is no Exception either."""

    class Panics:
        def encode(self, *args: Any, **others: Any) -> None:
            raise PanicException("index out of bounds in: a secret")

    tiny.save_letters(tmp_path)
    ours = Tokenizer.load(tmp_path)
    monkeypatch.setattr(ours._library, "_continuation_tokenizer", lambda inside: Panics())
    with pytest.raises(TokenizerError, match="copy it again from its publisher") as caught:
        ours._encode("a", first=False)
    assert "secret" not in str(caught.value)


def test_an_interrupt_inside_the_library_stays_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), tokenizer_libraries.one_sentence("no"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("id", ["9" * 5000, "٣", "-1", "1e3", "²"])
def test_odd_ids_in_tokenizer_config_are_passed_over(id: str, tmp_path: Path) -> None:
    tiny.save_letters(tmp_path)
    config = {"eos_token": "</s>", "added_tokens_decoder": {id: {"content": "c"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).eos_ids == (2,)


def test_a_declared_token_of_3_mb_is_refused(tmp_path: Path) -> None:
    tiny.save_letters(tmp_path)
    config = {"eos_token": "</s>", "added_tokens_decoder": {"31": {"content": "<" * 3_000_000, "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="3,000,000 characters"):
        Tokenizer.load(tmp_path)


# --- tokenizer.model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a man, a plan, a canal: panama"] * 9),
        model_writer=made,
        vocab_size=24,
        model_type="bpe",
        normalization_rule_name="nfkc",
        minloglevel=2,
    )
    return made.getvalue()


def test_the_character_map_of_sentencepiece_is_within_its_limit(model: bytes, tmp_path: Path) -> None:
    assert fault_of_sentencepiece(model) is None
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert Tokenizer.load(tmp_path).encode("a plan")


def test_a_character_map_that_makes_texts_long_is_refused(model: bytes, tmp_path: Path) -> None:
    spec = b"\x12" + varint(len(charsmap(b"x" * 9999))) + charsmap(b"x" * 9999)
    (tmp_path / "tokenizer.model").write_bytes(model + b"\x1a" + varint(len(spec)) + spec)
    with pytest.raises(TokenizerError, match=r"64 times longer|not a sentencepiece model"):
        Tokenizer.load(tmp_path)
    assert longest_replacement(charsmap(b"ab", b"abc")) == 3


def varint(value: int) -> bytes:
    done = b""
    while value > 127:
        done, value = done + bytes([value & 127 | 128]), value >> 7
    return done + bytes([value])


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "a pointer of git-lfs": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    "half": lambda data: data[: len(data) // 2],
    "a length beyond the end": lambda data: b"\x0a\xff\xff\xff\xff\x0f" + data,
    "a number without an end": lambda data: data + b"\x1a" + b"\xff" * 12,
    "a group": lambda data: b"\x0b" + data,
    "zeros": lambda data: bytes(1000),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_sentencepiece_model_is_one_sentence(how: str, model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(BROKEN[how](model))
    with pytest.raises(TokenizerError, match="is not a sentencepiece model; copy it again"):
        Tokenizer.load(tmp_path)
