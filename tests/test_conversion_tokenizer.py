"""The tokenizer of a GGUF file gives, as a Hugging Face folder, the ids that llama.cpp and its original give."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from edgetune.conversion.tokenizer import tokenizer_files, tokenizer_notices
from edgetune.export.gguf.pre_tokenizers import SPLIT_OF, SPLITS, PreTokenizer, split_of
from edgetune.export.gguf.vocabulary import PUBLISHED_SPLITS, Vocabulary, read_vocabulary
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "edgetune" / "demo"
PROBES = [
    "",
    "a",
    "The lighthouse keeper wrote it down, and he didn't stop: they'RE, I'LL, it's, 'S 're 'x.",
    "Größe, façade, die Straße übt Gemütlichkeit; ÄÖÜ. ÉCOLEÉté camelCase HTTPServer",
    "Zażółć gęślą jaźń — Łódź, Kraków, ŚWIĘTO. ПриветМир",
    "今天天气很好，我们去公园散步吧。日本語の文章です。カタカナ",
    "مرحبا بالعالم، كيف حالك؟ اَلسَّلَامُ हिन्दी में लिखा ภาษาไทย 한국어",
    "👩‍👩‍👧‍👦 🇩🇪 😀👍🏽 ❤️",
    "def f(x):\n\tif x:\n\t\treturn [x**2, 'y']  # ok\n    \n\n\treturn None\n",
    "1 12 123 1234 12345 1234567 1,234,567.89 ½ Ⅷ ١٢٣",
    "trailing ",
    "trailing  \n",
    "a\n\nb\n\n\nc\r\nd\r\n\r\ne",
    "a" + " " * 17 + "b" + " " * 33 + "c\t\t d",
    unicodedata.normalize("NFD", "Größe façade ÄÖÜ éèê Zażółć gęślą jaźń"),
    "a\u200bb\u200d\ufeff\u00adx\u2028y\u2029z\u0085q\u00a0w  \u3000v\u1680 ",
    "\x00\x01\x7f\ufffd\U0010ffff𝔘𝔫 𐐷",
    "http://example.com/a?b=c&d=%20#e `foo_bar`-baz+qux=1e-5 <=> {[(|)]} $x^2~",
    "-" * 37 + "=" * 21 + "x" * 30,
    "| a | 10 |\n|---|---:|\n| b  |  2 |\n",
]
"""Texts that must become the same ids everywhere. None begins with a space, where readers of sentencepiece differ."""
SPACED = [" ", "  ", " leading", "  leading two", "\n", "\r\n", " \n ", "\t", " ▁ ▁▁"]
"""Texts that begin with white space."""
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPELLED = ["a<|im_end|>b <|im_start|>user\n", "<|endoftext|>", "x <think>  y</think> z<think>", "<|im_end|><|im_end|> "]
"""Texts that spell control tokens and user-defined ones."""
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "Spell  <|im_end|> for me,\nplease."}]


@pytest.fixture(scope="session")
def merged() -> tuple[list[str], list[str]]:
    """Train byte-level BPE that merges across words, so that every split of a text shows in the ids. Returns tokens, merges."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([text for text in PROBES for _ in range(3)], trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(merge) for merge in model["merges"]]


