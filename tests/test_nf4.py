"""The plain-torch specification of NF4 agrees with bitsandbytes' `default` torch back end and keeps its own error bounds."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.runtime import nf4

bnb_functional = pytest.importorskip("bitsandbytes.functional")

sizes = st.tuples(st.integers(1, 9), st.integers(1, 150))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
kinds = st.sampled_from(["normal", "tiny", "denormal", "huge", "zero blocks", "one value", "integers"])
blocks = st.sampled_from(nf4.BLOCK_SIZES)
seeds = st.integers(0, 2**31)


def default_kernel(name):
    """Return bitsandbytes' plain torch implementation of an op, which its C++ kernels hide on a CPU."""
    # There is no XPU here, so this resolves to the `default` kernel.
    kernel = torch.library.get_kernel(f"bitsandbytes::{name}", "XPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def call(*arguments):
        with torch.compiler.set_stance("force_eager"):
            return kernel.call_boxed(keys, *arguments)

    return call


quantize_4bit = default_kernel("quantize_4bit")
dequantize_4bit = default_kernel("dequantize_4bit")
quantize_blockwise = default_kernel("quantize_blockwise")
dequantize_blockwise = default_kernel("dequantize_blockwise")


def make(shape, kind, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if kind == "tiny":
        weight *= 1e-6
    elif kind == "denormal":
        weight *= 1e-40
    elif kind == "huge":
        weight *= 1e4  # still within fp16's range
    elif kind == "zero blocks":
        weight.view(-1)[: weight.numel() // 64 * 64] = 0
    elif kind == "one value":
        weight[:] = weight.view(-1)[0]
    elif kind == "integers":
        weight = weight.mul(4).round()
    return weight.to(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@given(sizes, kinds, dtypes, blocks, seeds)
@settings(max_examples=150, deadline=None)
def test_codes_and_absmax_are_those_of_bitsandbytes(shape, kind, dtype, block_size, seed):
    weight = make(shape, kind, dtype, seed)
    for quant_type in ("nf4", "fp4"):
        packed, absmax = quantize_4bit(weight, block_size, quant_type, torch.uint8)
        ours = nf4.quantize(weight, quant_type, block_size, double_quant=False)
        assert same_bits(ours.packed, packed)
        assert same_bits(ours.state.absmax, absmax)


@given(sizes, kinds, dtypes, blocks, seeds)
@settings(max_examples=150, deadline=None)
def test_double_quantised_absmax_and_weights_are_those_of_bitsandbytes(shape, kind, dtype, block_size, seed):
    weight = make(shape, kind, dtype, seed)
    packed, absmax = quantize_4bit(weight, block_size, "nf4", torch.uint8)
    offset = absmax.mean()
    table = bnb_functional.create_dynamic_map()
    codes, nested_absmax = quantize_blockwise(absmax - offset, table, 256)
    ours = nf4.quantize(weight, block_size=block_size)
    nested = ours.state.nested
    assert same_bits(ours.state.absmax, codes)
    assert same_bits(nested.absmax, nested_absmax)
    assert same_bits(nested.table, table)
    assert nested.offset == offset.item()
    expanded = dequantize_blockwise(codes, nested_absmax, table, 256, torch.float32) + offset
    assert same_bits(nf4.expand_absmax(ours.state), expanded)
    for out_dtype in nf4.FLOATS:
        theirs = dequantize_4bit(packed, expanded, block_size, "nf4", shape, out_dtype)
        assert same_bits(nf4.dequantize(ours, out_dtype), theirs.reshape(shape))


def test_a_tensor_of_several_chunks_equals_bitsandbytes(monkeypatch):
    monkeypatch.setattr(nf4, "_CHUNK", 4096)
    weight = make((67, 1001), "normal", torch.bfloat16, 5)
    packed, absmax = quantize_4bit(weight, 64, "nf4", torch.uint8)
    ours = nf4.quantize(weight, double_quant=False)
    assert same_bits(ours.packed, packed)
    assert same_bits(ours.state.absmax, absmax)
    theirs = dequantize_4bit(packed, absmax, 64, "nf4", weight.shape, torch.bfloat16)
    assert same_bits(nf4.dequantize(ours), theirs)


def test_public_quantiser_of_bitsandbytes_agrees_but_for_its_few_flipped_codes():
    weight = make((128, 4096), "normal", torch.float32, 1)
    packed, state = bnb_functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(weight)
    assert same_bits(ours.packed, packed)
    assert ours.state.nested.offset == state.offset.item()
    difference = (ours.state.absmax.int() - state.absmax.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.02


@given(sizes, kinds, dtypes, st.sampled_from(nf4.QUANT_TYPES), st.booleans(), seeds)
@settings(max_examples=200, deadline=None)
def test_round_trip_error_is_at_most_half_the_widest_gap(shape, kind, dtype, quant_type, double_quant, seed):
    weight = make(shape, kind, dtype, seed).float()
    quantized = nf4.quantize(weight, quant_type, double_quant=double_quant)
    plain = nf4.quantize(weight, quant_type, double_quant=False)
    table = nf4.code_table(quant_type).sort().values
    widest = max(table.diff().max() / 2, 1 - table.max(), 1 + table.min()).item()
    absmax = plain.state.absmax
    bound = absmax * widest
    if double_quant:
        # The dynamic map ends at -0.9929688; half of its widest gap is as large as the distance to -1.
        top_gap = 0.00703126
        nested = quantized.state.nested
        bound = bound + nested.absmax.repeat_interleave(256)[: len(absmax)] * top_gap
    # Allow for rounding in fp32, and for numbers below 1e-38, which become zero.
    bound = bound * (1 + 1e-5) + (absmax + absmax.mean()) * 1e-6 + 1e-38
    error = (nf4.dequantize(quantized) - weight).abs().view(-1)
    assert (error <= bound.repeat_interleave(64)[: error.numel()]).all()


@given(sizes, dtypes, seeds)
@settings(max_examples=50, deadline=None)
def test_values_on_the_grid_come_back_exactly(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, shape, generator=generator)
    codes.view(-1)[::64] = 15  # code 15 is 1.0, so every block's absmax is 1
    weight = nf4.NF4_TABLE[codes]
    assert torch.equal(nf4.dequantize(nf4.quantize(weight, double_quant=False)), weight)


def test_a_tie_takes_the_lower_code():
    low, high = nf4.NF4_TABLE[9], nf4.NF4_TABLE[10]
    middle = (low + high) / 2
    packed = nf4.quantize(torch.stack([middle, torch.tensor(1.0)]), double_quant=False).packed
    assert packed.item() == 9 << 4 | 15


def test_the_first_of_a_pair_is_the_high_nibble_and_blocks_cross_rows():
    weight = torch.zeros(3, 50)
    weight[0, 0] = 2.0  # block 0
    weight[1, 14] = -8.0  # flat position 64: the first of block 1, in the middle of a row
    ours = nf4.quantize(weight, double_quant=False)
    assert ours.state.absmax.tolist()[:2] == [2.0, 8.0]
    assert ours.packed[0, 0] >> 4 == 15
    assert ours.packed[32, 0] >> 4 == 0
    assert torch.equal(nf4.dequantize(ours), weight)


def test_odd_sizes_pack_a_zero_at_the_end():
    ours = nf4.quantize(torch.tensor([1.0, -1.0, 0.5]))
    assert ours.packed.shape == (2, 1)
    assert ours.packed[1, 0] & 15 == 7
    assert nf4.dequantize(ours).shape == (3,)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [0, 70, 129])
def test_inf_and_nan_are_refused_and_located(bad, position):
    weight = torch.ones(2, 65)
    weight.view(-1)[position] = bad
    with pytest.raises(ValueError, match=rf"\(2, 65\) holds inf or NaN between flat positions {position // 64 * 64} "):
        nf4.quantize(weight)


@pytest.mark.parametrize(
    ("weight", "settings", "message"),
    [
        (torch.ones(4, dtype=torch.float64), {}, "float64"),
        (torch.ones(4, dtype=torch.int8), {}, "int8"),
        (torch.ones(0, 4), {}, r"shape \(0, 4\) has no values"),
        (torch.ones(4), {"block_size": 60}, "block_size 60"),
        (torch.ones(4), {"quant_type": "nf3"}, "'nf3'"),
        (torch.full((128,), 3e38), {}, "overflows"),
    ],
)
def test_what_cannot_be_quantised_is_named(weight, settings, message):
    with pytest.raises(ValueError, match=message):
        nf4.quantize(weight, **settings)


def test_the_table_is_the_papers_normal_quantiles():
    normal = statistics.NormalDist()

    def quantiles(count):
        step = (0.5 - 0.9677083) / (count - 1)
        return [normal.inv_cdf(0.9677083 + i * step) for i in range(count - 1)]

    values = sorted([*quantiles(9), 0.0, *(-q for q in quantiles(8))])
    expected = torch.tensor([value / max(values) for value in values])
    assert torch.allclose(nf4.NF4_TABLE, expected, atol=1e-6)


def test_comparison_tables_are_those_of_bitsandbytes():
    assert torch.equal(nf4.code_table("fp4"), bnb_functional.get_4bit_type("fp4", device="cpu"))
    e3m0 = bnb_functional.create_fp8_map(signed=True, exponent_bits=3, precision_bits=0, total_bits=4)
    assert torch.equal(nf4.code_table("fp4_e3m0").unique(), e3m0.unique())
    # bitsandbytes' get_4bit_type("int4") raises, because it divides an integer tensor in place.
    int4 = torch.arange(-7, 8) / 7
    assert torch.equal(nf4.code_table("int4").unique(), int4)


def test_double_quantisation_costs_4_127_bits_a_parameter():
    quantized = nf4.quantize(torch.randn(512, 1024))
    assert quantized.nbytes * 8 / quantized.numel == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


def test_on_normal_weights_the_error_grows_from_nf4_over_int4_and_fp4_to_e3m0():
    """Compares mean square errors per weight. The paper compares perplexities of real models, where Int4 is worst."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))

    def error(quant_type, double_quant=False):
        return (nf4.dequantize(nf4.quantize(weight, quant_type, 64, double_quant)) - weight).square().mean().item()

    assert error("nf4") < error("int4") < error("fp4") < error("fp4_e3m0")
    assert error("nf4") < 0.6 * error("fp4")
    assert error("nf4", double_quant=True) == pytest.approx(error("nf4"), rel=0.01)


def test_the_same_bits_at_any_number_of_threads_when_absmax_is_averaged_by_one():
    weight = torch.randn(3 * 64 * 111_111, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            plain = nf4.quantize(weight, double_quant=False)
            torch.set_num_threads(1)
            results.append(nf4.double_quantize(plain))
    finally:
        torch.set_num_threads(threads)
    first, second = results
    assert same_bits(first.packed, second.packed)
    assert same_bits(first.state.absmax, second.state.absmax)
    assert first.state.nested.offset == second.state.nested.offset
