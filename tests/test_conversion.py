"""A GGUF model becomes a Hugging Face folder whose numbers are the file's own, and that every reader opens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from write_gguf import SIZES, gguf, write_gguf

from edgetune import weight_forms
from edgetune.conversion import convert as conversion
from edgetune.conversion import gguf_file
from edgetune.conversion.convert import Converted, Form, convert
from edgetune.conversion.dequantize import READABLE, dequantize
from edgetune.conversion.gguf_file import GgufFile
from edgetune.conversion.model import Model
from edgetune.conversion.origin import Origin
from edgetune.export.gguf.model import write_model
from edgetune.export.job import Job
from edgetune.lock import lock_output
from edgetune.runtime import ops
from edgetune.runtime.checkpoint import Checkpoint, model_shapes, open_model
from edgetune.runtime.errors import BusyError, ModelError, ResourceError, UsageError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.names import EMBEDDING
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Runner

TOLERANCE = 1e-4
"""Largest difference of a logit in fp32."""
FAMILIES = {
    "llama": ("llama-2-grouped", SIZES),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}),
}
"""Tiny models for each architecture. transformers' reader of GGUF gives every qwen3 heads of 128."""
KINDS = ("F32", "F16", "Q8_0", "Q4_1", "Q4_K", "Q6_K", "IQ4_NL")