def byte_level(merged: tuple[list[str], list[str]], split: str, **more: Any) -> dict[str, Any]:
    """Return the metadata of a GGUF file with a byte-level BPE; `more` are keys tokenizer.ggml.… without their prefix."""
    tokens, merges = merged
    size = len(tokens)
    values = {
        "model": "gpt2",
        "pre": split,
        "tokens": [*tokens, *CONTROL, "<think>"],
        "token_type": [1] * size + [3, 3, 3, 4],
        "merges": merges,
        "bos_token_id": size + 1,
        "eos_token_id": size + 2,
        "padding_token_id": size,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def sentencepiece(folder: Path) -> dict[str, Any]:
    """Return the metadata of the GGUF file that edgetune exports for a model folder with a sentencepiece tokenizer."""
    vocabulary = read_vocabulary(folder, Tokenizer.load(folder).vocab_size)
    return as_metadata(vocabulary)


def as_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the metadata that an exported vocabulary becomes in a GGUF file."""
    values = {
        "model": vocabulary.model,
        "pre": vocabulary.pre,
        "tokens": vocabulary.tokens,
        "scores": vocabulary.scores if vocabulary.model == "llama" else None,
        "token_type": vocabulary.types,
        "merges": vocabulary.merges or None,
        "add_bos_token": vocabulary.adds_bos,
        "add_space_prefix": vocabulary.adds_space,
        **{f"{name}_token_id": id for name, id in vocabulary.ids.items()},
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return metadata | ({"tokenizer.chat_template": vocabulary.template} if vocabulary.template else {})


def converted(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    """Write the files of a tokenizer and open them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer_files(metadata).items():
        (folder / name).write_bytes(data)
    return Tokenizer.load(folder)


def llama_cpp_model(path: Path, metadata: dict[str, Any]) -> Any:
    """Open a tokenizer in llama.cpp itself; skip the test where it is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif key != "general.architecture":
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def llama_cpp_ids(model: Any, text: str, special: bool = False) -> list[int]:
    """Return llama.cpp's ids of a text; `special`: control tokens that it spells are control tokens."""
    ids: list[int] = model.tokenize(text.encode(), add_bos=False, special=special) if text else []
    return ids


def plain_ids(folder: Path, text: str, special: bool) -> list[int]:
    """Return the ids that the library tokenizers alone gives for a text."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = not special
    ids: list[int] = library.encode(text, add_special_tokens=False).ids
    return ids


# --- llama.cpp ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", SPLIT_OF)
def test_llama_cpp_gives_the_same_ids_for_every_split(merged: tuple[list[str], list[str]], tmp_path: Path, pre: str) -> None:
    metadata = byte_level(merged, pre)
    theirs = llama_cpp_model(tmp_path / "vocabulary.gguf", metadata)
    ours = converted(tmp_path / "folder", metadata)
    texts = PROBES + SPACED + SPELLED
    assert [text for text in texts if ours.encode(text) != llama_cpp_ids(theirs, text)] == []
    assert ours.start.adds_bos == (theirs.tokenize(b"a", add_bos=True)[0] == ours.bos_id)
    for text in SPELLED:
        assert plain_ids(tmp_path / "folder", text, special=True) == llama_cpp_ids(theirs, text, special=True)


@pytest.mark.parametrize("adds_space", [True, False])
def test_llama_cpp_gives_the_same_ids_for_sentencepiece(tmp_path: Path, adds_space: bool) -> None:
    metadata = sentencepiece(DEMO) | {"tokenizer.ggml.add_space_prefix": adds_space}
    theirs = llama_cpp_model(tmp_path / "vocabulary.gguf", metadata)
    ours = converted(tmp_path / "folder", metadata)
    texts = [*PROBES, *SPACED, "▁▁ ▁a", "<0x0A>", "x</s> y"]
    assert [text for text in texts if ours.encode(text) != llama_cpp_ids(theirs, text)] == []
    for text in ["a</s>b<s> c", "<s>", "<s></s> x\n"]:
        assert plain_ids(tmp_path / "folder", text, special=True) == llama_cpp_ids(theirs, text, special=True)
    rendered = ours.encode_chat([{"role": "user", "content": "Tell  me."}])
    assert rendered == llama_cpp_ids(theirs, ours.render_chat([{"role": "user", "content": "Tell  me."}]), special=True)


def test_llama_cpp_stops_at_the_same_tokens(merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    more = [
        "<|eot_id|>",
        "<|eom_id|>",
        "</s>",
        "<end_of_turn>",
        "<fim_pad>",
        "<reponame>",
        "<|file_sep|>",
        "<fim_prefix>",
        "<x>",
    ]
    calls = ["<|end|>", "<|return|>", "<|call|>"]
    for extra in more, more[:2], [*more, *calls], calls[:2]:
        metadata = byte_level(merged, "qwen2")
        metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"] + extra
        metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"] + [4] * len(extra)
        theirs = llama_cpp_model(tmp_path / "vocabulary.gguf", metadata)
        vocab = theirs._model.vocab  # a pointer, valid as long as the model
        files = tokenizer_files(metadata)
        ends = json.loads(files["generation_config.json"])["eos_token_id"]
        ids = range(len(metadata["tokenizer.ggml.tokens"]))
        assert sorted(ends) == [id for id in ids if llama_cpp.llama_vocab_is_eog(vocab, id)]
        assert ends[0] == metadata["tokenizer.ggml.eos_token_id"]
        special = {token["id"] for token in json.loads(files["tokenizer.json"])["added_tokens"] if token["special"]}
        assert special >= {id for id in ids if llama_cpp.llama_vocab_is_control(vocab, id)}


# --- the original tokenizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-2", "smollm"])
def test_the_ids_are_those_of_the_publishers_tokenizer(merged: tuple[list[str], list[str]], tmp_path: Path, name: str) -> None:
    ours = converted(tmp_path, byte_level(merged, name))
    original = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    byte_level_only = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    regex = next((regex for regex, split in PUBLISHED_SPLITS.items() if split == name), None)
    first = [tokenizers.pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    if regex is not None:
        first = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")]
    original.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*first, byte_level_only])
    texts = PROBES + SPACED
    assert [text for text in texts if original.encode(text, add_special_tokens=False).ids != ours.encode(text)] == []


def test_the_demos_sentencepiece_tokenizer_comes_back(tmp_path: Path) -> None:
    original, ours = Tokenizer.load(DEMO), converted(tmp_path, sentencepiece(DEMO))
    assert [text for text in PROBES if original.encode(text) != ours.encode(text)] == []
    assert [text for text in PROBES if ours.decode(ours.encode(text)) != text] == []
    assert (ours.bos_id, ours.eos_ids[0], ours.start) == (original.bos_id, original.eos_ids[0], original.start)
    assert ours.encode_chat(CHAT) == original.encode_chat(CHAT)
    # llama.cpp puts a space before a text that begins with one, as sentencepiece does and transformers does not.
    assert ours.encode(" leading") != original.encode(" leading")


def test_llama_2s_tokenizer_comes_back(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "llama2_tokenizer"
    original, ours = Tokenizer.load(folder), converted(tmp_path, sentencepiece(folder))
    assert [text for text in PROBES if original.encode(text) != ours.encode(text)] == []
    library = pytest.importorskip("sentencepiece").SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert [text for text in PROBES + SPACED if library.encode(text) != ours.encode(text)] == []
    assert (ours.bos_id, ours.eos_ids, ours.start) == (original.bos_id, original.eos_ids, original.start)


def test_transformers_reads_the_same_ids(merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for kind, metadata in {
        "llama": sentencepiece(DEMO),
        "qwen2": byte_level(merged, "qwen2"),
        "qwen3": byte_level(merged, "qwen2"),
        "granite": byte_level(merged, "refact"),
        "smollm3": byte_level(merged, "smollm"),
        "mistral": byte_level(merged, "tekken"),
        "gemma3_text": sentencepiece(DEMO) | {"tokenizer.ggml.add_space_prefix": False},
        "phi3": byte_level(merged, "gpt-4o", add_bos_token=True),
    }.items():
        ours = converted(tmp_path / kind, metadata | {"tokenizer.chat_template": TEMPLATE})
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / kind, local_files_only=True)
        # transformers composes accents (NFC) for every model of this kind, whatever tokenizer.json says; llama.cpp does not.
        composes = kind == "qwen2"
        texts = [text for text in PROBES + SPACED if not composes or unicodedata.is_normalized("NFC", text)]
        plain = {text: theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts}
        assert [text for text in texts if plain[text] != ours.encode(text)] == [], kind
        assert theirs("a")["input_ids"] == [*ours.start.chat, *ours.encode("a")]
        chat = [{"role": "user", "content": "Tell  me,\nplease."}]
        rendered = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert list(rendered) == ours.encode_chat(chat), kind


def test_a_text_cut_in_stretches_gets_no_space_at_the_cuts(tmp_path: Path) -> None:
    ours = converted(tmp_path, sentencepiece(DEMO))
    words, blanks = "water the tomatoes " * 3000, "x" + "\n" * 5000 + "y"
    for text in words, blanks, words + blanks:
        assert ours.encode(text) == plain_ids(tmp_path, text, special=False)


def test_a_user_defined_token_is_decoded_as_it_is_spelled(merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    metadata = byte_level(merged, "deepseek-llm")
    types = metadata["tokenizer.ggml.token_type"]
    for letter in "öü":  # bytes that no UTF-8 text of the publisher's held, taken for letters by its own converter
        types[metadata["tokenizer.ggml.tokens"].index(letter)] = 4
    ours = converted(tmp_path, metadata)
    assert ours.decode(ours.encode("schön und grün")) == "schön und grün"


# --- special tokens, templates, settings --------------------------------------------------------------------------------


def test_a_note_that_spells_a_control_token_stays_text(merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    ours = converted(tmp_path, byte_level(merged, "smollm") | {"tokenizer.chat_template": TEMPLATE})
    control = {ours.vocab_size - 4 + n for n in range(3)}
    for text in SPELLED:
        assert control.isdisjoint(ours.encode(text))
        assert ours.decode(ours.encode(text)) == text
    ids = ours.encode_chat(CHAT)
    assert [id for id in ids if id in control] == [ours.bos_id, ours.eos_ids[0], ours.bos_id]


def test_a_text_begins_as_the_file_says(merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    size = len(merged[0])
    for n, (pre, adds, text, chat) in enumerate(
        [
            ("smollm", None, (size,), ()),  # the end-of-text token stands between texts where no bos is added
            ("smollm", True, (size + 1,), (size + 1,)),
            ("llama-bpe", None, (size + 1,), (size + 1,)),
            ("llama-bpe", False, (size,), ()),
        ]
    ):
        start = converted(tmp_path / str(n), byte_level(merged, pre, add_bos_token=adds)).start
        assert (start.text, start.chat) == (text, chat)


def test_phi_3s_control_tokens_take_the_white_space_after_them(merged: tuple[list[str], list[str]]) -> None:
    metadata = byte_level(merged, "gpt-2")
    for name, takes in ("Phi-3 mini", True), ("Phi3", True), ("SmolLM2", False):
        added = json.loads(tokenizer_files(metadata | {"general.name": name})["tokenizer.json"])["added_tokens"]
        assert {token["content"]: token["rstrip"] for token in added} == {
            "<|endoftext|>": False, "<|im_start|>": takes, "<|im_end|>": takes, "<think>": takes,
        }  # fmt: skip


def test_the_default_chat_template_is_used(merged: tuple[list[str], list[str]]) -> None:
    metadata = byte_level(merged, "qwen2")
    assert "chat_template.jinja" not in tokenizer_files(metadata)
    tool = {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_template.rag": "rag"}
    default = {"tokenizer.chat_template": TEMPLATE}
    assert tokenizer_files(metadata | tool | default)["chat_template.jinja"] == TEMPLATE.encode()
    assert tokenizer_notices(metadata | tool | default) == ["The GGUF file has 2 more chat templates; the default one is used."]
    assert "chat_template.jinja" not in tokenizer_files(metadata | tool)
    assert "none is used" in tokenizer_notices(metadata | tool)[0]
    assert tokenizer_files(metadata | {"tokenizer.chat_template.x": "only"})["chat_template.jinja"] == b"only"


def test_an_unnamed_split_is_llama_cpps_default_and_said(merged: tuple[list[str], list[str]]) -> None:
    unnamed, default = byte_level(merged, "default", pre=None), byte_level(merged, "default")
    assert tokenizer_files(unnamed) == tokenizer_files(default)
    assert "does not say how its tokenizer splits texts" in tokenizer_notices(unnamed)[0]
    assert tokenizer_notices(default) == []


def test_sampling_settings_become_those_of_generation_config(merged: tuple[list[str], list[str]]) -> None:
    sampling = {"temp": 0.5, "top_k": 40, "top_p": 0.75, "min_p": float("nan"), "penalty_repeat": "x", "mirostat": 2}
    metadata = byte_level(merged, "qwen2") | {f"general.sampling.{key}": value for key, value in sampling.items()}
    content = json.loads(tokenizer_files(metadata)["generation_config.json"])
    size = len(merged[0])
    assert content == {
        "bos_token_id": size + 1, "pad_token_id": size, "eos_token_id": [size + 2, size],
        "temperature": 0.5, "top_k": 40, "top_p": 0.75, "do_sample": True,
    }  # fmt: skip


def test_an_export_names_the_split_of_a_converted_folder(merged: tuple[list[str], list[str]], tmp_path: Path) -> None:
    for name in SPLITS:
        assert split_of(PreTokenizer(name).as_json()) == name
        converted(tmp_path / name, byte_level(merged, name))
        assert read_vocabulary(tmp_path / name, 4000).pre == name
    assert split_of({"type": "Metaspace"}) is None


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model": None}, "nothing under tokenizer.ggml.model, expected text"),
        ({"model": "t5"}, "kind 't5', which edgetune cannot convert"),
        ({"model": "gemma4"}, "kind 'gemma4'"),
        ({"model": "bert"}, "kind 'bert'"),
        ({"model": 7}, "int under tokenizer.ggml.model"),
        ({"pre": "kimi-k2"}, "in the way 'kimi-k2', which edgetune cannot reproduce"),
        ({"pre": "x" * 100_000}, "in the way 'xxxxxxxxxxxxxxx"),
        ({"tokens": None}, "no list under tokenizer.ggml.tokens"),
        ({"tokens": []}, "has no tokens"),
        ({"tokens": "abc"}, "no list under tokenizer.ggml.tokens"),
        ({"tokens": ["a", 7]}, "no text under tokenizer.ggml.tokens"),
        ({"tokens": ["a", "\udc80"]}, "not UTF-8 under tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a"]}, "1 tokens twice"),
        ({"tokens": ["a" * 5000]}, "a token of 5,000 characters, expected at most 4,096"),
        ({"token_type": [1, 3]}, "2 items under tokenizer.ggml.token_type, expected"),
        ({"token_type": 1}, "no list under tokenizer.ggml.token_type"),
        ({"merges": None}, "no list under tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "merges under tokenizer.ggml.merges that are no pair of its tokens"),
        ({"merges": ["a ☃"]}, "merges under tokenizer.ggml.merges that are no pair of its tokens"),
        ({"eos_token_id": 2.0}, "2.0 under tokenizer.ggml.eos_token_id, expected an id from 0 to"),
        ({"bos_token_id": -1, "add_bos_token": True}, "lacks the key tokenizer.ggml.bos_token_id"),
        ({"bos_token_id": True}, "True under tokenizer.ggml.bos_token_id"),
        ({"bos_token_id": None, "add_bos_token": True}, "lacks the key tokenizer.ggml.bos_token_id"),
        ({"add_bos_token": "yes"}, "str under tokenizer.ggml.add_bos_token, expected bool"),
        ({"model": "llama"}, "no list under tokenizer.ggml.scores"),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(merged: tuple[list[str], list[str]], changes: dict[str, Any], found: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        tokenizer_files(byte_level(merged, "qwen2", **changes))
    message = str(caught.value)
    assert found in message
    assert "\n" not in message
    assert len(message) < 400
    assert message.endswith(".")


@pytest.mark.parametrize("beyond", [2**32 - 1, -1, 1 << 20])
def test_an_id_beyond_the_tokens_counts_as_missing_as_in_llama_cpp(
    merged: tuple[list[str], list[str]], tmp_path: Path, beyond: int
) -> None:
    byte_files = tokenizer_files(byte_level(merged, "qwen2", padding_token_id=beyond, eot_token_id=beyond))
    plain = byte_level(merged, "qwen2")
    for key in "padding", "eot":
        plain.pop(f"tokenizer.ggml.{key}_token_id", None)
    assert byte_files == tokenizer_files(plain)
    assert "pad_token" not in json.loads(byte_files["tokenizer_config.json"])
    named = {f"tokenizer.ggml.{key}_token_id": beyond for key in ("bos", "eos", "unknown")}
    generation = json.loads(tokenizer_files(sentencepiece(DEMO) | named)["generation_config.json"])
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, [2])


def test_a_token_type_that_is_none_is_refused(merged: tuple[list[str], list[str]]) -> None:
    types = byte_level(merged, "qwen2")["tokenizer.ggml.token_type"]
    for bad in 99, -1, 1.0, "1":
        with pytest.raises(TokenizerError, match="no types, expected whole numbers from 1 to 6"):
            tokenizer_files(byte_level(merged, "qwen2", token_type=[bad, *types[1:]]))


def test_a_sentencepiece_vocabulary_is_checked() -> None:
    metadata = sentencepiece(DEMO)
    scores, tokens = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.tokens"]
    for changes, found in (
        ({"scores": [float("nan"), *scores[1:]]}, "no numbers"),
        ({"scores": scores[1:]}, "items under tokenizer.ggml.scores, expected 8,192, one for each token"),
        ({"tokens": [token.replace("<0x0A>", "<0x0G>") for token in tokens]}, "lacks some of the 256 byte tokens"),
        ({"tokens": [f"{n:04000}" if n > 5000 else token for n, token in enumerate(tokens)]}, "too many long tokens"),
    ):
        with pytest.raises(TokenizerError, match=found):
            tokenizer_files(metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    types = metadata["tokenizer.ggml.token_type"]
    many = {"tokens": tokens + [f"<{n}>" for n in range(20_000)], "token_type": types + [4] * 20_000}
    with pytest.raises(TokenizerError, match="control and user-defined tokens, expected at most 16,384"):
        tokenizer_files(metadata | {f"tokenizer.ggml.{key}": value for key, value in many.items()})


def test_a_chat_template_that_is_no_text_is_refused(merged: tuple[list[str], list[str]]) -> None:
    for template, found in (7, "no text"), ("\udc80", "not UTF-8"), ("x" * (5 << 20), "5 MiB as chat_template.jinja"):
        with pytest.raises(TokenizerError, match=found):
            tokenizer_files(byte_level(merged, "qwen2") | {"tokenizer.chat_template": template})


# --- real tokenizers ----------------------------------------------------------------------------------------------------


def read_metadata(path: Path) -> dict[str, Any]:
    """Read a GGUF file's metadata with the library gguf, strings and lists as the keys hold them."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if key.startswith(("tokenizer.", "general."))}


@pytest.mark.real
def test_smollm2s_tokenizer_is_llama_cpps_and_transformers(tmp_path: Path, smollm2: Path) -> None:
    metadata = read_metadata(smollm2)
    ours = converted(tmp_path, metadata)
    assert (ours.bos_id, ours.pad_id, ours.eos_ids) == (1, 2, (2, 0, 4))
    assert (ours.start.text, ours.start.chat) == ((0,), ())
    theirs = pytest.importorskip("llama_cpp").Llama(str(smollm2), vocab_only=True, verbose=False)
    texts = [*PROBES, *SPACED, *SPELLED]
    assert [text for text in texts if ours.encode(text) != llama_cpp_ids(theirs, text)] == []
    chat = [{"role": "user", "content": "Name a  fruit."}, {"role": "assistant", "content": "Fig."}, CHAT[0]]
    rendered = ours.render_chat(chat[:2])
    assert ours.encode_chat(chat[:2]) == llama_cpp_ids(theirs, rendered, special=True)
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 49152}')
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert [text for text in texts if reader(text, split_special_tokens=True)["input_ids"] != ours.encode(text)] == []
    assert reader.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == ours.render_chat(chat)


