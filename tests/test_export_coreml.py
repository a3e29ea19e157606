"""Core ML packages agree with the engine op by op and their weights bit by bit, and faults in them are caught."""

from __future__ import annotations

import importlib.util
import json
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tiny import save_model, save_trainable
from torch import Tensor

import edgetune
from edgetune import export_adapter
from edgetune.export import verify
from edgetune.export.coreml import evaluator, reference, stored_weight
from edgetune.export.coreml import target as coreml
from edgetune.export.coreml.adapter_file import ADAPTER_FILE, stacked, write_adapter
from edgetune.export.coreml.contents import ADAPTER_ALONE, contents_of
from edgetune.export.coreml.evaluator import MilProgram
from edgetune.export.coreml.how_to_call import HIDDEN, PACKAGE, masks
from edgetune.export.coreml.operations import OPERATIONS
from edgetune.export.coreml.package import Package
from edgetune.export.coreml.plan import does_nothing
from edgetune.export.coreml.proof import EvaluatedPackage, compare_constants, compare_weights
from edgetune.export.coreml.stored_weight import StoredWeight, placeholder, store
from edgetune.export.coreml.weight_locations import EMBEDDING_NAME, weight_locations
from edgetune.export.job import Job
from edgetune.export.memory import check_memory
from edgetune.export.merge import Merged
from edgetune.runtime import adapter as adapters
from edgetune.runtime import nf4, ops, peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import AdapterError, ModelError, ResourceError, UsageError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.runner import Runner
from edgetune.runtime.tokenizer import Tokenizer

pytest.importorskip("coremltools")
DEMO = Path(edgetune.__file__).parent / "demo"


def tiny(folder: Path, family: str = "llama-2-grouped", **changes: Any) -> Path:
    """Save a model of a family whose rows are whole blocks, with the demo's tokenizer; return its folder."""
    save_model(folder, family, **{"intermediate_size": 128, "vocab_size": open_model(DEMO).config.vocab_size, **changes})
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def job_of(folder: Path, weights: str = "fp16", adapter: Adapter | None = None, adapter_as: str | None = None) -> Job:
    return Job(open_model(folder), "tiny", adapter, weights, adapter_as)