@pytest.fixture(autouse=True)
def without_tokenizer(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Convert the tiny models without a tokenizer, since their files have none."""
    if "smollm2" not in request.fixturenames:
        monkeypatch.setattr(conversion, "tokenizer_files", lambda metadata: {})


def a_file(folder: Path, kind: str = "F32", family: str = "llama", parts: int = 0, **keys: Any) -> Path:
    name, sizes = FAMILIES[family]
    return write_gguf(folder / f"{family}-{kind}.gguf", tiny.transformers_model(name, **sizes), kind, parts, **keys)


def converted(file: Path, form: Form = "fp32") -> Path:
    return convert(file, file.parent / f"{file.stem}-{form}", file.stem, form).path


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_model(folder)
    return {name: checkpoint.dense(name).clone() for name in model_shapes(checkpoint.config)}


def logits_of(model: Llama, ids: Tensor) -> Tensor:
    with torch.no_grad(), ops.use_backend("reference"):
        count = len(ids)
        return model.logits(Runner(model).infer(ids, torch.arange(count), [Segment(0, count, 0, count)], None))


def transformers_logits(folder: Path, ids: Tensor, **options: Any) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(ids[None]).logits[0]


# --- the numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(READABLE - {"Q8_K"}))
def test_every_type_is_read_bit_for_bit_as_the_gguf_library_reads_it(kind: str) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    raw = torch.randint(0, 256, (gguf.GGML_QUANT_SIZES[quant][1] * 2048,), dtype=torch.uint8)
    with np.errstate(invalid="ignore"):
        theirs = torch.from_numpy(gguf.quants.dequantize(raw.numpy()[None], quant)[0].copy())
    ours = dequantize(raw, kind)
    assert torch.equal(ours.isnan(), theirs.isnan())
    known = ~ours.isnan()
    assert torch.equal(ours[known].view(torch.int32), theirs[known].view(torch.int32))


def test_q8_k_is_a_scale_times_codes() -> None:
    codes = torch.randint(-128, 128, (2, 256), dtype=torch.int8)
    scales, sums = torch.tensor([[0.5], [-3.0]]), torch.zeros(2, 32, dtype=torch.uint8)
    raw = torch.cat([scales.view(torch.uint8).view(2, 4), codes.view(torch.uint8), sums], dim=1)
    assert torch.equal(dequantize(raw.view(-1), "Q8_K").view(2, 256), scales * codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_reading_of_the_same_file(family: str, kind: str, tmp_path: Path) -> None:
    file, ids = a_file(tmp_path, kind, family), torch.randint(0, 128, (40,))
    theirs = transformers_logits(tmp_path, ids, gguf_file=file.name)
    folder = converted(file)
    assert GgufFile.open(file).quantisation == kind
    ours = logits_of(load_llama(open_model(folder), torch.float32), ids)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(transformers_logits(folder, ids), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_computes_what_transformers_reads_in_the_same_file(smollm2: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 49152, (64,))
    theirs = transformers_logits(smollm2.parent, ids, gguf_file=smollm2.name)
    folder = convert(smollm2, tmp_path / "smollm2", "smollm2", "fp32").path
    ours = logits_of(load_llama(open_model(folder), torch.float32), ids)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def exported(base: Checkpoint, path: Path, kind: str) -> None:
    write_model(Job(base, "model", None, kind), path, kind, lambda writer: writer.add_tokenizer_model("no_vocab"))


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in tiny.UNLIKE_LLAMA])
def test_a_model_that_edgetune_exports_comes_back_with_the_same_numbers_and_config(family: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", family, max_position_embeddings=16)  # within the window of those that have one
    base = open_model(tmp_path / "model")
    exported(base, tmp_path / "model.gguf", "f32")
    back = open_model(converted(tmp_path / "model.gguf"))
    expected = replace(base.config, bos_token_id=None, eos_token_ids=(), windows=back.config.windows)
    assert replace(back.config, model_type=base.config.model_type) == expected
    assert weights(back.folder).keys() == weights(base.folder).keys()
    for name, tensor in weights(base.folder).items():
        assert torch.equal(weights(back.folder)[name], tensor), name


@pytest.mark.parametrize(("kind", "error"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_a_rounded_export_comes_back_to_the_precision_of_its_type(kind: str, error: float, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "llama-2-grouped")
    base = open_model(tmp_path / "model")
    write_model(
        Job(base, "model", None, kind), tmp_path / "model.gguf", kind, lambda writer: writer.add_tokenizer_model("no_vocab")
    )
    back = weights(converted(tmp_path / "model.gguf"))
    for name, tensor in weights(base.folder).items():
        assert (back[name] - tensor).abs().max() <= error * tensor.abs().max(), name


def test_the_llama_3_scaling_of_rope_is_found_from_the_factors_that_llama_cpp_writes(tmp_path: Path) -> None:
    """The factors are computed as convert_hf_to_gguf.py computes them for Llama 3.2."""
    theta, head_dim, scale, low, high, context = 500000.0, 64, 32.0, 1.0, 4.0, 8192
    factors = []
    for frequency in 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)):
        length = 2 * torch.pi / frequency
        smooth = (context / length - low) / (high - low)
        factors.append(
            1.0 if length < context / high else scale if length > context / low else 1 / ((1 - smooth) / scale + smooth)
        )
    file = with_rope_factors(tmp_path, torch.tensor(factors))
    rope = Model(GgufFile.open(file)).hf_config["rope_parameters"]
    numbers = {"factor": scale, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": context}
    assert rope == {"rope_type": "llama3", "rope_theta": theta, **numbers}


def test_factors_of_another_scaling_of_rope_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rope_freqs\.weight holds other factors than Llama 3's scaling of RoPE gives"):
        Model(GgufFile.open(with_rope_factors(tmp_path, torch.linspace(1, 8, 32))))


def with_rope_factors(folder: Path, factors: Tensor) -> Path:
    """Write a tiny LLaMA whose RoPE has these factors."""
    name, sizes = FAMILIES["llama"]
    model = tiny.transformers_model(name, **sizes, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    return write_gguf(folder / "model.gguf", model, extra={"rope_freqs.weight": factors})


# --- the folder -----------------------------------------------------------------------------------------------------------


def test_the_nf4_folder_is_the_one_that_quantize_makes_of_the_fp32_folder(tmp_path: Path) -> None:
    file = a_file(tmp_path, "Q4_1")
    quantize_folder(converted(file), tmp_path / "quantised")
    folder = converted(file, "nf4")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "quantised" / "model.safetensors").read_bytes()
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "quantised" / "config.json").read_text())


def test_the_form_is_nf4_for_large_models_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = a_file(tmp_path, "Q8_0")
    small = convert(file, tmp_path / "small", "it")
    linears = 2 * open_model(small.path).config.linear_parameters
    assert (small.form, weights(small.path)[EMBEDDING].dtype) == ("bf16", torch.bfloat16)
    monkeypatch.setattr(weight_forms, "KEEP_BF16_BYTES", linears)
    assert convert(file, tmp_path / "still small", "it").form == "bf16"
    monkeypatch.setattr(weight_forms, "KEEP_BF16_BYTES", linears - 1)
    large = convert(file, tmp_path / "large", "it")
    assert large.form == "nf4"
    assert open_model(large.path).quant is not None
    assert large.bytes < small.bytes


def test_a_folder_remembers_its_file(tmp_path: Path) -> None:
    file = a_file(tmp_path, "Q4_1")
    done = convert(file, tmp_path / "folder", "my model")
    about, origin = file.stat(), Origin.read(tmp_path / "folder")
    assert origin == Origin(str(file), "my model", "Q4_1", about.st_size, about.st_mtime_ns, GgufFile.open(file).digest)
    assert isinstance(done, Converted)
    assert done.bytes == sum(tensor.nbytes for tensor in open_model(done.path).stored.values())


def test_the_digest_is_of_the_header_alone(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    digest, data = GgufFile.open(file).digest, bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert GgufFile.open(file).digest == digest
    at = bytes(data).index(b"llama.context_length") + len(b"llama.context_length") + 4
    data[at] ^= 1
    file.write_bytes(data)
    assert GgufFile.open(file).digest != digest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_in_three_parts_becomes_the_same_folder(family: str, tmp_path: Path) -> None:
    whole, parts = a_file(tmp_path, "Q4_1", family), tmp_path / "parts"
    parts.mkdir()
    first = a_file(parts, "Q4_1", family, parts=-(-len(GgufFile.open(whole).tensors) // 3))
    assert len(list(parts.glob("*.gguf"))) == 3
    assert (converted(first) / "model.safetensors").read_bytes() == (converted(whole) / "model.safetensors").read_bytes()
    assert GgufFile.open(first).bytes == sum(file.stat().st_size for file in parts.glob("*.gguf"))


def test_of_a_split_file_the_first_part_is_named_and_a_missing_one_too(tmp_path: Path) -> None:
    first = a_file(tmp_path, parts=8)
    second, third = (Path(str(first).replace("-00001-", f"-0000{number}-")) for number in (2, 3))
    with pytest.raises(ModelError, match=f"{second} is not the first part of its model; name {first.name} instead"):
        GgufFile.open(second)
    shutil.copy(first, tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"renamed\.gguf is part of a model that is split into 3 files, and its name"):
        GgufFile.open(tmp_path / "renamed.gguf")
    shutil.copy(second, third)
    with pytest.raises(ModelError, match=rf"{third.name} is not a usable GGUF model \(its header says part 2 of 3"):
        GgufFile.open(first)
    third.unlink()
    with pytest.raises(ModelError, match=f"{third} is missing: the model is split into 3 parts"):
        GgufFile.open(first)


# --- time, memory and interruptions ---------------------------------------------------------------------------------------


def test_a_large_embedding_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices are as long as they may be, and rows of 256 are far shorter than that."""
    largest = []
    monkeypatch.setattr(gguf_file, "_SLICE_NUMBERS", 4096)

    def watched(raw: Tensor, kind: str) -> Tensor:
        largest.append(len(raw) if kind == "Q8_0" else 0)
        return dequantize(raw, kind)

    monkeypatch.setattr(gguf_file, "dequantize", watched)
    file = a_file(tmp_path, "Q8_0")
    wide = weights(converted(file, "bf16"))
    assert max(largest) == 4096 // 32 * 34
    monkeypatch.setattr(gguf_file, "_SLICE_NUMBERS", 1 << 20)
    at_once = weights(convert(file, tmp_path / "at once", "it", "bf16").path)
    assert all(torch.equal(wide[name], tensor) for name, tensor in at_once.items())


def test_progress_is_told_after_every_tensor(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = convert(a_file(tmp_path), tmp_path / "folder", "it", progress=lambda *done: told.append(done)).path
    tensors = weights(folder)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert len(told) == 1 + len(tensors)
    assert told == sorted(told)


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    file = a_file(tmp_path)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(file, tmp_path / "folder", "it", progress=stop)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_conversion_leaves_no_model_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    file, folder = a_file(tmp_path), tmp_path / "folder"
    program = f"""
import os, signal
from pathlib import Path
from edgetune import weight_forms
from edgetune.conversion import convert as conversion
conversion.tokenizer_files = lambda metadata: {{}}
def kill(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
conversion.convert(Path({str(file)!r}), Path({str(folder)!r}), "it", progress=kill)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not folder.exists()
    left = [path for path in tmp_path.iterdir() if path != file]
    assert [path.name.startswith(".") for path in left] == [True]
    converted_again = convert(file, folder, "it")
    assert sorted(tmp_path.iterdir()) == sorted([file, converted_again.path])


def test_a_folder_with_files_is_never_replaced_but_an_empty_one_is_filled(tmp_path: Path) -> None:
    file, folder = a_file(tmp_path), tmp_path / "folder"
    folder.mkdir()
    assert open_model(convert(file, folder, "it").path).config.num_layers == 2
    before = sorted(folder.iterdir())
    with pytest.raises(UsageError, match="folder already exists; name a new folder, or delete it first"):
        convert(file, folder, "it")
    assert sorted(folder.iterdir()) == before


def test_a_full_disk_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = a_file(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=17 << 20))
    with pytest.raises(ResourceError, match=r"The disk has 0\.02 GB free and .*folder takes 0\.02 GB more"):
        convert(file, tmp_path / "folder", "it")
    assert list(tmp_path.iterdir()) == [file]


def test_two_conversions_to_one_folder_do_not_meet(tmp_path: Path) -> None:
    file, folder = a_file(tmp_path), tmp_path / "folder"
    with lock_output(folder), pytest.raises(BusyError, match="is already using the output folder"):
        convert(file, folder, "it")
    assert not folder.exists()


@pytest.mark.parametrize(("number", "name"), [(float("nan"), "blk.1.ffn_down.weight"), (float("inf"), "token_embd.weight")])
def test_inf_and_nan_are_refused_by_the_name_of_their_tensor(number: float, name: str, tmp_path: Path) -> None:
    file = a_file(tmp_path)
    tensor, data = GgufFile.open(file).tensors[name], bytearray(file.read_bytes())
    data[tensor.start + 400 : tensor.start + 404] = torch.tensor([number]).numpy().tobytes()
    file.write_bytes(data)
    with pytest.raises(ModelError, match=f"holds inf or NaN in {name}"):
        convert(file, tmp_path / "folder", "it")
    assert list(tmp_path.iterdir()) == [file]


def test_a_type_that_is_not_read_is_named_with_what_to_fetch(tmp_path: Path) -> None:
    file = a_file(tmp_path, "IQ2_XS")
    with pytest.raises(ModelError, match="stores weights as IQ2_XS, which edgetune cannot read; fetch the model's Q4_K_M"):
        convert(file, tmp_path / "folder", "it")
    assert GgufFile.open(file).quantisation == "IQ2_XS"


def test_a_text_that_is_not_utf_8_is_no_fault_of_the_weights(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    plain = weights(converted(file))
    file.write_bytes(file.read_bytes().replace(b"no_vocab", b"no_\xff\xfecab"))
    assert GgufFile.open(file).metadata["tokenizer.ggml.model"] == "no_\udcff\udcfecab"
    again = weights(convert(file, tmp_path / "again", "again", "fp32").path)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["expert_count", "rope.scaling.type", "attention.head_count", "rope.freq_base"])
def test_a_list_where_one_value_belongs_is_one_sentence(name: str, tmp_path: Path) -> None:
    file = GgufFile.open(a_file(tmp_path))
    file.metadata = {**file.metadata, f"llama.{name}": np.array([4, 4], np.uint32)}
    with pytest.raises(ModelError, match=rf"its llama.{name} is an array of 2 items, expected a "):
        Model(file)


@pytest.mark.parametrize("change", ["cut off", "written again"])
def test_a_file_that_changes_while_it_is_converted_is_one_sentence_and_leaves_nothing(change: str, tmp_path: Path) -> None:
    file, dest = a_file(tmp_path), tmp_path / "converted"
    content = file.read_bytes()

    def spoil(done: int, total: int) -> None:
        if done and change == "cut off":
            os.truncate(file, len(content) // 2)
        elif done == total:
            file.write_bytes(content)
            os.utime(file, ns=(5, 5))

    said = "cannot be read" if change == "cut off" else "has changed while it was read; run the same command again"
    with pytest.raises(ModelError, match=said):
        convert(file, dest, "x", "fp32", spoil)
    assert [path.name for path in tmp_path.iterdir() if "converted" in path.name and not path.name.endswith(".lock")] == []
