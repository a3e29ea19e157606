"""transformers and bitsandbytes open what `quantize_folder` writes, and an interrupted run ends like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import edgetune
from edgetune.runtime import nf4
from edgetune.runtime import quantize as quantizing
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import ModelError, ResourceError, UsageError
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.safetensors_file import SafetensorsWriter

transformers = pytest.importorskip("transformers")


def make_model(**changes):
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))


@pytest.fixture
def source(tmp_path):
    make_model().save_pretrained(tmp_path / "source")
    tiny.save_letters(tmp_path / "source")
    (tmp_path / "source" / "training_args.bin").write_bytes(b"a pickle")
    return tmp_path / "source"


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class Killed(BaseException):
    """Stands for a SIGKILL, which nothing catches."""


def kill_after(tensors):
    """Return a progress callback that ends the run after the given number of tensors."""
    count = iter(range(1, 1000))

    def progress(done, total):
        if done and next(count) == tensors:
            raise Killed

    return progress


# ---- comparison with transformers and bitsandbytes


@pytest.mark.parametrize("double_quant", [True, False])
def test_transformers_with_bitsandbytes_opens_ours_and_gives_the_logits_of_our_weights(source, tmp_path, double_quant):
    pytest.importorskip("bitsandbytes")
    quantize_folder(source, tmp_path / "four", double_quant=double_quant, shard_bytes=40_000)
    assert (tmp_path / "four" / "model.safetensors.index.json").exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "four", device_map="cpu")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    compute_in_fp32(theirs)
    ours, checkpoint = make_model(), open_model(tmp_path / "four")
    for name, parameter in ours.named_parameters():
        tensor = checkpoint.tensor(name)
        parameter.data = tensor.float() if isinstance(tensor, torch.Tensor) else nf4.dequantize(tensor, torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = ours(ids).logits
        # In training mode bitsandbytes dequantises to fp32 and multiplies.
        exact = theirs.train()(ids).logits
        # In evaluation mode its kernel for this CPU may round activations and absmax to bf16.
        rounded = theirs.eval()(ids).logits
    assert expected.std() > 0.05
    assert (expected - exact).abs().max() < 1e-5
    assert (expected - rounded).abs().max() < 0.01


def compute_in_fp32(model):
    """Convert a model to fp32, since transformers always loads a 4-bit model's dense parameters as bf16."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True


def test_weights_are_the_specifications_own(source, tmp_path, monkeypatch):
    monkeypatch.setattr("edgetune.runtime.quantize._BLOCK_SIZE", 128)  # other writers of the layout may choose it
    quantize_folder(source, tmp_path / "four")
    original, checkpoint = load_file(source / "model.safetensors"), open_model(tmp_path / "four")
    assert checkpoint.quant.block_size == 128
    for name, weight in original.items():
        stored = checkpoint.tensor(name)
        if name.endswith("_proj.weight"):
            expected = nf4.dequantize(nf4.quantize(weight, block_size=128), torch.float32)
            assert torch.equal(nf4.dequantize(stored, torch.float32), expected)
            assert stored.state.dtype == torch.bfloat16
        else:
            assert torch.equal(stored, weight.bfloat16())


def load_4bit(folder, double_quant):
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )


LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_folder_that_bitsandbytes_wrote_opens_and_dequantises_equal(source, tmp_path, double_quant):
    functional = pytest.importorskip("bitsandbytes.functional")
    model = load_4bit(source, double_quant)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = open_model(tmp_path / "theirs")
    assert checkpoint.quant.double_quant == double_quant
    for layer, block in enumerate(model.model.layers):
        ours = checkpoint.block_tensors(layer)
        for name in LINEARS:
            weight = block.get_submodule(name).weight
            theirs = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(nf4.dequantize(ours[f"{name}.weight"]), theirs)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_folder_that_bitsandbytes_saved_after_running_it_opens_but_for_its_rounded_absmax(source, tmp_path, double_quant):
    """On a CPU with AVX-512 BF16, bitsandbytes saves absmax rounded to bf16, and transposed without double quantisation."""
    model = load_4bit(source, double_quant).eval()
    with torch.no_grad():
        model(torch.arange(4)[None])
    model.save_pretrained(tmp_path / "theirs")
    checkpoint, original = open_model(tmp_path / "theirs"), load_file(source / "model.safetensors")
    for name in LINEARS:
        weight = original[f"model.layers.2.{name}.weight"].bfloat16()
        expected = nf4.dequantize(nf4.quantize(weight, double_quant=double_quant), torch.float32)
        ours = nf4.dequantize(checkpoint.tensor(f"model.layers.2.{name}.weight"), torch.float32)
        assert torch.allclose(ours, expected, rtol=0.03)


# ---- the folder