def vocabularies() -> list[Path]:
    """Return llama.cpp's own vocabularies, in the folder that EDGETUNE_TEST_VOCABULARIES names."""
    folder = os.environ.get("EDGETUNE_TEST_VOCABULARIES")
    return sorted(Path(folder).glob("ggml-vocab-*.gguf")) if folder else []


NOT_CONVERTED = {"bert", "t5", "gemma4"}


@pytest.mark.slow
@pytest.mark.skipif(not vocabularies(), reason="EDGETUNE_TEST_VOCABULARIES names no folder of llama.cpp's ggml-vocab-*.gguf")
@pytest.mark.parametrize("path", vocabularies(), ids=lambda path: path.stem)
def test_real_vocabularies_give_llama_cpps_ids(tmp_path: Path, path: Path) -> None:
    metadata = read_metadata(path)
    if metadata["tokenizer.ggml.model"] in NOT_CONVERTED:
        with pytest.raises(TokenizerError, match="which edgetune cannot convert"):
            tokenizer_files(metadata)
        return
    ours = converted(tmp_path, metadata)
    inputs, outputs = path.with_suffix(".gguf.inp"), path.with_suffix(".gguf.out")
    if inputs.exists():  # llama.cpp's own test: texts, and the ids that the publisher's tokenizer gives them
        texts = inputs.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        published = [[int(id) for id in line.split()] for line in outputs.read_text().splitlines()]
        assert [
            text for text, ids in zip(texts, published, strict=False) if plain_ids(tmp_path, text, special=False) != ids
        ] == []
    theirs = pytest.importorskip("llama_cpp").Llama(str(path), vocab_only=True, verbose=False)
    texts = [*PROBES, *SPACED, "a<|im_end|>b<|eot_id|> <s></s><unk>\n"]
    assert [text for text in texts if ours.encode(text) != llama_cpp_ids(theirs, text)] == []
    assert ours.eos_ids[0] == metadata["tokenizer.ggml.eos_token_id"]
