"""Build a Llama that runs from an opened checkpoint: map its weights where possible, quantise them where asked to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from edgetune.runtime import nf4, vocabulary
from edgetune.runtime.checkpoint import Checkpoint, block_shapes, model_shapes
from edgetune.runtime.config import LINEARS, LlamaConfig, QuantConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.linear import Linear
from edgetune.runtime.model import Block, Llama, final_norm_weight, norm_weight
from edgetune.runtime.names import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEAR_WEIGHT,
    is_linear,
    layer_tensor,
    linear_weight,
)
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import Weight
from edgetune.runtime.pager import PagedLayer, PagedWeight, Pager, Resident, Streamer
from edgetune.runtime.untrusted_file import MODEL_WEIGHTS, open_untrusted
from edgetune.runtime.vocabulary import FILE, Embedding, Head, StoredRows

LinearForm = QuantConfig | torch.dtype | None
"""The form that dense linears are loaded in: NF4 for a QuantConfig, rows of 8 bits for torch.int8, dense in bf16 for
torch.bfloat16 whatever dtype the model computes in, and for None dense in the dtype that it computes in."""


def load_llama(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | None = None,
    quant: LinearForm = None,
    layer_memory: int | None = None,
    embedding_in_file: bool = False,
    head_kind: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Llama:
    """Return the model on `device`, computing in `dtype`.

    A quantised folder is mapped: nothing is copied but the norms. Of any other folder `quant` says what becomes of the linears,
    one layer at a time; those that are stored in just that form are mapped too. If the linears of all layers take more than
    `layer_memory` bytes, the layers that do not fit are streamed from the files.

    The embedding is mapped or, with `embedding_in_file`, read from its file row by row. `head_kind` says where the head is:
    None maps it, vocabulary.FILE reads it from its file, and one of vocabulary.KINDS quantises it now. A model with tied
    embeddings uses one tensor for both if both are mapped or both stay in the file; otherwise the head is separate.

    progress: receives the layers loaded and all layers, embedding and head apart; it may raise.

    Raises ModelError for weights that hold inf or NaN, or that would have to be streamed and are not stored as `quant` says;
    ResourceError if `layer_memory` does not hold two layers.
    """
    device = device or torch.device("cpu")
    config = checkpoint.config
    streams = layer_memory is not None and _linear_bytes(checkpoint) > layer_memory
    if streams and quant is not None and not stored_as(checkpoint, quant):
        raise ModelError(
            f"{checkpoint.folder} is not quantised and does not fit; type `edgetune quantize {checkpoint.folder} DEST` once."
        )
    checkpoint.refuse_inf_and_nan(checkpoint.long_floats(linears=quant in (None, torch.bfloat16)))
    blocks = []
    for layer in range(config.num_layers):
        progress(layer, config.num_layers)
        blocks.append(_block(checkpoint, layer, dtype, device, quant, streams))
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
    norm = final_norm_weight(checkpoint.dense(FINAL_NORM), config).to(device)
    return Llama(config, embedding, blocks, norm, head, dtype, pager)


def _block(
    checkpoint: Checkpoint, layer: int, dtype: torch.dtype, device: torch.device, quant: LinearForm, streams: bool
) -> Block:
    """Return a layer with its tensors on `device`; with `streams`, its linears are still those of the files."""
    stored = checkpoint.block_tensors(layer)
    tensors = {
        name: weight
        if streams and is_linear(name)
        else _placed(layer_tensor(layer, name), weight, checkpoint.config, dtype, device, quant)
        for name, weight in stored.items()
    }
    block = Block(checkpoint.config, layer, tensors)
    for name, weight in tensors.items():
        if weight is not stored[name]:  # the copy is used from now on: free the file's pages
            checkpoint.release(layer_tensor(layer, name))
    return block


def dense_layer(checkpoint: Checkpoint, layer: int, dtype: torch.dtype, device: torch.device) -> dict[str, Weight]:
    """Return a layer's tensors by their names inside it, as load_llama gives them to a Block: the linears dense, in `dtype`."""
    tensors = checkpoint.block_tensors(layer)
    return {
        name: _placed(layer_tensor(layer, name), weight, checkpoint.config, dtype, device, None)
        for name, weight in tensors.items()
    }


def release_layer(checkpoint: Checkpoint, layer: int) -> None:
    """Let the system drop the mapped pages of a layer's tensors, which nobody reads now."""
    for name in block_shapes(checkpoint.config):
        checkpoint.release(layer_tensor(layer, name))


def _embedding(checkpoint: Checkpoint, device: torch.device, in_file: bool) -> Embedding:
    if in_file:
        return _in_file(checkpoint, EMBEDDING, device)
    embedding = checkpoint.dense(EMBEDDING).to(device)
    if device.type != "cpu":
        checkpoint.release(EMBEDDING)
    return embedding