def test_every_tensor_starts_at_64_bytes_in_the_order_of_use_but_for_short_ones_at_the_end(source, tmp_path):
    quantize_folder(source, tmp_path / "four")
    stored = open_model(tmp_path / "four").stored.values()
    starts = {tensor.name: tensor.start for tensor in stored}
    odd = [tensor.name for tensor in stored if tensor.nbytes % 64]
    assert {name.rpartition(".")[2] for name in odd} <= {"nested_absmax", "absmax"}
    end_of_even = max(starts[name] for name in starts if name not in odd)
    for tensor in stored:
        assert tensor.start > end_of_even if tensor.name in odd else tensor.start % 64 == 0
        assert tensor.start % tensor.dtype.itemsize == 0
    layers = [
        starts[f"model.layers.{layer}.{name}.weight"] for layer in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert layers == sorted(layers)


def test_tokenizer_travels_and_pickles_do_not(source, tmp_path):
    result = quantize_folder(source, tmp_path / "four")
    names = set(content(result.folder))
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} == names
    assert result.folder.stat().st_mode & 0o777 == 0o700
    config = json.loads((result.folder / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert result.bytes == (result.folder / "model.safetensors").stat().st_size
    assert result.parameters == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())


@pytest.mark.parametrize("changes", [{"hidden_size": 24, "intermediate_size": 33}, {"tie_word_embeddings": True}])
def test_odd_sizes_and_tied_heads(tmp_path, changes):
    model = make_model(**changes)
    model.save_pretrained(tmp_path / "source")
    quantize_folder(tmp_path / "source", tmp_path / "four")
    checkpoint = open_model(tmp_path / "four")
    name = "model.layers.1.mlp.down_proj.weight"
    expected = nf4.dequantize(nf4.quantize(model.state_dict()[name]), torch.float32)
    assert torch.equal(nf4.dequantize(checkpoint.tensor(name), torch.float32), expected)
    assert ("lm_head.weight" in checkpoint.stored) == ("tie_word_embeddings" not in changes)


def test_progress_begins_at_nothing_and_ends_at_the_whole(source, tmp_path):
    seen = []
    result = quantize_folder(source, tmp_path / "four", progress=lambda done, total: seen.append((done, total)))
    assert (seen[0], seen[-1]) == ((0, result.parameters), (result.parameters, result.parameters))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# ---- interrupted runs, full disks, wrong arguments


@pytest.mark.parametrize("tensors", [1, 14, 30])
def test_a_killed_run_is_continued_and_ends_byte_identical(source, tmp_path, tensors, monkeypatch):
    whole = content(quantize_folder(source, tmp_path / "whole", shard_bytes=40_000).folder)
    dest = tmp_path / "cut"
    with pytest.raises(Killed):
        quantize_folder(source, dest, shard_bytes=40_000, progress=kill_after(tensors))
    assert not dest.exists()
    made = []
    quantize = nf4.quantize
    monkeypatch.setattr(nf4, "quantize", lambda *arguments, **named: made.append(1) or quantize(*arguments, **named))
    quantize_folder(source, dest, shard_bytes=40_000)
    assert content(dest) == whole
    # Each layer has seven linears. Finished shards are not quantised again.
    assert len(made) == {1: 21, 14: 14, 30: 0}[tensors]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "source", "whole"]


def test_a_partial_folder_of_another_source_is_not_used(source, tmp_path):
    with pytest.raises(Killed):
        quantize_folder(source, tmp_path / "four", shard_bytes=40_000, progress=kill_after(25))
    tensors = {name: tensor * 2 for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    quantize_folder(source, tmp_path / "four", shard_bytes=40_000)
    quantize_folder(source, tmp_path / "fresh", shard_bytes=40_000)
    assert content(tmp_path / "four") == content(tmp_path / "fresh")


def test_a_full_disk_is_told_before_and_during_and_the_work_is_kept(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(quantizing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(ResourceError, match=r"0\.00 GB free and .* takes 0\.02 GB more"):
            quantize_folder(source, tmp_path / "four", shard_bytes=40_000)

    written = []

    def refuse_late(self, name, tensor):
        written.append(name)
        if len(written) > 60:
            raise OSError(28, "No space left on device")
        return write(self, name, tensor)

    write = SafetensorsWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", refuse_late)
        with pytest.raises(ResourceError, match="disk is full"):
            quantize_folder(source, tmp_path / "four", shard_bytes=40_000)
    assert not (tmp_path / "four").exists()
    written.clear()
    quantize_folder(source, tmp_path / "four", shard_bytes=40_000)
    quantize_folder(source, tmp_path / "fresh", shard_bytes=40_000)
    assert content(tmp_path / "four") == content(tmp_path / "fresh")


def test_what_is_4bit_already_is_refused(source, tmp_path):
    quantize_folder(source, tmp_path / "four")
    with pytest.raises(ModelError, match="is already 4-bit"):
        quantize_folder(tmp_path / "four", tmp_path / "again")


def test_a_destination_that_is_there_is_not_overwritten(source, tmp_path):
    with pytest.raises(UsageError, match="already exists"):
        quantize_folder(source, source)
    (tmp_path / "empty").mkdir()
    quantize_folder(source, tmp_path / "empty")


def test_weights_that_are_not_finite_are_refused_by_name(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of .* cannot be quantised.*inf or NaN"):
        quantize_folder(source, tmp_path / "four")
    assert not (tmp_path / "four").exists()


# ---- the model that ships


def test_the_demo_is_a_4bit_folder_of_at_most_13_megabytes_with_card_and_tokenizer():
    demo = Path(edgetune.__file__).parent / "demo"
    files = [file for file in demo.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 13_000_000
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja"} <= {
        file.name for file in files
    }
    checkpoint = open_model(demo)
    assert checkpoint.quant.double_quant
    assert checkpoint.config.parameters + 17 * 384 == 15_735_168  # the second term counts the norms
    weight = nf4.dequantize(checkpoint.tensor("model.layers.7.mlp.down_proj.weight"), torch.float32)
    assert 0.01 < weight.std() < 1
