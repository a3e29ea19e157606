"""From an opened checkpoint to a Llama that runs: mapped where it can be, quantised on the way where it must be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgetune.runtime import nf4
from edgetune.runtime.checkpoint import EMBEDDING, FINAL_NORM, HEAD, Checkpoint, is_linear
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.lora import Weight
from edgetune.runtime.model import Block, Llama


def load_llama(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | None = None,
    quant: QuantConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, layers: None,
) -> Llama:
    """The model on `device`, computing in `dtype`.

    A folder that is quantised already is used as it lies: mapped, nothing copied but the norms. In one that is not, the
    linears stay dense, or become NF4 as `quant` says, a layer at a time. Raises ModelError for weights that hold inf or NaN.
    """
    device = device or torch.device("cpu")
    config = checkpoint.config
    blocks = []
    for layer in range(config.num_layers):
        tensors = {
            name: _placed(name, weight, dtype, device, quant) for name, weight in checkpoint.block_tensors(layer).items()
        }
        blocks.append(Block(config, layer, tensors))
        progress(layer + 1, config.num_layers)
    embedding = checkpoint.dense(EMBEDDING).to(device)
    head = embedding if config.tie_embeddings else checkpoint.dense(HEAD).to(device)
    norm = checkpoint.dense(FINAL_NORM).to(device, torch.float32)
    return Llama(config, embedding, blocks, norm, head.to(dtype), dtype)


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
