"""`export hf` writes merged folders that transformers opens, and measures how much of an adapter 4-bit rounding keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import PROMPT, job_for, random_adapter, write_and_compare
from safetensors.torch import load_file, save_file
from tiny import save_model

import edgetune
from edgetune.export import effect, verify
from edgetune.export import hf as target
from edgetune.export.memory import check_memory
from edgetune.export.merge import DenseRecipe, Merged
from edgetune.exporting import export_adapter
from edgetune.runtime import nf4, peft_folder
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.errors import AdapterError, ModelError, ResourceError, UsageError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model_folder import write_model
from edgetune.runtime.names import is_linear
from edgetune.runtime.tokenizer import Tokenizer

pytest.importorskip("transformers")

DEMO = Path(edgetune.__file__).parent / "demo"


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    save_model(tmp_path / "base", intermediate_size=128)
    return open_model(tmp_path / "base")


@pytest.mark.parametrize("family", ["llama-3.2-tied-scaled", "llama-attention-bias", "qwen2", "qwen3", "mistral-window"])
def test_transformers_opens_the_merged_folder_and_gives_the_adapted_logits(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "base", family)
    base = open_model(tmp_path / "base")
    adapter = random_adapter(base.config)
    _, found = write_and_compare("hf", job_for(base, adapter, "fp32"), tmp_path / "fp32")
    assert found.greedy_match
    assert found.max_logit_difference < 1e-3
    written, plain = load_file(tmp_path / "fp32" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = (adapter.tensors[1, "up_proj", part] for part in "AB")
    assert torch.allclose(written[name], plain[name] + 2.0 * b @ a, atol=1e-6)
    assert (written[name] - plain[name]).abs().max() > 0.01


@pytest.mark.parametrize("weights", ["bf16", "fp16"])
def test_16_bits_are_one_rounding_of_the_sum(base: Checkpoint, weights: str, tmp_path: Path) -> None:
    adapter = random_adapter(base.config)
    _, found = write_and_compare("hf", job_for(base, adapter, weights), tmp_path / "out")
    assert found.max_logit_difference < 0.5
    merged, written = Merged(base, adapter), load_file(tmp_path / "out" / "model.safetensors")
    for name in merged.shapes:
        assert torch.equal(written[name], merged.tensor(name).to(target.DTYPES[weights])), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(target.DTYPES[weights]).removeprefix("torch.")
    assert "quantization_config" not in config


def test_what_fp16_has_no_number_for_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    adapter = random_adapter(base.config, size=1e6)
    with pytest.raises(ModelError, match="float16 ends at 65504; type --weights bf16"):
        target.write(job_for(base, adapter, "fp16"), tmp_path)


def test_an_adapter_of_another_shape_is_refused_before_a_byte_is_written(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"layers 0-1 q_proj: lora_A is .*layers 0-1 up_proj"):
        target.write(job_for(base, random_adapter(open_model(DEMO).config), "bf16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_have_an_index_and_open(base: Checkpoint, tmp_path: Path) -> None:
    merged = Merged(base, random_adapter(base.config))
    recipe = DenseRecipe(merged, torch.float32)
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    write_model(base.folder, tmp_path / "one", base.hf_config, recipe)
    write_model(base.folder, tmp_path / "many", base.hf_config, recipe, shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = open_model(tmp_path / "one"), open_model(tmp_path / "many")
    assert all(torch.equal(one.dense(name), many.dense(name)) for name in merged.shapes)
    assert target.TransformersReader(target.open_transformers(tmp_path / "many")).logits([1, 5, 9]).shape == (3, 128)


def test_memory_is_refused_with_what_would_do(base: Checkpoint, tmp_path: Path) -> None:
    """The error names an amount; with that amount the export is written from streamed layers."""
    adapter = random_adapter(base.config)
    with pytest.raises(ResourceError, match=r"needs about .*type --memory \d+MB or more") as raised:
        check_memory(target.peak_memory, job_for(base, adapter, "bf16", memory=1_000_000))
    enough = int(str(raised.value).split("type --memory ")[1].split("MB")[0]) * 1_000_000
    check_memory(target.peak_memory, job_for(base, adapter, "bf16", memory=enough))
    target.write(job_for(base, adapter, "bf16", memory=enough), tmp_path / "out")
    target.write(job_for(base, adapter, "bf16"), tmp_path / "free")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "free" / "model.safetensors").read_bytes()


def test_golden_tokens_of_a_streamed_model_are_those_of_a_whole_one(tmp_path: Path) -> None:
    save_model(tmp_path / "base", num_hidden_layers=5)
    base = open_model(tmp_path / "base")
    adapter = random_adapter(base.config)
    one_layer = 4 * base.config.linear_parameters // base.config.num_layers
    # A quarter of this memory is for layers: a ring of two, and one that stays.
    job = job_for(base, adapter, memory=4 * 3 * one_layer)
    assert job.model().pager.streaming
    whole, streamed = (verify.golden(each, PROMPT, each.model()) for each in (job_for(base, adapter), job))
    assert streamed.ids == whole.ids
    assert torch.equal(streamed.logits, whole.logits)


# ---- 4 bits


@pytest.mark.parametrize("family", ["llama-2-grouped", "qwen2", "qwen3"])
def test_transformers_reads_the_4bit_merge_as_edgetune_does(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    save_model(tmp_path / "base", family, intermediate_size=128)
    base = open_model(tmp_path / "base")
    job = job_for(base, random_adapter(base.config, size=0.3), "nf4", force=True)
    written, found = write_and_compare("hf", job, tmp_path / "out")
    assert found.greedy_match
    assert found.max_logit_difference < 1e-3
    assert written.facts[0][0] == "adapter_effect_kept"
    checkpoint = open_model(tmp_path / "out")
    assert checkpoint.quant == target.QUANT
    assert all(isinstance(checkpoint.tensor(name), nf4.QuantizedTensor) for name in checkpoint.stored if is_linear(name))


@pytest.mark.slow
def test_feedback_keeps_an_adapter_where_the_nearest_loses_it_and_such_a_merge_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses real weights and notes. The demo is already 4-bit, so most weights round back to where they were."""
    demo, tokenizer = open_model(DEMO), Tokenizer.load(DEMO)
    notes = sorted((Path(__file__).parent.parent / "examples" / "notes").rglob("*.md"))
    texts = [[*tokenizer.start_ids, *tokenizer.encode(note.read_text())] for note in notes]
    adapter = random_adapter(demo.config, size=0.025)
    monkeypatch.setattr(effect, "TOKENS", 768)
    (tmp_path / "fed").mkdir()
    written = target.write(job_for(demo, adapter, target.NF4, texts=texts), tmp_path / "fed")
    assert dict(written.facts)["adapter_effect_kept"] > 0.6
    (tmp_path / "nearest").mkdir()
    with pytest.raises(ModelError, match=r"This merge keeps -?\d+% of the adapter's effect on the texts, .*--weights nf4,"):
        target.write(job_for(demo, adapter, target.NF4_NEAREST, texts=texts), tmp_path / "nearest")