def an_adapter(folder: Path, rank: int = 4, seed: int = 0, targets: tuple[str, ...] | None = None) -> Adapter:
    """Return a random adapter that changes the model strongly."""
    config = LoraConfig(rank, 2.0 * rank) if targets is None else LoraConfig(rank, 2.0 * rank, targets=targets)
    model = load_llama(open_model(folder), torch.float32)
    adapters.attach_new(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapters.snapshot(model, config)


def stored_model(job: Job) -> Llama:
    """Call reference.stored_model with a temporary folder for its files."""
    with tempfile.TemporaryDirectory() as place:
        return reference.stored_model(job, Path(place))


def written(job: Job, folder: Path) -> EvaluatedPackage:
    folder.mkdir()
    coreml.write(job, folder)
    found = coreml.read(job, folder)
    assert isinstance(found, EvaluatedPackage)
    return found


@torch.no_grad()
def engine(model: Llama, ids: list[int]) -> Tensor:
    """Compute the engine's logits in one pass on the reference back end."""
    with ops.use_backend("reference"):
        h = Runner(model).infer(torch.tensor(ids), torch.arange(len(ids)), [Segment(0, len(ids), 0, len(ids))], None)
        return model.logits(h)


def logit_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference between two sets of logits, in standard deviations of the expected ones."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    return float((found - expected).abs().max() / expected.std())


IDS = [int(token) for token in torch.randint(3, 128, (24,), generator=torch.Generator().manual_seed(7))]
CLOSE = 0.03
"""Bound on the rounding error of two fp16 layers, in standard deviations of the logits. A wrong angle, mask or bias causes
hundreds of times more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model of one layer, for tests that need no more: coremltools takes long for each layer."""
    torch.manual_seed(0)
    return tiny(tmp_path_factory.mktemp("model") / "thin", num_hidden_layers=1)


@pytest.fixture(scope="module")
def inputs_package(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an NF4 package that takes an adapter of rank 4 as inputs."""
    out = tmp_path_factory.mktemp("package") / "inputs"
    out.mkdir()
    coreml.write(job_of(folder, "nf4", an_adapter(folder)), out)
    return out


# --- the graph ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["llama-1", "llama-3.2-tied-scaled", "llama-attention-bias", "mistral-window", "qwen2.5-window", "qwen3"],
)  # fmt: skip
def test_every_family_agrees_in_prefill_and_decode(family: str, tmp_path: Path) -> None:
    """Uses 24 tokens with windows of 16: the first half is one chunk, the second half goes token by token."""
    job = job_of(tiny(tmp_path / "model", family))
    package = written(job, tmp_path / "out")
    assert logit_difference(package.logits(IDS), engine(job.model(), IDS)) < CLOSE
    windows = {"mistral-window", "qwen2.5-window"}
    assert ("window_mask" in package.call["inputs"]) == (family in windows)


def test_chunks_longer_than_the_prefill_go_through_the_same_state(folder: Path, inputs_package: Path) -> None:
    package = EvaluatedPackage(inputs_package)
    whole = package.logits(IDS)
    package.call["prefill_tokens"] = 5
    assert logit_difference(package.logits(IDS), whole) < CLOSE


def test_the_whole_context_is_read(folder: Path, inputs_package: Path) -> None:
    """Fills the cache to its last slot and uses the last rotation angle."""
    package, job = EvaluatedPackage(inputs_package), job_of(folder, "nf4", an_adapter(folder))
    ids = (IDS * package.call["context_tokens"])[: package.call["context_tokens"]]
    assert len(ids) == job.base.config.max_positions
    assert logit_difference(package.logits(ids), engine(stored_model(job), ids)) < CLOSE


@pytest.mark.slow
def test_large_activations_do_not_overflow_the_norms(tmp_path: Path) -> None:
    """The square of a number above 255 overflows fp16, so the norms are computed in fp32."""
    source = tiny(tmp_path / "model")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 2000 / tensors["model.embed_tokens.weight"].abs().max()
    safetensors.torch.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    job = job_of(source)
    assert logit_difference(written(job, tmp_path / "out").logits(IDS), engine(job.model(), IDS)) < CLOSE


def test_the_cache_is_the_state_and_the_mask_is_honoured(inputs_package: Path) -> None:
    """The result of decode depends on the states that prefill left, and on the part of them that the mask shows."""
    package = EvaluatedPackage(inputs_package)

    def feed(ids: list[int], end: int) -> dict[str, np.ndarray]:
        chunk = np.array([ids], np.int32)
        return {"input_ids": chunk, **masks(package.call, len(ids), end), **package._adapter}

    def last(mask_first: bool, fresh: bool) -> np.ndarray:
        states = package.program.states()
        package.program.run(feed(IDS[:8], 8), states)
        assert states["k_cache"][:, :, :8].any(axis=(1, 3)).all()
        assert not states["k_cache"][:, :, 8:].any()
        inputs = feed(IDS[8:9], 9)
        if mask_first:
            inputs["causal_mask"][..., 0] = HIDDEN
        return package.program.run(inputs, package.program.states() if fresh else states)["logits"]

    assert np.abs(last(False, False) - last(False, True)).max() > 0.1
    assert np.abs(last(False, False) - last(True, False)).max() > 0.001


# --- the weights -------------------------------------------------------------------------------------------------------------


def test_nf4_is_the_engines_bit_for_bit(folder: Path, inputs_package: Path) -> None:
    """Compares the codes and absmax in the saved file with a quantisation of the folder's weight made here."""
    program, base = MilProgram(inputs_package / PACKAGE), open_model(folder)
    found = weight_locations(program.package, "main")
    weight = base.dense("model.layers.1.mlp.down_proj.weight")
    quantized = nf4.quantize(weight)
    stored = found["layers_1_down_proj"].read(program.package)
    high_first = np.stack((quantized.packed.numpy() >> 4, quantized.packed.numpy() & 15), 1).reshape(weight.shape)
    assert stored.form == "nf4"
    assert (stored.codes == high_first).all()
    assert stored.scale is not None
    absmax = nf4.expand_absmax(quantized.state).half().view(weight.shape[0], -1)
    assert (torch.from_numpy(stored.scale).view(torch.int16) == absmax.view(torch.int16)).all()
    halves = nf4.NF4_TABLE.half()[torch.from_numpy(high_first).int()].view(weight.shape[0], -1, 64) * absmax.unsqueeze(2)
    made = torch.from_numpy(program.weight("layers_1_down_proj_weight"))  # as the evaluator reads it
    assert torch.equal(made, halves.view(weight.shape))
    assert torch.equal(torch.from_numpy(stored.values()), halves.view(weight.shape))  # as the reference reads it
    relative = (halves.view(weight.shape).float() / nf4.dequantize(quantized, torch.float32) - 1).nan_to_num().abs()
    assert relative.max() < 2e-3


def test_int4_is_within_half_a_step_and_uses_the_whole_range() -> None:
    weight = torch.randn(48, 96)
    stored = store("w", weight, "int4")
    assert (int(stored.codes.min()), int(stored.codes.max())) == (-8, 7)
    assert stored.scale is not None
    step = torch.from_numpy(stored.scale).float().repeat_interleave(32, dim=1)
    assert ((torch.from_numpy(stored.values()).float() - weight).abs() <= 0.51 * step).all()
    assert not store("w", torch.zeros(2, 32), "int4").values().any()


def test_rows_that_are_no_whole_blocks_and_numbers_beyond_fp16_are_refused() -> None:
    with pytest.raises(ModelError, match=r"w has 96 inputs, .* --weights fp16"):
        store("w", torch.randn(2, 96), "nf4")
    with pytest.raises(ModelError, match="fp16 ends at 65504"):
        store("w", torch.full((2, 64), 1e5), "fp16")
    with pytest.raises(ModelError, match="inf or NaN"):
        store("w", torch.full((2, 64), torch.nan), "nf4")


def test_differences_are_counted() -> None:
    one = store("w", torch.randn(4, 64), "nf4")
    codes = one.codes.copy()
    codes[2, 3] ^= 1
    assert one.differences(one) == 0
    assert one.differences(StoredWeight("nf4", codes, one.scale)) == 1
    assert one.differences(store("w", torch.randn(4, 64), "fp16")) == one.codes.size


def test_a_damaged_package_is_caught(folder: Path, inputs_package: Path, tmp_path: Path) -> None:
    """The comparison finds one flipped bit of a code, and a truncated file is refused as unreadable."""
    copy = tmp_path / "copy"
    shutil.copytree(inputs_package, copy)
    job = job_of(folder, "nf4", an_adapter(folder))
    contents = contents_of(job)
    assert compare_weights(copy / PACKAGE, contents) > 0
    weights = copy / PACKAGE / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    quantized = nf4.quantize(open_model(folder).dense("model.layers.0.self_attn.q_proj.weight"))
    codes = store("q", quantized, "nf4").codes.reshape(-1, 2)
    low_first = (codes[:, 0] | codes[:, 1] << 4).astype(np.uint8).tobytes()  # Core ML's order within a byte
    data = bytearray(weights.read_bytes())
    data[data.index(low_first)] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="layers_0_q_proj differs"):
        compare_weights(copy / PACKAGE, contents)
    graph = weights.parent.parent / "model.mlmodel"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a readable Core ML package"):
        MilProgram(copy / PACKAGE)


@pytest.mark.parametrize(("name", "place"), [("cos", (-1, 0)), ("layers_1_attn_norm_weight", (3,))])
def test_a_constant_beside_the_weights_is_compared_too(
    name: str, place: tuple[int, ...], folder: Path, inputs_package: Path, tmp_path: Path
) -> None:
    """Flips the last bit of a norm, or of an angle that the tokens of a proof never reach."""
    shutil.copytree(inputs_package, tmp_path / "copy")
    path = tmp_path / "copy" / PACKAGE
    plans = contents_of(job_of(folder, "nf4", an_adapter(folder))).plans()
    assert compare_constants(path, plans) > 0
    package = Package(path)
    made = {each.outputs[0].name: each for each in package.functions["main"].operations if each.type == "const"}
    numbers = np.array(package.constant(made[name].attributes["val"]))
    numbers.view(np.uint16)[place] ^= 1
    package.fill(made[name].attributes["val"], numbers)
    with pytest.raises(ModelError, match=f"The package's {name} differs"):
        compare_constants(path, plans)


def without_a_write(operations: list[Any]) -> list[Any]:
    """Remove the write of the second layer's values to the state."""
    last = [each for each in operations if each.type == "write_state"][-1]
    return [each for each in operations if each is not last]


def without_a_mask(operations: list[Any]) -> list[Any]:
    del next(each for each in operations if each.type == "scaled_dot_product_attention").inputs["attn_mask"]
    return operations


def from_the_first_position(operations: list[Any]) -> list[Any]:
    """Rotate every chunk as if it began the text, which is right only for the first one."""
    made = {each.outputs[0].name: each for each in operations if each.outputs}
    slices = [
        each for each in operations if each.type == "slice_by_index" and each.inputs["x"].arguments[0].name in ("cos", "sin")
    ]
    assert len(slices) == 2
    for each in slices:
        first, last = (made[each.inputs[part].arguments[0].name].inputs["values"].arguments for part in ("begin", "end"))
        first[0].CopyFrom(first[1])  # [begin, 0] -> [0, 0]
        last[0].CopyFrom(made["begin"].inputs["y"].arguments[0])  # [end, hd/2] -> [count, hd/2]
    return operations


@pytest.mark.parametrize("fault", [without_a_write, without_a_mask, from_the_first_position])
def test_a_fault_of_the_graph_is_seen_in_the_logits(
    fault: Callable[[list[Any]], list[Any]], folder: Path, inputs_package: Path
) -> None:
    package, job = EvaluatedPackage(inputs_package), job_of(folder, "nf4", an_adapter(folder))
    block = package.program.package.functions["main"]
    kept = fault(list(block.operations))
    package.program.functions["main"] = type(package.program.functions["main"])(kept)
    assert logit_difference(package.logits(IDS), engine(stored_model(job), IDS)) > 5 * CLOSE


def test_a_place_without_its_weight_takes_no_memory_and_refuses_uneven_rows() -> None:
    for form in ("nf4", "int4", "fp16"):
        made, real = placeholder("w", (1 << 20, 1 << 16), form, 64), store("w", torch.randn(2, 128), form)
        assert made.codes.strides == (0, 0)
        assert made.codes.dtype == real.codes.dtype
        assert (made.scale is None) == (real.scale is None)
    with pytest.raises(ModelError, match=r"w has 96 inputs, .* --weights fp16"):
        placeholder("w", (2, 96), "nf4", 64)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["nf4", "int4", "fp16"])
