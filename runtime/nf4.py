"""Quantise to 4-bit NormalFloat with double quantisation, in plain torch: the specification kernels match bit for bit.

A weight is flattened row-major and cut into blocks of `block_size` (a block may cross a row, the last may be short). A
block stores its fp32 absmax, and for each value the code of the table entry nearest to value/absmax, ties to the lower code.
A byte holds two codes, the first in the HIGH nibble. Double quantisation then stores absmax - mean(absmax) as 8-bit codes of
the signed dynamic map, in blocks of 256 with an fp32 absmax each: 4 + 8/64 + 32/(64·256) = 4.127 bits a parameter.

Dequantisation is exactly this, with every operation rounded to fp32 and none fused:

    absmax = table[code] * nested_absmax;  absmax = absmax + offset          (only when doubly quantised)
    weight = code_table[code] * absmax, then rounded to the requested dtype (to nearest even)

Source: QLoRA §3 (Dettmers et al. 2023, arXiv 2305.14314); storage and rounding as in bitsandbytes' `default` back end.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# QLoRA appendix E: quantiles of N(0, 1), norm.ppf(linspace(0.9677083, 0.5, 9)[:-1]) for the eight positive values and
# -norm.ppf(linspace(0.9677083, 0.5, 8)[:-1]) for the seven negative, an exact zero between, all divided by the largest.
NF4_TABLE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of values that can share an absmax, as in bitsandbytes."""
NESTED_BLOCK_SIZE = 256
"""First-level absmax that share a second-level one (QLoRA §3, "Double Quantization")."""
QUANT_TYPES = ("nf4", "fp4", "fp4_e3m0", "int4")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

SMALLEST_ABSMAX = 1e-38
"""Least divisor of a block or row that is quantised, near the smallest normal fp32 number. A smaller absmax is replaced by it:
the values become zero, never inf or NaN."""
_CHUNK = 1 << 20  # elements worked on at a time, a multiple of every block size: temporaries stay near 16 MB


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """The second level of double quantisation: absmax of block i = table[code[i]] * absmax[i // block_size] + offset."""

    absmax: Tensor  # f32 (ceil(nb / block_size),)
    table: Tensor  # f32 (256,), ascending
    offset: float  # an fp32 value
    block_size: int = NESTED_BLOCK_SIZE


