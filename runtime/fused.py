"""Read and write linears that a family stores as one matrix, such as Phi's qkv_proj, as the separate linears that they are.

The rows of the linears lie one after the other, so each is a range of bytes of the file and nothing is copied. That also holds
in 4 bits, where every linear begins a block of the quantisation; another folder is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgetune.runtime.bnb_layout import PARTS, STATE_PREFIX, StoredState
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.families import FAMILIES
from edgetune.runtime.names import layer_tensor
from edgetune.runtime.safetensors_file import StoredTensor


def fused_weights(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """Return the weights of the linears that lie in each stored matrix, all by full names; empty for most families."""
    fused = FAMILIES[config.model_type].fused if config.model_type in FAMILIES else {}
    return {
        layer_tensor(layer, f"{module}.weight"): tuple(layer_tensor(layer, f"{linear}.weight") for linear in linears)
        for layer in range(config.num_layers)
        for module, linears in fused.items()
    }


def fused_shapes(config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors, by name, with the linears joined as the family stores them."""
    home = {linear: whole for whole, linears in fused_weights(config).items() for linear in linears}
    joined: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        whole = home.get(name, name)
        joined[whole] = shape if whole not in joined else (joined[whole][0] + shape[0], *shape[1:])
    return joined


def split(
    name: str, linears: Sequence[str], rows: Sequence[int], stored: Mapping[str, StoredTensor], state: StoredState | None
) -> dict[str, StoredTensor]:
    """Return the stored tensors of the linears that lie in the matrix `name`, with `rows` outputs each, as parts of it.

    state: of a matrix in 4 bits. Raises ValueError, with the fault as a clause, for a matrix of another shape or that cannot
    be split.
    """
    whole, shape = stored[name], stored[name].shape if state is None else state.shape
    if len(shape) != 2 or shape[0] != sum(rows):
        raise ValueError(f"{name} has shape {list(shape)} where config.json says {sum(rows)} rows")
    found: dict[str, StoredTensor] = {}
    first = 0
    for linear, count in zip(linears, rows, strict=True):
        begin, numbers = first * shape[1], count * shape[1]
        if state is None:
            found[linear] = _range(linear, whole, begin, (count, shape[1]))
        else:
            found |= _split_4bit(name, linear, begin, numbers, stored, state)
        first += count
    return found


def _range(name: str, whole: StoredTensor, begin: int, shape: tuple[int, ...]) -> StoredTensor:
    """Return the tensor `name` that is `shape` values of a stored one, from value `begin` on."""
    return StoredTensor(name, whole.dtype, shape, whole.start + begin * whole.dtype.itemsize)


def _split_4bit(
    name: str, linear: str, begin: int, numbers: int, stored: Mapping[str, StoredTensor], state: StoredState
) -> dict[str, StoredTensor]:
    """Return the tensors of a 4-bit linear that is `numbers` weights of the matrix `name`, from weight `begin` on."""
    blocks_at_once = state.nested_block_size or 1
    codes, absmax = stored[name], stored[f"{name}.absmax"]
    whole_blocks = begin % (state.block_size * blocks_at_once) == 0 and numbers % state.block_size == 0
    if not whole_blocks or codes.dtype.itemsize != 1 or len(absmax.shape) != 1:
        raise ValueError(
            f"{name} holds several linears in 4 bits, and {linear} does not begin a block of the quantisation: use the "
            "model's bf16 folder"
        )
    first, blocks = begin // state.block_size, numbers // state.block_size
    found = {
        linear: _range(linear, codes, begin // 2, (numbers // 2, 1)),
        f"{linear}.absmax": _range(f"{linear}.absmax", absmax, first, (blocks,)),
    }
    for part in (*PARTS[1:], f"{STATE_PREFIX}{state.quant_type}"):
        if f"{name}{part}" in stored:
            found[linear + part] = replace(stored[f"{name}{part}"], name=linear + part)
    if state.nested_block_size is not None:
        nested, part = stored[f"{name}.nested_absmax"], f"{linear}.nested_absmax"
        found[part] = _range(part, nested, first // blocks_at_once, (math.ceil(blocks / blocks_at_once),))
    return found