def test_coremltools_reads_the_weights_that_were_written(weights: str, one_layer: Path, tmp_path: Path) -> None:
    """coremltools' own loader and the reader that proofs use read the same values for every constant."""
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models.utils import load_spec

    job = replace(job_of(one_layer, weights, an_adapter(one_layer), "functions"), texts=[IDS])
    package = written(job, tmp_path / "out").program
    graph = tmp_path / "out" / PACKAGE / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = load_spec(str(graph))
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(graph.parent / "weights"))
    assert set(program.functions) == set(package.functions) == {"adapted", "base"}
    contents = contents_of(job)
    for name, function in program.functions.items():
        locations = weight_locations(package.package, name)
        linears = {op.outputs[0].name: op.inputs["weight"] for op in function.operations if op.op_type == "linear"}
        for called, full in contents.weight_names().items():
            ours, expected = locations[called].read(package.package), contents.weight(full)
            assert ours.differences(expected) == 0
            if called == EMBEDDING_NAME:
                continue
            weight = linears[called]
            if weights == "fp16" or called == "logits":
                assert np.array_equal(weight.val.view(np.uint16), expected.codes.view(np.uint16))
                continue
            scaled = weight.op.inputs
            codes = scaled["data"].op.inputs["indices"].val if weights == "nf4" else scaled["data"].val
            assert np.array_equal(np.asarray(codes).astype(np.int16), expected.codes.astype(np.int16))
            assert np.array_equal(scaled["scale"].val.view(np.uint16), expected.scale.view(np.uint16))