@dataclass(frozen=True, eq=False)
class QuantState:
    """The scales and facts that dequantise packed codes. n weights have nb = ceil(n / block_size) blocks."""

    absmax: Tensor  # f32 (nb,), or u8 codes (nb,) when `nested` is given
    shape: tuple[int, ...]
    dtype: torch.dtype  # the dtype that the weight had, and that it is dequantised to
    block_size: int = 64
    quant_type: str = "nf4"
    nested: NestedAbsmax | None = None


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in 4 bits. packed: u8 (ceil(n / 2), 1), the layout of bitsandbytes' checkpoints."""

    packed: Tensor
    state: QuantState

    @property
    def shape(self) -> tuple[int, ...]:
        return self.state.shape

    @property
    def numel(self) -> int:
        return math.prod(self.state.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales, without the two constant tables."""
        nested = self.state.nested
        return self.packed.nbytes + self.state.absmax.nbytes + (0 if nested is None else nested.absmax.nbytes)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same weight on another device, without requantising."""
        nested = self.state.nested
        if nested is not None:
            nested = replace(nested, absmax=nested.absmax.to(device), table=nested.table.to(device))
        state = replace(self.state, absmax=self.state.absmax.to(device), nested=nested)
        return QuantizedTensor(self.packed.to(device), state)


@functools.cache
def code_table(quant_type: str) -> Tensor:
    """Return f32 (16,), the value of each code, largest magnitude 1. Types other than "nf4" are for comparisons only."""
    if quant_type == "nf4":
        return NF4_TABLE
    if quant_type == "fp4":  # E2M1 as bitsandbytes has it (get_4bit_type): sign, 3 bits; 001 is a subnormal, bias 2
        half = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    elif quant_type == "fp4_e3m0":  # sign, 3 exponent bits, no mantissa: zero and powers of two (QLoRA table 2)
        half = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    elif quant_type == "int4":  # symmetric integers -7..7, zero twice, as bitsandbytes' get_4bit_type("int4")
        half = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    else:
        raise ValueError(f"quant_type {quant_type!r} is not one of {', '.join(QUANT_TYPES)}")
    table = torch.tensor(half + [-value for value in half], dtype=torch.float32)
    return table / table.abs().max()


@functools.cache
def dynamic_map(signed: bool = True) -> Tensor:
    """Return f32 (256,), the 8-bit dynamic map, ascending: 7 decades, each with twice the values of the last, and 0 and 1.

    The unsigned map spends the bit of the sign on the fraction. Source: 8-Bit Approximations for Parallelism in Deep Learning
    (Dettmers 2015, arXiv 1511.04561); the same values as bitsandbytes.functional.create_dynamic_map(signed).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        scale = 10 ** (exponent - 6)
        values += (scale * means).tolist() + ((-scale * means).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _midpoints(quant_type: str) -> tuple[Tensor, Tensor]:
    """Return f32 (15,), the midpoints between neighbouring values, and i64 (16,), the codes in ascending order of value."""
    table = code_table(quant_type)
    order = torch.argsort(table, stable=True)
    ascending = table[order]
    return (ascending[:-1] + ascending[1:]) / 2, order


def _absmax_and_ratio(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return absmax f32 (ceil(n / block_size),) and flat/absmax f32 (n,) in [-1, 1] of flat f32 (n,).

    Full blocks are multiplied by a reciprocal and a short last block is divided, as in bitsandbytes: the two differ in the
    last bit.
    """
    full = flat.numel() // block_size * block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    ratio = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).clamp_(-1, 1).view(-1)
    if full < flat.numel():
        last = flat[full:].abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        ratio = torch.cat([ratio, (flat[full:] / last).clamp_(-1, 1)])
    return absmax, ratio


def quantize(weight: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True) -> QuantizedTensor:
    """Quantise a weight of any shape to 4 bits, 2^20 values at a time.

    Raises ValueError for a dtype other than fp32, bf16 and fp16, an unknown type or block size, an empty weight, and
    inf or NaN among the values (they would turn their whole block, or every absmax, into NaN).
    """
    if weight.dtype not in FLOATS:
        raise ValueError(f"a weight of dtype {weight.dtype} cannot be quantised: convert it to float32 first")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no values to quantise")
    bounds, order = (tensor.to(weight.device) for tensor in _midpoints(quant_type))
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    for start in range(0, n, _CHUNK):
        values = flat[start : start + _CHUNK].float()
        scales, ratio = _absmax_and_ratio(values, block_size)
        _refuse_non_finite(scales, start, block_size, tuple(weight.shape))
        if ratio.numel() % 2:
            ratio = torch.nn.functional.pad(ratio, (0, 1))
        codes = torch.bucketize(ratio, bounds, out_int32=True)  # a value at a midpoint gets the lower entry
        codes = (codes if quant_type == "nf4" else order[codes]).to(torch.uint8)  # only NF4's codes ascend with their values
        pairs = (codes[::2] << 4) | codes[1::2]
        packed[start // 2 : start // 2 + pairs.numel(), 0] = pairs
        absmax[start // block_size : start // block_size + scales.numel()] = scales
    quantized = QuantizedTensor(packed, QuantState(absmax, tuple(weight.shape), weight.dtype, block_size, quant_type))
    return double_quantize(quantized) if double_quant else quantized


def _refuse_non_finite(absmax: Tensor, start: int, block_size: int, shape: tuple[int, ...]) -> None:
    """Raise ValueError that names the place of the first inf or NaN among blocks whose values begin at flat index `start`."""
    bad = (~torch.isfinite(absmax)).nonzero()
    if bad.numel():
        first = start + int(bad[0]) * block_size
        raise ValueError(
            f"a weight of shape {shape} holds inf or NaN between flat positions {first} and {first + block_size - 1}, "
            "and only finite weights can be quantised"
        )


def double_quantize(quantized: QuantizedTensor) -> QuantizedTensor:
    """Quantise the absmax of a weight from f32 (nb,) to u8 codes (nb,) with a NestedAbsmax; return the weight.

    torch sums more than 32,768 values in an order that depends on its number of threads: call this on one thread to get
    the same bits at any number. Raises ValueError if the mean of absmax overflows.
    """
    state = quantized.state
    offset = state.absmax.mean()
    if not torch.isfinite(offset):
        raise ValueError(f"the absmax of a weight of shape {state.shape} overflows fp32 when averaged: scale it down")
    table = dynamic_map().to(state.absmax.device)
    bounds = (table[:-1] + table[1:]) / 2
    nested, ratio = _absmax_and_ratio(state.absmax - offset, NESTED_BLOCK_SIZE)
    codes = torch.bucketize(ratio, bounds, out_int32=True).to(torch.uint8)
    state = replace(state, absmax=codes, nested=NestedAbsmax(nested, table, float(offset)))
    return QuantizedTensor(quantized.packed, state)


def expand_absmax(state: QuantState) -> Tensor:
    """Return f32 (nb,), the absmax of every block, doubly quantised or not."""
    nested = state.nested
    if nested is None:
        return state.absmax.float()
    scale = nested.absmax.repeat_interleave(nested.block_size)[: state.absmax.numel()]
    return nested.table[state.absmax.int()] * scale + nested.offset


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the dense weight in its own shape and in `dtype` (default: the dtype it had), 2^20 values at a time."""
    state = quantized.state
    n, size = quantized.numel, state.block_size
    absmax = expand_absmax(state)
    values = code_table(state.quant_type).to(quantized.device)
    byte = torch.arange(256, device=quantized.device)
    pairs = torch.stack([values[byte >> 4], values[byte & 15]], dim=1)  # (256, 2): both values of a byte
    packed = quantized.packed.view(-1)
    out = torch.empty(n, dtype=dtype or state.dtype, device=quantized.device)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        chunk = pairs[packed[start // 2 : (stop + 1) // 2].int()].view(-1)[: stop - start]
        scale = absmax[start // size : -(-stop // size)]
        full = chunk.numel() // size * size
        chunk[:full].view(-1, size).mul_(scale[: full // size].unsqueeze(1))
        if full < chunk.numel():
            chunk[full:].mul_(scale[-1])
        out[start:stop] = chunk
    return out.view(state.shape)
