"""Turn ggml's blocks of quantised numbers into f32, bit for bit as the gguf package does.

That package asks for `requests` to be installed, which a program that opens no socket should not bring along, so a plain
installation of edgetune does without it. Formats: ggml-common.h and dequantize_row_* in ggml-quants.c.

Each function takes the bytes of blocks (n, bytes of a block) uint8 and returns their numbers (n, numbers of a block) f32. In
the pictures of bits below, as in ggml, a block's first number is in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgetune.export.gguf.header import TENSOR_TYPES

_CODEBOOK = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
"""The numbers that the 16 codes of IQ4_NL and IQ4_XS stand for: kvalues_iq4nl of ggml-common.h."""


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """Return the numbers (n,) f32 of whole blocks (bytes,) uint8 of a type, given by its name in ggml.

    Raises ValueError for a type that edgetune cannot read.
    """
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind]).float()
    if kind not in _BLOCKS:
        raise ValueError(f"is stored as {kind}, which edgetune cannot read; fetch the model's Q4_K_M, Q8_0 or F16 file instead")
    return _BLOCKS[kind](raw.view(-1, _BLOCK_BYTES[kind])).view(-1)


def _floats(raw: Tensor) -> Tensor:
    """Return f16 numbers as f32: (n, 2k) uint8 to (n, k)."""
    return raw.contiguous().view(torch.float16).float()


def _signed(raw: Tensor) -> Tensor:
    """Return int8 numbers as f32."""
    return raw.view(torch.int8).float()


def _fields(raw: Tensor, group: int, bits: int) -> Tensor:
    """Return the fields of `bits` bits in groups of bytes: (n, k) to (n, k * 8 / bits) uint8.

    Of each `group` bytes, the lowest fields come first, then the next higher ones.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    fields = raw.reshape(len(raw), -1, 1, group) >> shifts[:, None]
    return (fields & (1 << bits) - 1).view(len(raw), -1)


def _q4_0(raw: Tensor) -> Tensor:
    return _floats(raw[:, :2]) * (_fields(raw[:, 2:], 16, 4).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return _floats(raw[:, :2]) * _fields(raw[:, 4:], 16, 4).float() + _floats(raw[:, 2:4])


def _five_bits(raw: Tensor) -> Tensor:
    """Return the codes (n, 32) of blocks of 4 bytes with the fifth bits and 16 bytes with the others."""
    fifth = _fields(raw[:, :4], 1, 1)
    return (_fields(raw[:, 4:], 16, 4) | fifth << 4).float()


def _q5_0(raw: Tensor) -> Tensor:
    return _floats(raw[:, :2]) * (_five_bits(raw[:, 2:]) - 16)


def _q5_1(raw: Tensor) -> Tensor:
    return _floats(raw[:, :2]) * _five_bits(raw[:, 4:]) + _floats(raw[:, 2:4])


def _q8_0(raw: Tensor) -> Tensor:
    return _floats(raw[:, :2]) * _signed(raw[:, 2:])


def _scaled(scale: Tensor, codes: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Multiply the codes (n, 256) by one scale for each sub-block (n, k), and subtract its minimum (n, k)."""
    numbers = codes.view(len(codes), scale.shape[1], -1) * scale[:, :, None]
    if minimum is not None:
        numbers -= minimum[:, :, None]
    return numbers.view(len(codes), -1)


def _q2_k(raw: Tensor) -> Tensor:
    scales, codes = raw[:, :16], _fields(raw[:, 16:80], 32, 2).float()
    scale, minimum = _floats(raw[:, 80:82]) * (scales & 15), _floats(raw[:, 82:84]) * (scales >> 4)
    return _scaled(scale, codes, minimum)


def _q3_k(raw: Tensor) -> Tensor:
    low, high = _fields(raw[:, 96:104], 8, 4), _fields(raw[:, 104:108], 4, 2)
    scale = _floats(raw[:, 108:]) * ((low | high << 4).float() - 32)
    third = _fields(raw[:, :32], 32, 1)  # a bit that is not set stands for -4
    return _scaled(scale, _fields(raw[:, 32:96], 32, 2).float() - 4.0 * (third ^ 1))


def _six_bit_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and minima (n, 8) that are packed into 12 bytes: two sixes of bits of each pair 0 to 3 below the high
    two bits of pair 4 to 7, then the low fours of pairs 4 to 7."""
    scales, minima, low = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    return (
        torch.cat([scales & 63, low & 15 | scales >> 2 & 48], dim=1),
        torch.cat([minima & 63, low >> 4 | minima >> 2 & 48], dim=1),
    )


def _q4_k(raw: Tensor) -> Tensor:
    scales, minima = _six_bit_scales(raw[:, 4:16])
    return _scaled(_floats(raw[:, :2]) * scales, _fields(raw[:, 16:], 32, 4).float(), _floats(raw[:, 2:4]) * minima)


def _q5_k(raw: Tensor) -> Tensor:
    scales, minima = _six_bit_scales(raw[:, 4:16])
    codes = _fields(raw[:, 48:], 32, 4) | _fields(raw[:, 16:48], 32, 1) << 4
    return _scaled(_floats(raw[:, :2]) * scales, codes.float(), _floats(raw[:, 2:4]) * minima)


def _q6_k(raw: Tensor) -> Tensor:
    codes = _fields(raw[:, :128], 64, 4) | _fields(raw[:, 128:192], 32, 2) << 4
    return _scaled(_floats(raw[:, 208:]) * _signed(raw[:, 192:208]), codes.float() - 32)


def _q8_k(raw: Tensor) -> Tensor:
    return raw[:, :4].contiguous().view(torch.float32) * _signed(raw[:, 4:260])  # the sums of codes after them are not needed


def _iq4_nl(raw: Tensor) -> Tensor:
    return _floats(raw[:, :2]) * _CODEBOOK[_fields(raw[:, 2:], 16, 4).int()]


def _iq4_xs(raw: Tensor) -> Tensor:
    low, high = _fields(raw[:, 4:8], 1, 4), _fields(raw[:, 2:4], 1, 2)
    scale = _floats(raw[:, :2]) * ((low | high << 4).float() - 32)
    return _scaled(scale, _CODEBOOK[_fields(raw[:, 8:], 16, 4).int()])


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that are stored number by number."""
_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k,
    "Q5_K": _q5_k, "Q6_K": _q6_k, "Q8_K": _q8_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
_BLOCK_BYTES = {kind.name: kind.nbytes for kind in TENSOR_TYPES.values()}

READABLE = frozenset(_PLAIN) | frozenset(_BLOCKS)
"""The types that `dequantize` takes."""
