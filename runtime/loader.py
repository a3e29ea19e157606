"""From an opened checkpoint to a Llama that runs: mapped where it can be, quantised on the way where it must be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from edgetune.runtime import nf4, vocabulary
from edgetune.runtime.checkpoint import EMBEDDING, FINAL_NORM, HEAD, Checkpoint, is_linear
from edgetune.runtime.config import LINEARS, QuantConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.linear import Linear
from edgetune.runtime.model import Block, Llama, hf_linear_name
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import Weight
from edgetune.runtime.pager import PagedLayer, PagedWeight, Pager, Resident, Streamer
from edgetune.runtime.vocabulary import FILE, Embedding, Head, StoredRows


def load_llama(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | None = None,
    quant: QuantConfig | None = None,
    layer_memory: int | None = None,
    embedding_in_file: bool = False,
    head_kind: str | None = None,
) -> Llama:
    """The model on `device`, computing in `dtype`.

    A folder that is quantised already is used as it lies: mapped, nothing copied but the norms. In one that is not, the
    linears stay dense, or become NF4 as `quant` says, a layer at a time. Where the linears of all layers take more than
    `layer_memory` bytes, those that do not fit are streamed from the files. The embedding is mapped, or left in its file; the
    head too (None, vocabulary.FILE), or quantised on the way (vocabulary.KINDS). A tied model has one for both where both are
    mapped or in the file, and else a head of its own.

    Raises ModelError for weights that hold inf or NaN, or that would have to be streamed and are not quantised yet;
    ResourceError where `layer_memory` does not hold two layers.
    """
    device = device or torch.device("cpu")
    config = checkpoint.config
    streams = layer_memory is not None and _linear_bytes(checkpoint) > layer_memory
    if streams and quant is not None:
        raise ModelError(
            f"{checkpoint.folder} is not quantised and does not fit; type `edgetune quantize {checkpoint.folder} DEST` once."
        )
    blocks = []
    for layer in range(config.num_layers):
        tensors = {
            name: weight if streams and is_linear(name) else _placed(name, weight, dtype, device, quant)
            for name, weight in checkpoint.block_tensors(layer).items()
        }
        blocks.append(Block(config, layer, tensors))
        if quant is not None or device.type != "cpu":  # what was made of the file's numbers stays, the numbers need not
            for name in tensors:
                checkpoint.release(f"model.layers.{layer}.{name}")
    pager: Pager = Resident()
    if streams and layer_memory is not None:
        pager = Streamer([_paged(checkpoint, block, device) for block in blocks], layer_memory, device)
    embedding = _embedding(checkpoint, device, embedding_in_file)
    head_name = EMBEDDING if config.tie_embeddings else HEAD
    shared = config.tie_embeddings and head_kind == (FILE if embedding_in_file else None)
    head = embedding if shared else _head(checkpoint, head_name, device, head_kind)
    if isinstance(head, Tensor) and head.dtype != dtype:
        head = head.to(dtype)
        checkpoint.release(head_name)
    norm = checkpoint.dense(FINAL_NORM).to(device, torch.float32)
    return Llama(config, embedding, blocks, norm, head, dtype, pager)


def _embedding(checkpoint: Checkpoint, device: torch.device, in_file: bool) -> Embedding:
    if in_file:
        return _in_file(checkpoint, EMBEDDING, device)
    embedding = checkpoint.dense(EMBEDDING).to(device)
    if device.type != "cpu":
        checkpoint.release(EMBEDDING)
    return embedding


def _head(checkpoint: Checkpoint, name: str, device: torch.device, kind: str | None) -> Head:
    """One that is stored in 4 bits stays as it is; one that is quantised or read lets go of the mapping."""
    weight = checkpoint.tensor(name)
    if kind is None or not isinstance(weight, Tensor):
        head = weight.to(device)
        if device.type != "cpu":
            checkpoint.release(name)
        return head
    if kind == FILE:
        return _in_file(checkpoint, name, device)
    try:
        small = vocabulary.quantize(weight, kind)
    except ValueError as error:
        raise ModelError(f"{name} cannot be quantised: {error}; copy the model folder again.") from error
    checkpoint.release(name)
    return small.to(device)


def _in_file(checkpoint: Checkpoint, name: str, device: torch.device) -> StoredRows:
    path, stored = checkpoint.located(name)
    checkpoint.release(name)
    return StoredRows(path.open("rb", buffering=0), stored.start, stored.dtype, stored.shape, device)


def _linear_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the linears of all blocks as stored: what a model without streaming holds of them."""
    return sum(tensor.nbytes for name, tensor in checkpoint.stored.items() if "_proj.weight" in name)


def _paged(checkpoint: Checkpoint, block: Block, device: torch.device) -> PagedLayer:
    """A block's linears as what their files hold; the mapping that they were checked through is let go."""
    weights = []
    for name in LINEARS:
        full = f"model.layers.{block.layer}.{hf_linear_name(name)}.weight"
        weights.append(_paged_weight(checkpoint, full, getattr(block, name), device))
        checkpoint.release(full)
    return PagedLayer(weights)


def _paged_weight(checkpoint: Checkpoint, name: str, linear: Linear, device: torch.device) -> PagedWeight:
    weight = linear.weight
    if isinstance(weight, Tensor):
        dtype, shape = weight.dtype, weight.shape
        away = torch.empty(0, dtype=dtype, device=device)
        return PagedWeight(linear, (checkpoint.located(name),), lambda raw: raw.view(dtype).view(shape), away)
    nested = weight.state.nested
    if nested is not None:  # short: they stay
        nested = replace(nested, absmax=nested.absmax.to(device, copy=True), table=nested.table.to(device, copy=True))
    parts, absmax = [checkpoint.located(name)], weight.state.absmax
    path, stored = checkpoint.located(f"{name}.absmax")
    streamed = (stored.dtype, stored.shape) == (absmax.dtype, absmax.shape)
    if streamed:  # or else it was rearranged for use, and stays too
        parts.append((path, stored))
    kept = torch.empty(0, dtype=absmax.dtype, device=device) if streamed else absmax.to(device, copy=True)
    state = replace(weight.state, absmax=kept, nested=nested)

    def make(packed: Tensor, *scales: Tensor) -> QuantizedTensor:
        own = replace(state, absmax=scales[0].view(state.absmax.dtype)) if scales else state
        return QuantizedTensor(packed.view(-1, 1), own)

    return PagedWeight(linear, tuple(parts), make, QuantizedTensor(torch.empty(0, 1, dtype=torch.uint8, device=device), state))


def _placed(name: str, weight: Weight, dtype: torch.dtype, device: torch.device, quant: QuantConfig | None) -> Weight:
    """A linear as it is or as NF4; a norm in fp32; a bias in the compute dtype."""
    if not isinstance(weight, Tensor):
        return weight if device.type == "cpu" else weight.to(device)
    if not is_linear(name):
        return weight.to(device, torch.float32 if name.endswith("norm.weight") else dtype)
    if quant is None:
        return weight.to(device, dtype)
    try:
        return nf4.quantize(weight, quant.quant_type, quant.block_size, quant.double_quant).to(device)
    except ValueError as error:
        raise ModelError(f"The model cannot be quantised: {error}; copy the model folder again.") from error
