"""The sampling settings of a model's publisher are the defaults of generate, a run's samples, GGUF and the Modelfile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import edgetune
from edgetune.config import DataConfig, GenerateConfig, TrainConfig
from edgetune.events import Sampled
from edgetune.export import ollama
from edgetune.export.gguf.vocabulary import read_vocabulary
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.generate import Sampling, penalize, sample
from edgetune.runtime.generation_config import SamplingSettings, read_sampling
from edgetune.session import Session
from edgetune.training.train import train

DEMO = Path(edgetune.__file__).parent / "demo"
ALL = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}


def with_settings(folder: Path, values: Any) -> Path:
    shutil.copytree(DEMO, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_every_setting_is_read(tmp_path: Path) -> None:
    assert read_sampling(with_settings(tmp_path / "m", ALL)) == SamplingSettings(0.6, 0.9, 20, 1.05)
    greedy = {"do_sample": False, "temperature": 0.6}
    assert read_sampling(with_settings(tmp_path / "n", greedy)) == SamplingSettings(temperature=0.0)
    assert read_sampling(tmp_path) == SamplingSettings()


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "repetition_penalty"])
@pytest.mark.parametrize("value", ["0.7", -1, True, [], 1e300, {"a": 1}])
def test_a_value_that_is_none_is_ignored_and_said(name: str, value: Any, tmp_path: Path) -> None:
    found = read_sampling(with_settings(tmp_path / "m", {name: value}))
    assert getattr(found, name) is None
    assert len(found.notices) == 1
    assert f"gives {name} as" in found.notices[0]
    assert found.notices[0].endswith("so it is ignored.")


@pytest.mark.parametrize(("name", "value"), [("top_p", 0), ("repetition_penalty", 0.0), ("top_k", 2.5)])
def test_a_value_out_of_its_range_is_ignored(name: str, value: Any, tmp_path: Path) -> None:
    assert getattr(read_sampling(with_settings(tmp_path / "m", {name: value})), name) is None


def test_nan_is_no_json(tmp_path: Path) -> None:
    folder = with_settings(tmp_path / "m", {})
    (folder / "generation_config.json").write_text('{"temperature": NaN}')
    with pytest.raises(TokenizerError, match=r"generation_config\.json is not valid JSON \(it holds NaN"):
        read_sampling(folder)


def test_the_command_line_wins_over_the_model_and_the_model_over_edgetune(tmp_path: Path) -> None:
    session = Session.load(str(with_settings(tmp_path / "m", ALL)), "none", "cpu")
    assert session._sampling(5, None, 7) == Sampling(0.6, 0.9, 7, 20, 1.05)
    assert session._sampling(5, 0.0, 7).temperature == 0.0
    plain = Session.load(str(with_settings(tmp_path / "n", {"top_k": None})), "none", "cpu")
    assert plain._sampling(5, None, None) == Sampling(GenerateConfig.temperature, GenerateConfig.top_p)
    assert plain.notices == ()
    odd = Session.load(str(with_settings(tmp_path / "o", {"top_k": "many"})), "none", "cpu")
    assert "gives top_k as 'many'" in odd.notices[0]


def test_the_samples_of_a_run_are_what_generate_writes(tmp_path: Path) -> None:
    model, notes = str(with_settings(tmp_path / "m", {**ALL, "repetition_penalty": 1.5})), tmp_path / "notes"
    notes.mkdir()
    (notes / "a.md").write_text("Today Marra watered the beans behind the shed.\n")
    data = DataConfig(notes=(str(notes),), seq_len=64, batch_tokens=64, seed=7)
    samples = [event for event in train(TrainConfig(data, model, "cpu", steps=1)) if isinstance(event, Sampled)]
    session = Session.load(model, "none", "cpu", head="stored")
    assert samples[0].text == session.generate(samples[0].prompt, max_tokens=80, seed=7).text
    assert len(session.tokenizer.encode(samples[0].text)) > 40


def test_top_k_keeps_the_likeliest_and_then_top_p_the_fewest_of_them() -> None:
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    draws = {sample(logits, Sampling(1.0, 1.0, top_k=2), torch.Generator().manual_seed(seed)) for seed in range(60)}
    assert draws == {0, 1}
    # of the two, the first has 0.5 / 0.7 = 0.71 of the probability: more than 0.7, less than 0.75
    assert {sample(logits, Sampling(1.0, 0.7, top_k=2), torch.Generator().manual_seed(seed)) for seed in range(60)} == {0}
    assert {sample(logits, Sampling(1.0, 0.75, top_k=2), torch.Generator().manual_seed(seed)) for seed in range(60)} == {0, 1}


def test_a_penalty_is_transformers(tmp_path: Path) -> None:
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(50, dtype=torch.bool)
    seen[[3, 9, 9, 40]] = True
    expected = logits_process.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 9, 9, 40]]), logits[None].clone())[0]
    assert torch.equal(penalize(logits, seen, 1.3), expected)


def test_a_penalty_keeps_a_greedy_text_from_repeating(tmp_path: Path) -> None:
    plain = Session.load(str(with_settings(tmp_path / "m", {"do_sample": False})), "none", "cpu")
    text = plain.generate("one two one two one two", 24).text
    punished = Session.load(str(with_settings(tmp_path / "n", {"do_sample": False, "repetition_penalty": 5.0})), "none", "cpu")
    ids = punished.tokenizer.encode(punished.generate("one two one two one two", 24).text)
    assert plain.generate("one two one two one two", 24).text == text  # greedy
    assert len(set(ids)) > len(set(plain.tokenizer.encode(text)))


def test_gguf_and_the_modelfile_have_them(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = with_settings(tmp_path / "m", ALL)
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    vocabulary = read_vocabulary(folder, 8192)
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    keys = gguf.Keys.General
    names = (keys.SAMPLING_TEMP, keys.SAMPLING_TOP_P, keys.SAMPLING_TOP_K, keys.SAMPLING_PENALTY_REPEAT)
    assert [fields[name].contents() for name in names] == pytest.approx([0.6, 0.9, 20, 1.05])
    assert fields[keys.SAMPLING_TOP_K].types == [gguf.GGUFValueType.INT32]
    lines = ollama.modelfile(None, [], vocabulary.sampling).splitlines()
    assert lines[-4:] == [f"PARAMETER {line}" for line in ("temperature 0.6", "top_p 0.9", "top_k 20", "repeat_penalty 1.05")]