def test_the_measure_is_the_share_of_the_gain(base: Checkpoint) -> None:
    """The adapted model keeps all of the effect, the base none of it, and losses in nats say the same."""
    adapter = random_adapter(base.config)
    job = job_for(base, adapter, texts=[[1, *range(3, 90)]])
    documents = [[1, *range(3, 90)], [1, *range(60, 20, -1)]]
    for merged, expected in ((job.model(), 1.0), (load_llama(base, torch.float32), 0.0)):
        found = effect.measure(job.model(), merged, documents)
        assert found.kept(by_nats=False) == pytest.approx(expected, abs=1e-9)
        assert found.kl_base > 0.01
        share = (found.nats_base - found.nats_merged) / (found.nats_base - found.nats_adapted)
        assert share == pytest.approx(expected, abs=1e-9)
    certain = effect.Effect(nats_base=4.0, nats_adapted=3.0, nats_merged=3.25, kl_base=0.5, kl_merged=0.1)
    assert certain.kept(by_nats=True) == pytest.approx(0.75)
    assert certain.kept(by_nats=False) == pytest.approx(0.8)
    # This gain in nats would be mostly noise, so the KL divergences decide.
    assert replace(certain, nats_adapted=3.9).kept(by_nats=True) == pytest.approx(0.8)


def test_texts_are_parted_so_that_none_is_measured_that_was_calibrated_on(base: Checkpoint) -> None:
    texts = [[number] * 10 for number in range(1, 7)]
    calibration, held_out = effect.texts_for(job_for(base, random_adapter(base.config), "nf4", texts=texts))
    assert {text[0] for text in calibration} == {1, 3, 5}
    assert {text[0] for text in held_out} == {2, 4, 6}
    own, others = effect.texts_for(job_for(base, random_adapter(base.config), "nf4"))
    assert not {tuple(text) for text in own} & {tuple(text) for text in others}
    assert sum(map(len, own)) == effect.TOKENS


def test_a_base_alone_is_not_merged_to_4_bits(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no adapter to merge; type `edgetune quantize"):
        target.write(job_for(base, None, "nf4"), tmp_path)


def test_the_command_writes_the_demo_and_notices_a_corrupted_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft_folder.save(random_adapter(open_model(DEMO).config), tmp_path / "adapter", "demo")
    result = export_adapter("hf", "demo", str(tmp_path / "adapter"), tmp_path / "out")
    assert result.verified
    assert result.greedy_match
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (DEMO / "tokenizer.model").read_bytes()
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o600}
    # The folder holds an export of edgetune's own, so it may be replaced.
    export_adapter("hf", "demo", str(tmp_path / "adapter"), tmp_path / "out", check=False)
    spec = target.SPEC

    def flip(job, folder):
        written, file = spec.write(job, folder), folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.3.mlp.down_proj.weight"].view(torch.int16)[5, 7] ^= 0x4000  # the exponent's highest bit
        save_file(tensors, file, {"format": "pt"})
        return written

    monkeypatch.setattr(target, "SPEC", replace(spec, write=flip))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="does not agree with edgetune's own model"):
        export_adapter("hf", "demo", str(tmp_path / "adapter"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_transformers_begins_a_text_of_the_demo_as_edgetune_does() -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    from transformers import AutoTokenizer

    ours = Tokenizer.load(DEMO)
    assert AutoTokenizer.from_pretrained(DEMO)("The Duchess")["input_ids"] == [*ours.start_ids, *ours.encode("The Duchess")]


def test_widths_that_the_reader_misreads_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "base", intermediate_size=96)
    base = open_model(tmp_path / "base")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(effect, "texts_for", None)
    for weights in ("nf4", "nf4-nearest"):
        with pytest.raises(ModelError, match=r"number of inputs \(96\) .*type --no-verify to write it unproved"):
            target.write(job_for(base, random_adapter(base.config), weights), tmp_path)
