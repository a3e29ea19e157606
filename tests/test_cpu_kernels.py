"""Each C++ kernel gives plain torch's results on every instruction set of this machine, at odd sizes and strides."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgetune.runtime import nf4
from edgetune.runtime.backends import reference
from edgetune.runtime.errors import UsageError

cpu = pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError, reason="no C++ kernels were built")
library = sys.modules["edgetune.runtime.backends.cpu.library"]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
COMPUTE = [BF16, F32]
WIDTHS = [1, 3, 16, 31, 64, 100, 257, 2048]


# amx uses the kernels of avx512_bf16 for everything except attention.
@pytest.fixture(params=[name for name in cpu.isas() if name != "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.force_isa(request.param):
        yield request.param


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Check that two tensors differ by rounding only: two units in the last place of bf16, a few of fp32."""
    assert found.dtype == expected.dtype
    tolerance = 2**-7 if found.dtype == BF16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 100)


# ---- dequantisation: bit for bit ----


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 32), (7, 33), (5, 100), (64, 64), (13, 257), (70, 1031)])
def test_dequantize_gives_the_specifications_bits(
    isa: str, shape: tuple[int, int], double_quant: bool, dtype: torch.dtype
) -> None:
    for block_size in (32, 64, 256):
        quantized = nf4.quantize(normal(*shape), block_size=block_size, double_quant=double_quant)
        assert torch.equal(cpu.dequantize(quantized, dtype), nf4.dequantize(quantized, dtype))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_dequantize_rounds_tiny_and_huge_blocks_as_the_specification_does(isa: str, dtype: torch.dtype) -> None:
    scales = torch.tensor([0.0, 1e-44, 1e-40, 3e-38, 1e-8, 6e-5, 1.0, 65504.0, 7e4, 1e38]).repeat_interleave(64)
    quantized = nf4.quantize(normal(640) * scales, double_quant=False)
    assert torch.equal(cpu.dequantize(quantized, dtype), nf4.dequantize(quantized, dtype))


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_every_code_table_is_served(isa: str, quant_type: str) -> None:
    quantized = nf4.quantize(normal(9, 75), quant_type=quant_type)
    assert torch.equal(cpu.dequantize(quantized, BF16), nf4.dequantize(quantized, BF16))


def test_dequantize_writes_where_it_is_told(isa: str) -> None:
    quantized = nf4.quantize(normal(6, 50))
    buffer = torch.full((8, 50), 7.0)
    assert cpu.dequantize(quantized, F32, out=buffer[1:7]).data_ptr() == buffer[1:7].data_ptr()
    assert torch.equal(buffer[1:7], nf4.dequantize(quantized, F32))
    assert (buffer[0] == 7).all()
    assert (buffer[7] == 7).all()


# ---- rows and elements ----


@pytest.mark.parametrize("weight_dtype", COMPUTE)
@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_and_its_gradient(isa: str, width: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    h, dx = normal(5, width, dtype=dtype), normal(5, width, dtype=dtype, seed=1)
    weight = normal(width, dtype=weight_dtype, seed=2)
    assert_close(cpu.rms_norm(h, weight, 1e-5), reference.rms_norm(h, weight, 1e-5))
    expected = reference.rms_norm_backward(dx, h, weight, 1e-5)
    # Where h is parallel to the gradient (always at width 1), large terms cancel and only their rounding error remains.
    atol = 2e-2 if dtype == BF16 else 1e-5
    torch.testing.assert_close(cpu.rms_norm_backward(dx, h, weight, 1e-5), expected, rtol=2**-7, atol=atol)


def test_rms_norm_backward_is_the_gradient(isa: str) -> None:
    h, dx, weight = normal(7, 33), normal(7, 33, seed=1), normal(33, seed=2)
    leaf = h.double().requires_grad_()
    y = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    (expected,) = torch.autograd.grad(y, leaf, dx.double())
    torch.testing.assert_close(cpu.rms_norm_backward(dx, h, weight, 1e-5), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gated_activations_and_their_gradients_on_halves_of_one_tensor(
    isa: str, name: str, width: int, dtype: torch.dtype
) -> None:
    gate_up, dact = normal(5, 2 * width, dtype=dtype) * 4, normal(5, width, dtype=dtype, seed=1)
    gate, up = gate_up.chunk(2, dim=1)
    assert_close(getattr(cpu, name)(gate, up), getattr(reference, name)(gate, up))
    out = torch.full_like(gate_up, float("nan"))
    dgate, dup = out.chunk(2, dim=1)
    getattr(cpu, f"{name}_backward")(dact, gate, up, dgate, dup)
    wanted = torch.empty_like(gate), torch.empty_like(up)
    getattr(reference, f"{name}_backward")(dact, gate, up, *wanted)
    for found, expected in zip((dgate, dup), wanted, strict=True):
        assert_close(found, expected)


def test_the_reference_of_geglu_is_torchs() -> None:
    gate_up, dact = normal(5, 2 * 33) * 4, normal(5, 33, seed=1)
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    y = torch.nn.functional.gelu(gate, approximate="tanh") * up
    (expected,) = torch.autograd.grad(y, leaf, dact.double())
    torch.testing.assert_close(reference.geglu(*gate_up.chunk(2, dim=1)), y.detach().float())
    found = torch.empty_like(gate_up)
    reference.geglu_backward(dact, *gate_up.chunk(2, dim=1), *found.chunk(2, dim=1))
    torch.testing.assert_close(found, expected.float())


def test_swiglu_saturates_without_becoming_nan(isa: str) -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.5, -30.0, 0.0, 30.0, 88.5, 1e4]])
    assert_close(cpu.swiglu(gate, torch.ones_like(gate)), reference.swiglu(gate, torch.ones_like(gate)))
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    cpu.swiglu_backward(gate, gate, gate, dgate, dup)
    assert torch.isfinite(torch.stack([dgate, dup])).all()


