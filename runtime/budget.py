"""Memory arithmetic: what each part of a training step takes, in bytes, before anything is allocated.

Letters as in model.py; S is the size of a compute element (2 for bf16). Weights are counted as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.runner import LOSS_ROWS, Recompute

TORCH_BYTES = 150_000_000
"""Anonymous memory of a process that has imported torch (146 MB measured on Linux, CPU build)."""


@dataclass(frozen=True)
class Parts:
    """Bytes by part. `total` is what the process will hold at its peak."""

    torch: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    panel: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def adapter_parameters(config: LlamaConfig, lora: LoraConfig) -> int:
    """Trained numbers: r (in + out) of each target linear."""
    shapes = config.linear_shapes()
    return config.num_layers * sum(lora.rank * sum(shapes[name]) for name in lora.targets)


def block_bytes(config: LlamaConfig, lora: LoraConfig, size: int, save_input: bool) -> int:
    """Saved bytes a token of one block: its inputs, qkv, attention's output, gate and up, and each adapter's r numbers."""
    d, f, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    qkv = q + 2 * config.num_kv_heads * config.head_dim
    saved = 2 * d + qkv + q + 2 * f + lora.rank * len(lora.targets)
    if save_input:
        saved += 2 * d + f
    return saved * size + 4 * config.num_heads


def parts(config: LlamaConfig, lora: LoraConfig, weight_bytes: int, tokens: int, recompute: Recompute, size: int) -> Parts:
    """What one step of `tokens` in one row takes."""
    d, f = config.hidden_size, config.intermediate_size
    trained = 4 * adapter_parameters(config, lora)
    block = block_bytes(config, lora, size, recompute is Recompute.NONE)
    kept = config.num_layers * (d * size if recompute is Recompute.FULL else block)
    working = block + (4 * f + 4 * d) * size  # one block's own graph and the gradients that flow through its MLP
    rows = min(tokens, LOSS_ROWS)
    return Parts(
        torch=TORCH_BYTES,
        weights=weight_bytes,
        adapter=trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=tokens * (kept + working),
        logits=2 * rows * config.vocab_size * size,
        panel=max(out * inputs for out, inputs in config.linear_shapes().values()) * size,
    )


def choose(
    config: LlamaConfig,
    lora: LoraConfig,
    weight_bytes: int,
    batch_tokens: int,
    seq_len: int,
    size: int,
    memory: int,
    allowed: Sequence[Recompute] = tuple(Recompute),
) -> tuple[Recompute, int, Parts] | None:
    """The fastest recomputation and row length that fit in `memory`; None where nothing does.

    A row as long as the batch dequantises each weight least often; recomputing a block costs more than a shorter row.
    """
    lengths = sorted({max(seq_len, batch_tokens >> halvings) for halvings in range(8)}, reverse=True)
    for recompute in allowed:
        for tokens in lengths:
            estimate = parts(config, lora, weight_bytes, tokens, recompute, size)
            if estimate.total <= memory:
                return recompute, tokens, estimate
    return None
