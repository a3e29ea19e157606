"""Folders whose head is also in 4 bits, by edgetune or bitsandbytes, open, train and generate; exports keep the head."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import job_for, random_adapter, write_and_compare
from safetensors.torch import load_file
from tiny import save_model

from edgetune.config import TrainConfig
from edgetune.export import verify
from edgetune.library.base_models import DEMO, resolve, scan
from edgetune.machine.forecast import forecast
from edgetune.runtime import nf4
from edgetune.runtime.budget import Stored
from edgetune.runtime.checkpoint import Checkpoint, open_model
from edgetune.runtime.errors import UsageError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.quantize import quantize_folder

IDS = [1, 5, 9, 40, 33]
HEAD = "lm_head.weight"


def source(folder: Path) -> Path:
    """Write a tiny dense model with the demo's tokenizer, whose rows are all whole blocks; return its folder."""
    demo = resolve(DEMO).path
    save_model(folder, intermediate_size=128, vocab_size=open_model(demo).config.vocab_size)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return open_model(quantize_folder(source(tmp_path / "dense"), tmp_path / "four", head="nf4").folder)


def test_the_head_becomes_what_a_linear_becomes(base: Checkpoint, tmp_path: Path) -> None:
    head = base.tensor(HEAD)
    assert isinstance(head, QuantizedTensor)
    dense = load_file(tmp_path / "dense" / "model.safetensors")[HEAD]
    expected = nf4.quantize(dense, double_quant=True)
    assert torch.equal(nf4.dequantize(head, torch.float32), nf4.dequantize(expected, torch.float32))
    plain = quantize_folder(tmp_path / "dense", tmp_path / "plain")
    assert plain.bytes - base.nbytes > dense.numel()  # 16 bits per weight became 4.127


def test_a_folder_cut_at_one_form_is_not_continued_in_the_other(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done > total / 2:
            raise Cut

    source(tmp_path / "dense")
    with pytest.raises(Cut):
        quantize_folder(tmp_path / "dense", tmp_path / "four", shard_bytes=50_000, progress=cut)
    quantize_folder(tmp_path / "dense", tmp_path / "four", shard_bytes=50_000, head="nf4")
    assert open_model(tmp_path / "four").quantized_head


def test_a_tied_head_and_an_unknown_form_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "tied", "llama-3.2-tied-scaled")
    with pytest.raises(UsageError, match="one tensor for embedding and head"):
        quantize_folder(tmp_path / "tied", tmp_path / "four", head="nf4")
    with pytest.raises(UsageError, match="expected one of bf16, nf4"):
        quantize_folder(tmp_path / "tied", tmp_path / "four", head="int8")
    assert not (tmp_path / "four").exists()


def test_transformers_reads_our_folder_and_we_its_own(base: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("edgetune.export.peft")
    transformers = pytest.importorskip("transformers")
    model = peft.open_transformers(base.folder)
    assert type(model.lm_head).__name__ == "Linear4bit"
    ours = verify.reference_logits(load_llama(base, torch.float32), IDS)
    torch.testing.assert_close(peft.TransformersReader(model).logits(IDS), ours, atol=1e-4, rtol=0)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=[]
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    opened = open_model(tmp_path / "theirs")
    assert opened.quantized_head
    found = verify.reference_logits(load_llama(opened, torch.float32), IDS)
    again = peft.TransformersReader(peft.open_transformers(tmp_path / "theirs")).logits(IDS)
    torch.testing.assert_close(found, again, atol=1e-4, rtol=0)


EXPORTS = [
    ("peft", "", ("peft", "bitsandbytes")),
    ("hf", "fp32", ("transformers",)),
    ("hf", "bf16", ("transformers",)),
    pytest.param("hf", "nf4", ("bitsandbytes",), marks=pytest.mark.slow),
    ("mlx", "", ("mlx_lm",)),
    ("mlx", "fp16", ("mlx_lm",)),
    pytest.param("mlx", "int4", ("mlx_lm",), marks=pytest.mark.slow),
    ("gguf", "", ("gguf", "llama_cpp")),
    ("gguf", "f16", ("gguf", "llama_cpp")),
    ("gguf", "q8_0", ("gguf", "llama_cpp")),
    ("coreml", "nf4", ("coremltools",)),
    ("mps", "nf4", ()),
]


@pytest.mark.parametrize(("name", "weights", "packages"), EXPORTS)
def test_an_export_of_it_gives_the_models_logits(
    name: str, weights: str, packages: tuple[str, ...], base: Checkpoint, tmp_path: Path
) -> None:
    for package in packages:
        pytest.importorskip(package)
    # The adapter is noise, so it does not matter how much of it rounding keeps: force the export.
    job = job_for(base, random_adapter(base.config), weights, force=True)
    _, found = write_and_compare(name, job, tmp_path / "out")
    assert found.holds(verify.BOUNDS[name, weights])
    assert found.greedy_match


def test_what_is_merged_in_fp32_has_the_heads_exact_numbers(base: Checkpoint, tmp_path: Path) -> None:
    hf = importlib.import_module("edgetune.export.hf")
    (tmp_path / "out").mkdir()
    hf.write(job_for(base, None, "fp32"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")[HEAD]
    assert torch.equal(written, nf4.dequantize(base.tensor(HEAD), torch.float32))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_sizes_and_lists_tell_the_form(base: Checkpoint, tmp_path: Path) -> None:
    stored = Stored.of(base)
    parts = sum(tensor.nbytes for name, tensor in base.stored.items() if name.startswith(HEAD))
    assert stored.head == parts
    assert stored.head_dtype is None
    assert forecast(TrainConfig(model=str(base.folder))).head == "nf4"
    assert forecast(TrainConfig(model=str(tmp_path / "dense"))).head == "float32"
    assert [found.quantisation for found in scan(base.folder)] == ["nf4 double, head too"]