def _head(checkpoint: Checkpoint, name: str, device: torch.device, kind: str | None) -> Head:
    """Return the head in the form that `kind` asks for; one that is stored in 4 bits keeps them."""
    weight = checkpoint.tensor(name)
    if kind is None or not isinstance(weight, Tensor):
        head = weight.to(device)
        if device.type != "cpu":
            checkpoint.release(name)
        return head
    if kind == FILE:
        return _in_file(checkpoint, name, device)
    try:
        quantized = vocabulary.quantize(weight, kind)
    except ValueError as error:
        raise ModelError(f"{name} cannot be quantised: {error}; copy the model folder again.") from error
    checkpoint.release(name)
    return quantized.to(device)


def _in_file(checkpoint: Checkpoint, name: str, device: torch.device) -> StoredRows:
    path, stored = checkpoint.located(name)
    checkpoint.release(name)
    return StoredRows(open_untrusted(path, MODEL_WEIGHTS), stored.start, stored.dtype, stored.shape, device)


def stored_as(checkpoint: Checkpoint, quant: LinearForm) -> bool:
    """Return True if the files hold every linear in just this form, so that none has to be converted in memory."""
    if checkpoint.quant is not None:
        return isinstance(quant, QuantConfig)
    shapes = model_shapes(checkpoint.config)
    return all(checkpoint.stored[name].dtype == quant for name in shapes if is_linear(name))


def _linear_bytes(checkpoint: Checkpoint) -> int:
    """Return the stored bytes of the linears of all layers, which a model without streaming keeps in memory."""
    return sum(tensor.nbytes for name, tensor in checkpoint.stored.items() if LINEAR_WEIGHT in name)


def _paged(checkpoint: Checkpoint, block: Block, device: torch.device) -> PagedLayer:
    """Return a block's linears as weights that the pager reads from their files, and release their mapped pages."""
    weights = []
    for name in LINEARS:
        full = linear_weight(block.layer, name)
        weights.append(_paged_weight(checkpoint, full, getattr(block, name), device))
        checkpoint.release(full)
    return PagedLayer(weights)


def _paged_weight(checkpoint: Checkpoint, name: str, linear: Linear, device: torch.device) -> PagedWeight:
    weight = linear.weight
    if isinstance(weight, Tensor):
        dtype, shape = weight.dtype, weight.shape
        no_bytes = torch.empty(0, dtype=dtype, device=device)
        return PagedWeight(linear, (checkpoint.located(name),), lambda raw: raw.view(dtype).view(shape), no_bytes)
    assert isinstance(weight, QuantizedTensor)  # no file holds rows of 8 bits
    nested = weight.state.nested
    if nested is not None:  # the second level is short: it stays in memory
        nested = replace(nested, absmax=nested.absmax.to(device, copy=True), table=nested.table.to(device, copy=True))
    parts, absmax = [checkpoint.located(name)], weight.state.absmax
    path, stored = checkpoint.located(f"{name}.absmax")
    streamed = (stored.dtype, stored.shape) == (absmax.dtype, absmax.shape)
    if streamed:  # else bnb_layout rearranged it, the file does not hold these bytes, and it stays in memory
        parts.append((path, stored))
    kept = torch.empty(0, dtype=absmax.dtype, device=device) if streamed else absmax.to(device, copy=True)
    state = replace(weight.state, absmax=kept, nested=nested)

    def make(packed: Tensor, *scales: Tensor) -> QuantizedTensor:
        filled = replace(state, absmax=scales[0].view(state.absmax.dtype)) if scales else state
        return QuantizedTensor(packed.view(-1, 1), filled)

    placeholder = QuantizedTensor(torch.empty(0, 1, dtype=torch.uint8, device=device), state)
    return PagedWeight(linear, tuple(parts), make, placeholder)


def _placed(
    name: str, weight: Weight, config: LlamaConfig, dtype: torch.dtype, device: torch.device, quant: LinearForm
) -> Weight:
    """Return a layer's tensor on `device`: a linear in the form of `quant`, a norm in fp32, a bias in the compute dtype."""
    if not isinstance(weight, Tensor):
        return weight if device.type == "cpu" else weight.to(device)
    if name.endswith("norm.weight"):
        return norm_weight(weight, config).to(device)
    if not is_linear(name):
        return weight.to(device, dtype)
    if quant in (None, torch.bfloat16):
        return weight.to(device, torch.bfloat16 if quant == torch.bfloat16 else dtype)
    try:
        if not isinstance(quant, QuantConfig):
            return vocabulary.quantize(weight, "int8").to(device)
        return nf4.quantize(weight, quant.quant_type, quant.block_size, quant.double_quant).to(device)
    except ValueError as error:
        raise ModelError(f"{name} cannot be quantised: {error}; copy the model folder again.") from error