@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("size", [2, 6, 64, 80, 128])
def test_rope_rotates_part_of_a_fused_product_and_back(isa: str, size: int, dtype: torch.dtype) -> None:
    angles = normal(5, size // 2)
    fused = normal(5, 4 * size, dtype=dtype)
    x, rest = fused[:, size:].view(5, 3, size), fused[:, :size].clone()
    expected = reference.rope_(x.clone(), angles.cos(), angles.sin())
    before = x.clone()
    cpu.rope_(x, angles.cos(), angles.sin())
    assert_close(x, expected)
    assert torch.equal(fused[:, :size], rest)
    cpu.rope_(x, angles.cos(), angles.sin(), inverse=True)
    torch.testing.assert_close(x, before, rtol=2**-6 if dtype == BF16 else 1e-5, atol=2**-6 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("width", WIDTHS)
def test_dropout_drops_the_same_elements_in_every_back_end(isa: str, width: int, dtype: torch.dtype) -> None:
    x = normal(5, 2 * width, dtype=dtype)[:, :width]
    for p, key in ((0.0, 1), (0.05, 0), (0.5, 2**32 + 7), (0.999, -3)):
        assert torch.equal(cpu.dropout(x, p, key), reference.dropout(x, p, key))


@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 100, 4097])
def test_cross_entropy_and_its_gradient(isa: str, vocabulary: int, dtype: torch.dtype) -> None:
    logits = normal(7, vocabulary, dtype=dtype) * 8
    targets = torch.arange(7) * 13 % vocabulary
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 1e-3])
    leaf = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights).sum(), leaf)
    losses = cpu.cross_entropy_(logits, targets, weights)
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, gradient.to(dtype), rtol=2**-7 if dtype == BF16 else 1e-5, atol=1e-5)


def test_cross_entropy_survives_extreme_logits_and_shows_nan(isa: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 3.0, 3.0], [0.0, float("nan"), 0.0]])
    losses = cpu.cross_entropy_(logits, torch.tensor([0, 1, 0]), torch.ones(3))
    torch.testing.assert_close(losses[:2], torch.tensor([0.0, 2.0]).log1p() * torch.tensor([0.0, 0.6309297535714575]))
    torch.testing.assert_close(logits[:2], torch.tensor([[0.0, 0.0, 0.0], [0.0, -0.5, 0.5]]))
    assert losses[2].isnan()
    assert logits[2].isnan().all()


# ---- threads, instruction sets ----