def test_weights_that_there_is_no_room_for_are_read_again(inputs_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "_SMALL_CONSTANT", 256)
    whole, none = EvaluatedPackage(inputs_package), EvaluatedPackage(inputs_package, cache_bytes=0)
    assert torch.equal(whole.logits(IDS), none.logits(IDS))
    assert any(name.endswith("_weight") for _, name in whole.program._cache)
    assert not any(name.endswith("_proj_weight") for _, name in none.program._cache)


# --- the adapter -------------------------------------------------------------------------------------------------------------


def test_another_adapter_needs_no_new_package(folder: Path, inputs_package: Path, tmp_path: Path) -> None:
    """The other adapter has a lower rank."""
    package = EvaluatedPackage(inputs_package)
    job = job_of(folder, "nf4", an_adapter(folder))
    assert logit_difference(package.logits(IDS), engine(stored_model(job), IDS)) < CLOSE
    other = replace(job, adapter=an_adapter(folder, rank=2, seed=1), weights=ADAPTER_ALONE)
    assert coreml.write(other, tmp_path).opens == ADAPTER_FILE
    package.use_adapter(tmp_path / ADAPTER_FILE)
    expected = engine(stored_model(replace(other, weights="nf4")), IDS)
    assert logit_difference(package.logits(IDS), expected) < CLOSE
    assert logit_difference(engine(stored_model(job), IDS), expected) > 20 * CLOSE
    assert logit_difference(coreml.read(other, tmp_path).logits(IDS), expected) < CLOSE
    # The golden.json beside the adapter file is therefore the package's golden.json too.
    assert torch.equal(engine(stored_model(other), IDS), expected)


