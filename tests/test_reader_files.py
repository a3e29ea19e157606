"""Copies of a model are read alike by old and new programs, and exports say what training used."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_start_tokens import BOS, FAST, LLAMA, WITH_BOS, letters
from test_tokenizer import CHATML, CORPUS, smollm

import edgetune
from edgetune.export import peft, probes
from edgetune.export.gguf.vocabulary import read_vocabulary
from edgetune.export.job import Job
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.model_folder import write_settings
from edgetune.runtime.reader_files import config_for_readers, tokenizer_files_for_readers
from edgetune.runtime.tokenizer import Tokenizer

DEMO = Path(edgetune.__file__).parent / "demo"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}, 100000.0, None),
        ({"rope_parameters": LLAMA3}, 5e5, {key: value for key, value in LLAMA3.items() if key != "rope_theta"}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e4}, 7e4, None),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, 1e4, {"type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_type": None, "rope_theta": 7e4, "factor": None}}, 7e4, None),
    ],
)
def test_older_readers_find_rope_where_they_look(config: dict[str, Any], theta: float, scaling: Any) -> None:
    written = config_for_readers({**config, "dtype": "bfloat16"})
    assert (written["rope_theta"], written["rope_scaling"], written["torch_dtype"]) == (theta, scaling, "bfloat16")
    assert written["rope_parameters"] == config["rope_parameters"]


def test_a_config_of_the_older_form_stays_as_it_is() -> None:
    config = {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "float16"}
    assert config_for_readers(config) == config


def test_transformers_reads_the_same_theta_from_both_spellings(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for parameters in ({"rope_type": "default", "rope_theta": 1e5}, {**LLAMA3, "original_max_position_embeddings": 64}):
        config = config_for_readers({"model_type": "llama", "rope_parameters": parameters})
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters == parameters


def written(source: Path, folder: Path) -> dict[str, Any]:
    """Write the settings of a model folder as exports do; return the tokenizer_config.json of the copy."""
    folder.mkdir()
    write_settings(source, folder, json.loads((source / "config.json").read_text()))
    found: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    return found


def job(source: Path) -> Job:
    """Return a Job with nothing but its base's folder and shape, which are all that the check of ids and `export peft` use."""
    base: Any = type("Base", (), {"folder": source, "config": open_model(DEMO).config})
    return Job(base, "m", None, force=False)