def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    h, weight, quantized = normal(37, 130, dtype=BF16), normal(130), nf4.quantize(normal(130, 333))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            elements = cpu.rms_norm(h, weight, 1e-5), cpu.swiglu(h, h), cpu.dropout(h, 0.3, 1)
            results.append((*elements, cpu.dequantize(quantized, BF16)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_instruction_set_that_is_not_there_is_refused_by_name() -> None:
    said = r"EDGETUNE_CPU_ISA is 'sse9', but this machine has .*scalar"
    with pytest.raises(UsageError, match=said), cpu.force_isa("sse9"):
        pass


def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from edgetune.runtime.backends import cpu; print(cpu.selected_isa())"
    for wanted in (cpu.isas()[0], "scalar"):
        result = run_python(code, EDGETUNE_CPU_ISA=wanted)
        assert result.stdout.strip() == wanted, result.stderr
    result = run_python(code, EDGETUNE_CPU_ISA="sse9")
    assert "UsageError: EDGETUNE_CPU_ISA is 'sse9'" in result.stderr


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=120)


# ---- wrong calls are refused before a pointer crosses the C ABI ----

WRONG = {
    "a dtype without a kernel": lambda: cpu.rms_norm(normal(2, 4).double(), normal(4), 1e-5),
    "a weight of another width": lambda: cpu.rms_norm(normal(2, 4), normal(5), 1e-5),
    "a transposed input": lambda: cpu.swiglu(normal(4, 2).T, normal(4, 2).T),
    "two dtypes": lambda: cpu.swiglu(normal(2, 4), normal(2, 4, dtype=BF16)),
    "an output too small": lambda: cpu.dequantize(nf4.quantize(normal(2, 4)), F32, out=normal(2, 3)),
    "an output whose rows overlap": lambda: cpu.cross_entropy_(normal(1, 4).expand(2, 4), torch.tensor([0, 1]), torch.ones(2)),
    "another device": lambda: cpu.swiglu(normal(2, 4).to("meta"), normal(2, 4).to("meta")),
    "heads of odd size": lambda: cpu.rope_(normal(2, 1, 3), normal(2, 1), normal(2, 1)),
    "positions for other rows": lambda: cpu.rope_(normal(2, 1, 4), normal(3, 2), normal(3, 2)),
    "heads that overlap": lambda: cpu.rope_(normal(2, 1, 4).expand(2, 3, 4), normal(2, 2), normal(2, 2)),
    "certain dropout": lambda: cpu.dropout(normal(2, 4), 1.0, 0),
    "a target beyond the vocabulary": lambda: cpu.cross_entropy_(normal(2, 4), torch.tensor([0, 4]), torch.ones(2)),
    "a negative target": lambda: cpu.cross_entropy_(normal(2, 4), torch.tensor([0, -100]), torch.ones(2)),
    "weights in bf16": lambda: cpu.cross_entropy_(normal(2, 4), torch.tensor([0, 1]), torch.ones(2, dtype=BF16)),
    "an integer weight": lambda: cpu.dequantize(nf4.quantize(normal(4, 4)), torch.int8),
    "packed codes cut short": lambda: cpu.dequantize(short(), BF16),
}


def short() -> nf4.QuantizedTensor:
    quantized = nf4.quantize(normal(8, 64))
    return nf4.QuantizedTensor(quantized.packed[:-1], quantized.state)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        WRONG[name]()


# ---- the library itself ----


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI", -1)
    with pytest.raises(library.KernelsMissing, match=r"expected -1\. Reinstall"):
        library.load.__wrapped__()


def test_a_library_that_was_not_built_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ImportError, match="Install a C\\+\\+ compiler and reinstall"):
        library.load.__wrapped__()


@pytest.mark.skipif(os.name == "nt", reason="CC is not how Windows chooses its compiler")
def test_an_install_without_a_compiler_succeeds_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    source = Path(__file__).resolve().parent.parent / "runtime" / "backends" / "cpu"
    spec = importlib.util.spec_from_file_location("build_kernels", source / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for variable in ("CC", "CXX", "LDSHARED", "LDCXXSHARED"):
        monkeypatch.setenv(variable, "/no/such/compiler")
    extension = setuptools.Extension(build.NAME, [str(source / "dispatch.cpp")], optional=True)
    command = build.BuildKernels(setuptools.Distribution({"name": "edgetune", "ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.ensure_finalized()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        command.run()
    messages = [str(warning.message) for warning in said if "kernels were not built" in str(warning.message)]
    assert len(messages) == 1
    assert messages[0].endswith("To build the kernels, install a C++ compiler and reinstall edgetune.")
    assert not list(tmp_path.rglob("_kernels*"))