def test_every_input_has_a_range_of_shapes(inputs_package: Path) -> None:
    """Core ML is reported to end a process that loads a program with states and some inputs of a fixed shape."""
    import coremltools as ct

    program = ct.utils.load_spec(str(inputs_package / PACKAGE))
    inputs = {each.name: each.type.multiArrayType for each in program.description.input}
    assert {"input_ids", "causal_mask", "q_proj_a", "down_proj_b"} <= set(inputs)
    assert {name for name, kind in inputs.items() if kind.WhichOneof("ShapeFlexibility") != "shapeRange"} == set()
    ranks = {(r.lowerBound, r.upperBound) for r in (inputs["q_proj_a"].shapeRange.sizeRanges[1],)}
    assert ranks == {(1, 4)}


def test_an_adapter_of_a_lower_rank_needs_no_padding(folder: Path, inputs_package: Path) -> None:
    package = EvaluatedPackage(inputs_package)
    low = an_adapter(folder, rank=2, seed=1)
    package._adapter = stacked(low, open_model(folder).config)
    assert package._adapter["q_proj_a"].shape[1] == 2
    expected = engine(stored_model(job_of(folder, "nf4", low)), IDS)
    assert logit_difference(package.logits(IDS), expected) < CLOSE


def test_heads_that_the_neural_engine_may_not_take_are_said(one_layer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    said = coreml.write(job_of(one_layer), tmp_path / "out").notices
    assert any("heads have 16 numbers, and the Neural Engine may fail" in notice for notice in said)


def test_layers_that_an_adapter_leaves_alone_are_zeros(folder: Path) -> None:
    whole, config = an_adapter(folder, targets=("q_proj",)), open_model(folder).config
    part = replace(whole, tensors={key: tensor for key, tensor in whole.tensors.items() if key[0] == 1})
    found, expected = stacked(part, config), stacked(whole, config)
    assert set(found) == {"q_proj_a", "q_proj_b"}
    for name, values in found.items():
        assert not values[0].any()
        assert (values[1] == expected[name][1]).all()
        assert values[1].any()


@pytest.mark.parametrize("fault", ["rank", "linears", "base"])
def test_an_adapter_that_does_not_fit_is_refused(fault: str, folder: Path, inputs_package: Path, tmp_path: Path) -> None:
    adapter = an_adapter(folder, 8 if fault == "rank" else 4, targets=("q_proj", "v_proj") if fault == "linears" else None)
    job = job_of(folder)
    path = tmp_path / "adapter.safetensors"
    write_adapter(adapter, job.base.config, "another" if fault == "base" else job.base.digest, path)
    with pytest.raises(AdapterError, match="does not fit this package"):
        EvaluatedPackage(inputs_package).use_adapter(path)


@pytest.mark.slow
def test_functions_share_the_base(folder: Path, inputs_package: Path, tmp_path: Path) -> None:
    adapter = an_adapter(folder, targets=("q_proj", "down_proj"))
    job = job_of(folder, "nf4", adapter, "functions")
    package = written(job, tmp_path / "functions")
    assert package.call["functions"] == ["adapted", "base"]
    assert logit_difference(package.logits(IDS), engine(stored_model(job), IDS)) < CLOSE
    base = EvaluatedPackage(tmp_path / "functions", function="base")
    assert logit_difference(base.logits(IDS), engine(stored_model(replace(job, adapter=None, adapter_as=None)), IDS)) < CLOSE
    weights = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    both, bare = ((folder / weights).stat().st_size for folder in (tmp_path / "functions", inputs_package))
    # 128 bytes are for each tensor's header and padding.
    adapter_bytes = sum(tensor.numel() * 2 + 128 for tensor in adapter.tensors.values())
    assert bare < both <= bare + adapter_bytes


def test_a_fault_of_the_base_beside_an_adapter_is_seen(one_layer: Path, tmp_path: Path) -> None:
    from coremltools.proto import Model_pb2

    package = written(job_of(one_layer, "fp16", an_adapter(one_layer), "functions"), tmp_path / "out")
    graph = tmp_path / "out" / PACKAGE / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = Model_pb2.Model.FromString(graph.read_bytes())
    base = model.mlProgram.functions["base"]
    without_a_mask(list(base.block_specializations[base.opset].operations))
    graph.write_bytes(model.SerializeToString())
    adapted = EvaluatedPackage(tmp_path / "out", function="adapted")
    assert torch.isfinite(adapted.logits(IDS)).all()
    with pytest.raises(ModelError, match="function base is not the base: logits differ by up to"):
        package.logits(IDS)


def test_no_copy_of_the_weights_lies_outside_the_export(
    one_layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """coremltools works in temporary folders, and a merged model is as private as the notes."""
    made: list[str] = []
    mkdtemp = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args, **kwargs: made.append(mkdtemp(*args, **kwargs)) or made[-1])
    before = tempfile.gettempdir()
    tmp_path.joinpath("out").mkdir()
    coreml.write(job_of(one_layer, "fp16", an_adapter(one_layer), "merged"), tmp_path / "out")
    assert made
    assert all(Path(path).is_relative_to(tmp_path / "out") for path in made)
    assert tempfile.gettempdir() == before
    assert not (tmp_path / "out" / ".work").exists()


def test_a_merge_into_four_bits_says_what_it_costs(one_layer: Path, tmp_path: Path) -> None:
    job = replace(job_of(one_layer, "nf4", an_adapter(one_layer), "merged"), texts=[IDS])
    tmp_path.joinpath("out").mkdir()
    result = coreml.write(job, tmp_path / "out")
    facts = dict(result.facts)
    assert 0 < facts["kl_of_rounding"] < facts["kl_of_adapter"]
    assert "--adapter-as inputs keeps it whole" in result.notices[-1]
    package = coreml.read(job, tmp_path / "out")
    assert package.call["adapter"] is None
    assert logit_difference(package.logits(IDS), engine(stored_model(job), IDS)) < CLOSE
    assert logit_difference(package.logits(IDS), engine(job.model(), IDS)) > 3 * CLOSE  # the rounding is real and visible


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["nf4", "int4"])
def test_a_merge_that_leaves_the_adapter_out_is_refused(
    weights: str, one_layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored weights and their reference come from the same merge, so only the trained model reveals the fault."""
    job = replace(job_of(one_layer, weights, an_adapter(one_layer), "merged"), texts=[IDS])
    tensor = Merged.tensor
    monkeypatch.setattr(Merged, "tensor", lambda merged, name: tensor(Merged(merged.base, None), name))
    tmp_path.joinpath("out").mkdir()
    with pytest.raises(ModelError, match=r"keeps -?\d+% of the adapter's effect on the texts, .* type --adapter-as inputs"):
        coreml.write(job, tmp_path / "out")
    tmp_path.joinpath("forced").mkdir()
    facts = dict(coreml.write(replace(job, force=True), tmp_path / "forced").facts)
    assert facts["kl_of_rounding"] > facts["kl_of_adapter"] / 2


@pytest.mark.parametrize("adapter_as", [None, "inputs"])
def test_a_base_whose_codes_say_nothing_is_refused(
    adapter_as: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds for a base below an adapter that is an input. The model's predictions are confident ones."""
    folder = tiny(tmp_path / "model", num_hidden_layers=1)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 10
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    made = stored_weight._store_int4

    def nothing(name: str, dense: Tensor) -> StoredWeight:
        right = made(name, dense)
        return replace(right, codes=right.codes * 0)

    monkeypatch.setattr(stored_weight, "_store_int4", nothing)
    job = replace(job_of(folder, "int4", None if adapter_as is None else an_adapter(folder), adapter_as), texts=[IDS])
    tmp_path.joinpath("out").mkdir()
    with pytest.raises(ModelError, match=r"Rounding to int4 changes the model by KL [\d.]+ on .* type --weights nf4, or"):
        coreml.write(job, tmp_path / "out")


# --- the whole ---------------------------------------------------------------------------------------------------------------


def test_norms_of_ones_that_coremltools_leaves_out_are_no_fault(tmp_path: Path) -> None:
    save_trainable(tmp_path / "model", layers=1)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    ones = {name: torch.ones_like(tensor) for name, tensor in tensors.items() if "norm" in name}
    safetensors.torch.save_file(tensors | ones, weights, {"format": "pt"})
    assert export_adapter("coreml", str(tmp_path / "model"), "none", tmp_path / "out", "fp16").verified


def test_only_what_does_nothing_may_be_missing() -> None:
    ones, zeros = np.ones(4, np.float16), np.zeros(4, np.float16)
    assert does_nothing("layers_0_attn_norm_weight", ones)
    assert does_nothing("layers_0_q_proj_bias", zeros)
    for name, values in (("norm_weight", zeros), ("layers_0_q_proj_bias", ones), ("layers_0_q_proj_a", ones), ("cos", ones)):
        assert not does_nothing(name, values)


def test_a_disk_without_room_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import coremltools

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[MIL FileWriter]: Unknown error occurred while writing data to the file.")

    monkeypatch.setattr(coremltools, "convert", full)
    save_trainable(tmp_path / "model")
    with pytest.raises(ResourceError, match=r"could not write the package .* make sure that the disk has room"):
        export_adapter("coreml", str(tmp_path / "model"), "none", tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_proves_and_describes(tmp_path: Path) -> None:
    save_trainable(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    result = export_adapter("coreml", str(tmp_path / "model"), "none", tmp_path / "out", "fp16")
    assert result.verified
    assert result.greedy_match
    assert result.proved_by == "edgetune's own evaluator"
    assert result.notices[0] == coreml.LIMIT_OF_PROOF
    assert result.notices[1].startswith("This model's heads have 16 numbers, and the Neural Engine may fail")
    assert len(result.notices) == 2
    call = json.loads((tmp_path / "out" / "how-to-call.json").read_text())
    assert call["context_tokens"] == config["max_position_embeddings"]
    assert call["stop_ids"] == [config["eos_token_id"]]
    assert call["states"]["k_cache"]["shape"] == [2, 2, config["max_position_embeddings"], 16]
    assert call["compute_units"] == "cpuAndGPU"
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert modes == {0o600}


def test_an_app_that_does_what_how_to_call_says_finds_the_golden_logits(tmp_path: Path) -> None:
    """Uses only the JSON, the files that it names and the package, and reads the adapter's bytes by the layout given there."""
    out, model = tmp_path / "out", tiny(tmp_path / "model", vocab_size=open_model(DEMO).config.vocab_size)
    peft_folder.save(an_adapter(model), tmp_path / "night", "tiny")
    assert export_adapter("coreml", str(model), str(tmp_path / "night"), out).verified
    call = json.loads((out / "how-to-call.json").read_text())
    golden = json.loads((out / call["golden"]["file"]).read_text())
    raw = (out / call["adapter"]["file"]).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert header.pop("__metadata__") == {"base": call["base"], "rank": str(call["adapter"]["rank"])}
    assert {name: entry["shape"] for name, entry in header.items()} == call["adapter"]["inputs"]
    adapter = {
        name: np.frombuffer(raw[start:][slice(*entry["data_offsets"])], "<f2").reshape(entry["shape"])
        for name, entry in header.items()
    }
    assert all((out / name).is_file() for name in call["tokenizer"]["files"])
    ids, prompt = golden["token_ids"], golden["prompt_tokens"]
    assert ids[:prompt] == [*call["start_ids"], *Tokenizer.load(out).encode(call["golden"]["prompt"])]
    program, mask = MilProgram(out / call["package"]), call["inputs"]["causal_mask"]
    states = {name: np.zeros(state["shape"], state["dtype"]) for name, state in call["states"].items()}
    rows: list[np.ndarray] = []
    while len(rows) < len(ids):
        t = min(call["prefill_tokens"], prompt - len(rows)) if len(rows) < prompt else 1
        m = len(rows) + t
        seen = np.arange(m)[None] <= m - t + np.arange(t)[:, None]
        inputs = {"input_ids": np.array([ids[len(rows) : m]], np.int32), **adapter}
        inputs["causal_mask"] = np.where(seen, mask["seen"], mask["hidden"]).astype(np.float16)[None, None]
        rows += list(program.run(inputs, states)["logits"][0])
    found = np.take_along_axis(np.array(rows, np.float32), np.array(golden["top_token_ids"]), axis=1)
    expected = np.array(golden["top_logits"])
    assert np.abs(found - expected).max() < CLOSE * expected.std()


def test_what_cannot_be_done_is_said_before_the_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match="no adapter of tiny to export"):
        coreml.write(job_of(folder, adapter_as="functions"), tmp_path)
    with pytest.raises(UsageError, match="inputs, functions or merged"):
        coreml.write(job_of(folder, adapter_as="state"), tmp_path)
    with pytest.raises(ResourceError, match=r"--memory allows 0\.10 GB"):
        check_memory(coreml.peak_memory, replace(job_of(folder), memory=100 << 20))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "coremltools" else find(name))
    with pytest.raises(ResourceError, match="needs coremltools"):
        coreml.write(job_of(folder), tmp_path)
    assert not list(tmp_path.iterdir())


# --- the evaluator against torch ---------------------------------------------------------------------------------------------


def half(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float16)


def as_torch(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).float()


Q, K, V, MASK = half(1, 4, 3, 16), half(1, 4, 5, 16), half(1, 4, 5, 16), half(1, 1, 3, 5)
X, W, B = half(1, 3, 64), half(32, 64), half(32)
GRID = half(2, 3, 8, 4)
CASES: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "attention": ("scaled_dot_product_attention", {"query": Q, "key": K, "value": V, "attn_mask": MASK},
        lambda: F.scaled_dot_product_attention(as_torch(Q), as_torch(K), as_torch(V), as_torch(MASK))),
    "linear": ("linear", {"x": X, "weight": W, "bias": B}, lambda: F.linear(as_torch(X), as_torch(W), as_torch(B))),
    "matmul": ("matmul", {"x": X, "y": W[None], "transpose_y": True}, lambda: as_torch(X) @ as_torch(W).T),
    "mean": ("reduce_mean", {"x": X, "axes": [-1], "keep_dims": True}, lambda: as_torch(X).mean(-1, keepdim=True)),
    "rsqrt": ("rsqrt", {"x": np.abs(X), "epsilon": np.float16(1e-3)},
        lambda: torch.rsqrt(as_torch(np.abs(X)) + float(np.float16(1e-3)))),
    "silu": ("silu", {"x": X * 100}, lambda: F.silu(as_torch(X * 100))),
    "gather": ("gather", {"x": W, "indices": np.array([[3, 0]], np.int32), "axis": 0},
        lambda: F.embedding(torch.tensor([[3, 0]]), as_torch(W))),
    "slice": ("slice_by_index", {"x": GRID, "begin": [1, 0, 2, 0], "end": [2, 9, 6, 0], "end_mask": [0, 0, 0, 1],
        "begin_mask": [0, 1, 0, 0], "squeeze_mask": [1, 0, 0, 0], "stride": [1, 1, 2, 1]}, lambda: as_torch(GRID)[1, :, 2:6:2]),
    "tile": ("tile", {"x": GRID, "reps": [1, 2, 1, 3]}, lambda: as_torch(GRID).repeat(1, 2, 1, 3)),
    "reshape": ("reshape", {"x": GRID, "shape": [0, -1, 4]}, lambda: as_torch(GRID).reshape(2, 24, 4)),
    "transpose": ("transpose", {"x": GRID, "perm": [0, 2, 1, 3]}, lambda: as_torch(GRID).permute(0, 2, 1, 3)),
    "expand": ("expand_dims", {"x": GRID, "axes": [2]}, lambda: as_torch(GRID).unsqueeze(2)),
    "concat": ("concat", {"values": [GRID, GRID], "axis": -1}, lambda: torch.cat([as_torch(GRID)] * 2, -1)),
    "select": ("select", {"cond": X > 0, "a": X, "b": -X}, lambda: as_torch(X).abs()),
    "scale": ("constexpr_blockwise_shift_scale", {"data": np.arange(-8, 8, dtype=np.int8).reshape(2, 8), "scale": half(2, 2)},
        lambda: torch.arange(-8.0, 8).view(2, 2, 4).mul(as_torch(half(2, 2)).unsqueeze(2)).view(2, 8)),
    "table": ("constexpr_lut_to_dense", {"indices": np.array([[3, 1]], np.uint8), "lut": half(1, 1, 16, 1)},
        lambda: as_torch(half(1, 1, 16, 1)).view(-1)[torch.tensor([[3, 1]])]),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_an_operation_is_torchs(case: str) -> None:
    name, arguments, expected = CASES[case]
    torch.testing.assert_close(
        torch.from_numpy(np.asarray(OPERATIONS[name](arguments))).float(), expected(), rtol=1e-5, atol=1e-5
    )


def test_slice_update_writes_only_its_slice_and_never_broadcasts() -> None:
    place = {"x": GRID, "begin": [1, 0, 2, 0], "end": [2, 3, 4, 4]}
    updated = OPERATIONS["slice_update"]({**place, "update": np.ones((1, 3, 2, 4), np.float16)})
    expected = GRID.copy()
    expected[1:2, 0:3, 2:4] = 1
    assert (updated == expected).all()
    with pytest.raises(ModelError, match="slice_update writes"):
        OPERATIONS["slice_update"]({**place, "update": np.ones((1, 3, 1, 4), np.float16)})


def test_an_unknown_operation_and_a_missing_input_are_named(tmp_path: Path) -> None:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 4))], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return mb.erf(x=x)

    ct.convert(
        program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True, package_dir=str(tmp_path / "p.mlpackage")
    )
    opened = MilProgram(tmp_path / "p.mlpackage")
    with pytest.raises(ModelError, match="operation erf, which"):
        opened.run({"x": np.zeros((1, 4), np.float32)}, {})
    with pytest.raises(ModelError, match="takes an input x"):
        opened.run({}, {})


# --- all forms, on real weights ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("adapter_as", [None, "inputs", "functions", "merged"])
@pytest.mark.parametrize("weights", ["nf4", "int4", "fp16"])
def test_the_demo_in_every_form(weights: str, adapter_as: str | None, tmp_path: Path) -> None:
    adapter = None if adapter_as is None else an_adapter(DEMO, rank=8)
    job = job_of(DEMO, weights, adapter, adapter_as)
    package = written(job, tmp_path / "out")
    expected = verify.golden(job, IDS, stored_model(job))  # type: ignore[arg-type]
    found = verify.compare(expected, package, verify.BOUNDS["coreml", weights])
    assert found.holds(verify.BOUNDS["coreml", weights])
    assert found.max_logit_difference < 0.1
