"""Read and write 4-bit weights in the layout of bitsandbytes' checkpoints: codes under the weight's own name, scales beside it.

    NAME                                   u8 (ceil(n/2), 1)
    NAME.absmax                            u8 (nb,) codes when doubly quantised, else f32 (nb,)
    NAME.quant_map                         f32 (16,)
    NAME.nested_absmax, .nested_quant_map  f32 (ceil(nb/256),), f32 (256,)
    NAME.quant_state.bitsandbytes__nf4     the bytes of a JSON: quant_type, blocksize, dtype, shape, nested_*

Source: bitsandbytes.functional.QuantState.as_dict and from_dict.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import nf4
from edgetune.runtime.json_file import parse
from edgetune.runtime.nf4 import FLOATS, NESTED_BLOCK_SIZE, NestedAbsmax, QuantizedTensor, QuantState
from edgetune.runtime.safetensors_file import ALIGNMENT, StoredTensor, TensorSpec
from edgetune.runtime.untrusted_file import MAX_STATE_BYTES

STATE_PREFIX = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
STATE_BYTES = 256
"""Bytes that the JSON of a weight is padded to with spaces: a multiple of 64, and more than any that edgetune writes."""
_MAX_OFFSET = 65504.0  # largest mean of absmax that is read: the largest number in fp16
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


@dataclass(frozen=True)
class StoredState:
    """The content of the JSON of a stored weight."""

    quant_type: str
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_block_size: int | None = None
    nested_offset: float = 0.0


def parse_state(raw: bytes | memoryview) -> StoredState:
    """Read the JSON of a weight. Raises ValueError with the fault as a clause, for a message that names the tensor."""
    if len(raw) > MAX_STATE_BYTES:
        raise ValueError(f"its quant_state takes {len(raw):,} bytes, more than the limit of {MAX_STATE_BYTES:,}")
    try:
        fields = parse(bytes(raw))
        quant_type, block_size = fields["quant_type"], fields["blocksize"]
        dtype, shape = fields["dtype"], fields["shape"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("its quant_state is not valid JSON or lacks a key") from error
    if quant_type != "nf4":
        raise ValueError(f"its data type is {reprlib.repr(quant_type)}, and edgetune reads only 'nf4'")
    if type(block_size) is not int or block_size not in nf4.BLOCK_SIZES or not isinstance(dtype, str) or dtype not in _DTYPES:
        found = f"block size {reprlib.repr(block_size)} or dtype {reprlib.repr(dtype)}"
        raise ValueError(f"its {found} is not one that bitsandbytes writes")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise ValueError(f"its shape {reprlib.repr(shape)} is not a list of two positive numbers")
    nested, offset = fields.get("nested_blocksize"), fields.get("nested_offset", 0.0)
    whole = nested is None or (type(nested) is int and nested == NESTED_BLOCK_SIZE)
    if not whole or type(offset) not in (int, float) or not abs(offset) <= _MAX_OFFSET:
        found = f"nested block size {reprlib.repr(nested)} or offset {reprlib.repr(offset)}"
        raise ValueError(f"its {found} is not one that bitsandbytes writes")
    return StoredState(quant_type, block_size, _DTYPES[dtype], tuple(shape), nested, float(offset))


def check_parts(name: str, state: StoredState, stored: dict[str, StoredTensor]) -> list[str]:
    """Return the faults of the stored tensors of the weight `name`: missing, or of a size or dtype that contradicts `state`."""
    n = math.prod(state.shape)
    blocks = -(-n // state.block_size)
    wanted = {"": (n + 1) // 2, ".quant_map": 16}  # bytes of the codes, values of the others
    nested = state.nested_block_size
    wanted[".absmax"] = blocks
    transposed = [_transposed_shape(state)] if nested is None else []
    if nested is not None:
        wanted |= {".nested_absmax": -(-blocks // nested), ".nested_quant_map": 256}
    faults = []
    for suffix, count in wanted.items():
        tensor = stored.get(name + suffix)
        if tensor is None:
            faults.append(f"{name}{suffix} is missing")
        elif (tensor.nbytes if suffix == "" else math.prod(tensor.shape)) != count:
            faults.append(f"{name}{suffix} has shape {list(tensor.shape)}, too few or many for {list(state.shape)}")
        elif suffix == "" and len(tensor.shape) != 2:
            faults.append(f"{name} has shape {list(tensor.shape)}; expected its codes as a column")
        elif suffix == ".absmax" and tensor.shape not in ((blocks,), *transposed):
            faults.append(f"{name}.absmax has shape {list(tensor.shape)}; expected [{blocks}]")
        elif suffix == ".absmax" and tensor.dtype not in (FLOATS if nested is None else (torch.uint8,)):
            faults.append(f"{name}.absmax is {tensor.dtype}, which contradicts its quant_state")
        elif suffix not in ("", ".absmax") and len(tensor.shape) != 1:
            faults.append(f"{name}{suffix} has shape {list(tensor.shape)}; expected [{count}]")
        elif suffix in (".quant_map", ".nested_absmax", ".nested_quant_map") and tensor.dtype != torch.float32:
            faults.append(f"{name}{suffix} is {tensor.dtype}; expected float32")
    return faults


def _transposed_shape(state: StoredState) -> tuple[int, ...]:
    """Return the transposed shape (in / block_size, out) that absmax may have without double quantisation.

    bitsandbytes 0.50 rearranges weights for AVX-512 when a model runs on a CPU. When saving, it restores everything except
    this absmax, which stays transposed, and in bf16.
    """
    return (state.shape[-1] // state.block_size, state.shape[0])


def assemble(name: str, state: StoredState, get: Callable[[str, int], Tensor]) -> QuantizedTensor:
    """Return the weight that its stored parts make; `get(tensor name, alignment)` returns a mapped tensor.

    Raises ValueError if its table is not NF4's.
    """
    if not torch.equal(get(f"{name}.quant_map", 4), nf4.NF4_TABLE):
        raise ValueError(f"the table of {name} is not NF4's")
    packed = get(name, ALIGNMENT).view(torch.uint8).view(-1, 1)
    absmax, nested = get(f"{name}.absmax", ALIGNMENT), None
    if state.nested_block_size is None:
        absmax = (absmax.T if absmax.ndim == 2 else absmax).reshape(-1).float()  # see _transposed_shape
    else:
        scales, table = get(f"{name}.nested_absmax", 4), get(f"{name}.nested_quant_map", 4)
        nested = NestedAbsmax(scales, table, state.nested_offset, state.nested_block_size)
    return QuantizedTensor(packed, QuantState(absmax, state.shape, state.dtype, state.block_size, "nf4", nested))


def weight_specs(name: str, shape: tuple[int, ...], block_size: int, double_quant: bool) -> list[TensorSpec]:
    """Return the tensors that a weight of this shape is stored as."""
    n = math.prod(shape)
    blocks = -(-n // block_size)
    specs = [TensorSpec(name, torch.uint8, ((n + 1) // 2, 1))]
    if double_quant:
        specs += [
            TensorSpec(f"{name}.absmax", torch.uint8, (blocks,)),
            TensorSpec(f"{name}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),)),
            TensorSpec(f"{name}.nested_quant_map", torch.float32, (256,)),
        ]
    else:
        specs.append(TensorSpec(f"{name}.absmax", torch.float32, (blocks,)))
    specs.append(TensorSpec(f"{name}.quant_map", torch.float32, (16,)))
    specs.append(TensorSpec(f"{name}{STATE_PREFIX}nf4", torch.uint8, (STATE_BYTES,)))
    return specs


def weight_tensors(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """Return the values of the tensors that `weight_specs` lists, by name."""
    state = quantized.state
    fields: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.block_size,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    tensors = {name: quantized.packed, f"{name}.absmax": state.absmax, f"{name}.quant_map": nf4.NF4_TABLE}
    if state.nested is not None:
        fields |= {
            "nested_blocksize": state.nested.block_size,
            "nested_dtype": "float32",
            "nested_offset": state.nested.offset,
        }
        tensors |= {f"{name}.nested_absmax": state.nested.absmax, f"{name}.nested_quant_map": nf4.dynamic_map()}
    text = json.dumps(fields).encode().ljust(STATE_BYTES)
    tensors[f"{name}{STATE_PREFIX}nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors
