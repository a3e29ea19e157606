"""Makes models with random weights and batches of random tokens, as costly to run as real ones: for measuring only."""

from __future__ import annotations

from typing import Any

import torch

from edgetune.progress import Progress, ignore
from edgetune.runtime import int8, nf4
from edgetune.runtime.batch import Batch
from edgetune.runtime.budget import WeightForm
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.model import Block, Llama
from edgetune.runtime.names import ATTENTION_NORM, MLP_NORM, hf_linear_name
from edgetune.runtime.nf4 import NestedAbsmax, QuantizedTensor, QuantState
from edgetune.runtime.ops_types import Segment, Weight


def random_llama(
    config: LlamaConfig,
    dtype: torch.dtype,
    seed: int = 0,
    progress: Progress = ignore,
    form: WeightForm = WeightForm.NF4,
) -> Llama:
    """Return a model of this shape with random linears in `form`, embedding and head in `dtype`.

    progress: receives the layers made and all layers.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for layer in range(config.num_layers):
        progress(layer, config.num_layers)
        tensors: dict[str, Any] = {}
        for name, shape in config.linear_shapes().items():
            tensors[f"{hf_linear_name(name)}.weight"] = random_weight(shape, form, generator)
        for norm in (ATTENTION_NORM, MLP_NORM):
            tensors[norm] = torch.ones(config.hidden_size)
        blocks.append(Block(config, layer, tensors))
    progress(config.num_layers, config.num_layers)
    embedding = (0.02 * torch.randn(config.vocab_size, config.hidden_size, generator=generator)).to(dtype)
    head = embedding if config.tie_embeddings else embedding.clone()
    return Llama(config, embedding, blocks, torch.ones(config.hidden_size), head, dtype)


def random_weight(shape: tuple[int, int], form: WeightForm, generator: torch.Generator) -> Weight:
    """Return a weight (out_features, in_features) in `form` with random values of about 0.02."""
    if form is WeightForm.NF4:
        return random_nf4(shape, generator)
    dense = (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
    return dense if form is WeightForm.BF16 else int8.quantize(dense)


def random_nf4(shape: tuple[int, int], generator: torch.Generator) -> QuantizedTensor:
    """Return a weight (out_features, in_features) in NF4 with random codes and scales around 0.045: values of about 0.02."""
    blocks = -(-shape[0] * shape[1] // 64)
    packed = torch.randint(0, 256, (-(-shape[0] * shape[1] // 2), 1), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    nested = NestedAbsmax(torch.full((-(-blocks // 256),), 0.005), nf4.dynamic_map(), 0.045)
    return QuantizedTensor(packed, QuantState(codes, shape, torch.bfloat16, nested=nested))


def random_batch(config: LlamaConfig, tokens: int) -> Batch:
    """Return a batch of one document, (tokens,) random ids, with a loss on every token."""
    ids = torch.randint(0, config.vocab_size, (tokens + 1,), generator=torch.Generator().manual_seed(1))
    mask = torch.full((tokens,), 1 / tokens)
    return Batch(ids[:-1], ids[1:], mask, torch.arange(tokens), (Segment.packed(0, tokens),))
