"""What a text begins with is the same in training, prompts, chats and exports, and is what the model's files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

import edgetune
from edgetune.dataset.pieces import CONTEXT
from edgetune.dataset.token_store import tokenize
from edgetune.documents.chat_forms import guanaco_text
from edgetune.documents.document import Document, Turn
from edgetune.export.gguf.vocabulary import read_vocabulary
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.start_tokens import StartTokens, start_tokens
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.training.samples import prompt_ids

DEMO = Path(edgetune.__file__).parent / "demo"
CHAT = "{% for m in messages %}{{ m.role + '. ' + m.content }}{% endfor %}"
UNK, BOS, EOS = range(3)
WITH_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST["chat_template"] = CHAT
LLAMA = {**FAST, "tokenizer_class": "LlamaTokenizer"}


def letters(folder: Path, config: dict[str, Any], model: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a folder with the tokenizer of tiny.save_letters, its tokenizer_config.json and its config.json."""
    tiny.save_letters(folder, **changes)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 31, **(model or {})}))
    return folder


@pytest.mark.parametrize(
    ("config", "post_processor", "expected"),
    [
        (LLAMA, None, StartTokens((BOS,), (BOS,))),
        ({**LLAMA, "add_bos_token": False}, None, StartTokens((EOS,))),
        ({**LLAMA, "add_bos_token": False}, WITH_BOS, StartTokens((EOS,))),
        (FAST, None, StartTokens((EOS,))),
        (FAST, WITH_BOS, StartTokens((BOS,), (BOS,))),
        ({**FAST, "add_bos_token": True}, None, StartTokens((BOS,), (BOS,))),
        ({**FAST, "add_bos_token": False}, WITH_BOS, StartTokens((EOS,))),
        ({**FAST, "add_bos_token": "no"}, WITH_BOS, StartTokens((BOS,), (BOS,))),
        ({**FAST, "bos_token": None}, None, StartTokens((EOS,))),
        ({**FAST, "bos_token": ""}, WITH_BOS, StartTokens((BOS,), (BOS,))),
        ({**LLAMA, "bos_token": "", "eos_token": "", "unk_token": ""}, None, StartTokens((BOS,), (BOS,))),
        ({**FAST, "eos_token": "<s>"}, None, StartTokens((EOS,))),  # </s> still stands between texts
    ],
)
def test_the_files_decide_what_texts_begin_with(
    tmp_path: Path, config: dict[str, Any], post_processor: Any, expected: StartTokens
) -> None:
    ours = Tokenizer.load(letters(tmp_path / "m", config, post_processor=post_processor))
    assert ours.start == expected


def test_a_model_whose_bos_begins_turns_begins_notes_with_the_end_of_text() -> None:
    smollm2 = {"bos_token": "<|im_start|>"}
    assert start_tokens(smollm2, bos=1, leading=(), llama=False, text_ends=(0, 2)) == StartTokens((0,))


def test_training_prompts_chats_and_exports_begin_alike(tmp_path: Path) -> None:
    turns = (Turn("user", "why"), Turn("assistant", "so"))
    documents = [Document.of("a.md", "rain"), Document.of("c.jsonl#1", guanaco_text(turns), turns)]
    for name, setting in (("adds", True), ("adds not", False)):
        folder = letters(tmp_path / name, {**LLAMA, "add_bos_token": setting})
        ours = Tokenizer.load(folder)
        store = tokenize(documents, ours, tmp_path / f"{name} store")
        note, chat = (store.ids[document.start :][: document.tokens] for document in store.documents)
        assert note[0] == (BOS if setting else EOS)
        assert bool(chat[0] == BOS) is setting
        assert store.trained[store.documents[1].start] == CONTEXT
        asked = [{"role": "user", "content": "why"}]
        ids = ours.encode_chat(asked)
        assert ours.chat_ids(asked) == prompt_ids(asked, ours) == ([BOS, *ids] if setting else ids)
        assert ours.prompt_ids("rain") == prompt_ids("rain", ours) == note[:-1].tolist()
        assert ours.start.before_chat([BOS, *ids]) == [BOS, *ids]


def test_gguf_says_what_training_used(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for setting in (True, False):
        folder = shutil.copytree(DEMO, tmp_path / str(setting), ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": setting}))
        assert read_vocabulary(folder, 8192).adds_bos is setting
        assert Tokenizer.load(folder).start_ids == ([BOS] if setting else [EOS])


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_named_token_that_is_missing_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(TokenizerError, match=r"names an? .*-of-text token that is missing from its vocabulary; take"):
        Tokenizer.load(letters(tmp_path / "m", {**FAST, name: "<nowhere>"}))


def test_ids_of_config_json_that_contradict_the_names_do_not_end_a_text(tmp_path: Path) -> None:
    """LLaMA 1, as it was first converted, had names of "" and the ids 0 for bos and 1 for eos."""
    config = {"bos_token": "", "eos_token": "", "unk_token": ""}
    folder = letters(tmp_path / "m", {**LLAMA, **config}, {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1})
    ours = Tokenizer.load(folder)
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (BOS, (EOS,), None)


# --- ids without a row in the embedding --------------------------------------------------------------------------------


def added(spelling: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": 31, "content": spelling, "special": special, **flags}


def with_added(folder: Path, token: dict[str, Any], config: dict[str, Any]) -> Path:
    letters(folder, config)
    made = json.loads((folder / "tokenizer.json").read_text())
    made["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize(
    ("token", "config"),
    [
        (added("<note>", special=False), FAST),
        (added("<|end|>", special=True), {**FAST, "chat_template": "{{ messages[0].content }}<|end|>"}),
    ],
)
def test_a_token_that_texts_or_chats_can_give_needs_a_row(
    tmp_path: Path, token: dict[str, Any], config: dict[str, Any]
) -> None:
    with pytest.raises(TokenizerError, match="gives the id 31 to a token, but the model's embedding has only 31 rows; take"):
        Tokenizer.load(with_added(tmp_path / "m", token, config))


def test_an_end_token_without_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="end-of-text token that is missing"):
        Tokenizer.load(with_added(tmp_path / "m", added("<end>", special=True), {**FAST, "eos_token": "<end>"}))


def test_a_pad_token_without_a_row_is_left_out(tmp_path: Path) -> None:
    """Many LLaMA models have such a token; no text and no chat gives it."""
    ours = Tokenizer.load(with_added(tmp_path / "m", added("<pad>", special=True), {**FAST, "pad_token": "<pad>"}))
    assert ours.pad_id is None
    ids = ours.encode_chat([{"role": "user", "content": "a<pad>b"}])
    assert max([*ours.encode("a<pad>b"), *ids]) < 31


def test_more_rows_than_tokens_are_fine(tmp_path: Path) -> None:
    assert Tokenizer.load(letters(tmp_path / "m", FAST, {"vocab_size": 64})).vocab_size == 31