def test_a_class_that_splits_texts_otherwise_is_replaced(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = smollm(tmp_path / "m")
    made = json.loads((source / "tokenizer.json").read_text())
    # as in SmolLM2: digits alone, then words; GPT2Tokenizer of transformers 5 drops the first
    assert made["pre_tokenizer"]["pretokenizers"][0]["type"] == "Digits"
    (source / "chat_template.jinja").write_text(CHATML)
    config = written(source, tmp_path / "out")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["add_bos_token"] is False
    assert config["chat_template"] == CHATML
    probes.check_transformers(job(source), tmp_path / "out", "transformers")
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(ModelError, match=r"transformers splits \d+ of 13 test texts into other tokens .* Type --force"):
        probes.check_transformers(job(source), tmp_path / "out", "transformers")


@pytest.mark.parametrize(("named", "told"), [("GPT2Tokenizer", True), ("PreTrainedTokenizerFast", False), (None, False)])
def test_export_peft_says_where_transformers_may_split_texts_otherwise(tmp_path: Path, named: Any, told: bool) -> None:
    source = smollm(tmp_path / "m")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": named}))
    adapter = Adapter(LoraConfig(1, 1.0), {(0, "q_proj", part): torch.ones(1, 1) for part in "AB"})
    (tmp_path / "out").mkdir()
    notices = peft.write(replace(job(source), adapter=adapter), tmp_path / "out").notices
    assert [("class GPT2Tokenizer: open its tokenizer with PreTrained" in notice) for notice in notices[1:]] == [True] * told


@pytest.mark.parametrize("named", [FAST, LLAMA])
@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize("post_processor", [WITH_BOS, None])
def test_transformers_begins_texts_as_training_did(tmp_path: Path, named: Any, setting: bool, post_processor: Any) -> None:
    transformers = pytest.importorskip("transformers")
    source = letters(tmp_path / "m", {**named, "add_bos_token": setting}, post_processor=post_processor)
    written(source, tmp_path / "out")
    ours = Tokenizer.load(source)
    assert ours.start.adds_bos is setting
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("a plan").input_ids == ([BOS] if setting else []) + ours.encode("a plan")
    assert Tokenizer.load(tmp_path / "out").start == ours.start


def test_a_list_of_extra_tokens_gets_the_name_that_older_readers_expect(tmp_path: Path) -> None:
    config = written(letters(tmp_path / "m", {**FAST, "extra_special_tokens": ["<s>"]}), tmp_path / "out")
    assert config["additional_special_tokens"] == ["<s>"]
    assert "extra_special_tokens" not in config


def test_llamas_space_is_where_transformers_4_looks_for_it(tmp_path: Path) -> None:
    """The demo's `add_prefix_space: null` and no `legacy` made transformers 4.46 read "a" as another token than "▁a"."""
    config = written(DEMO, tmp_path / "out")
    assert (config["legacy"], config["tokenizer_class"]) == (False, "LlamaTokenizer")
    assert "add_prefix_space" not in config
    older = written(letters(tmp_path / "m", {**LLAMA, "legacy": True, "add_prefix_space": False}), tmp_path / "out2")
    assert (older["legacy"], older["add_prefix_space"]) == (True, False)


def test_mlx_lm_reads_the_same_ids(tmp_path: Path) -> None:
    tokenizer_utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    source = smollm(tmp_path / "m")
    written(source, tmp_path / "out")
    theirs, ours = tokenizer_utils.load(tmp_path / "out"), Tokenizer.load(source)
    for text in probes.PROBES[:-1]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


# --- a tokenizer.model of another model --------------------------------------------------------------------------------


def sentencepiece_model(corpus: list[str]) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 3),
        model_writer=made,
        vocab_size=400,
        model_type="bpe",
        character_coverage=0.99,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return made.getvalue()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, bytes]:
    """Make a folder with tokenizer.json and the tokenizer.model that it was made from, and another model's tokenizer.model."""
    from test_tokenizer import llama2_json

    right, other = sentencepiece_model(CORPUS), sentencepiece_model([text[::-1] for text in CORPUS])
    folder = llama2_json(tmp_path / "m", right)
    (folder / "tokenizer.model").write_bytes(right)
    return folder, other


def test_scores_come_from_a_tokenizer_model_that_agrees(pair: tuple[Path, bytes]) -> None:
    folder, _ = pair
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    found = read_vocabulary(folder, 400)
    assert found.scores == [float(sp.get_score(id)) for id in range(400)]
    assert "tokenizer.model" not in tokenizer_files_for_readers(folder)


def test_a_stale_tokenizer_model_is_neither_used_nor_copied(pair: tuple[Path, bytes], tmp_path: Path) -> None:
    folder, other = pair
    before = read_vocabulary(folder, 400)
    (folder / "tokenizer.model").write_bytes(other)
    after = read_vocabulary(folder, 400)
    assert after.tokens == before.tokens
    assert after.types == before.types
    merged = [id for id in range(400) if after.scores[id] > min(after.scores)]
    assert len(merged) > 50
    assert sorted(merged, key=lambda id: -after.scores[id]) == sorted(merged, key=lambda id: -before.scores[id])
    written(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_llama_cpp_reads_our_ids_beside_a_stale_tokenizer_model(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from edgetune.export.gguf import target

    source = shutil.copytree(DEMO, tmp_path / "m")
    base_16m = Path(__file__).resolve().parents[2] / "shared" / "data" / "base-16m"
    if not base_16m.is_dir():
        pytest.skip("needs the data of base-16m")
    shutil.copy(base_16m / "tokenizer.json", source)
    (source / "tokenizer.model").write_bytes(sentencepiece_model(CORPUS))
    (tmp_path / "out").mkdir()
    task = Job(open_model(source), "m", None, "f16")
    target.write(task, tmp_path / "out")
    logits = target.read(task, tmp_path / "out").logits([1, 5, 9])
    assert torch.isfinite(logits).all()
