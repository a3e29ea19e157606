"""Compute rotary position embeddings (RoPE): a frequency for each pair of a head's numbers, then cosines and sines.

Sources: RoFormer (arXiv 2104.09864), Llama 3.1's release, YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.ops_types import Rotation
from edgetune.runtime.rope_config import RopeConfig


def rope_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return RoPE's angle per position, f64, one for each rotated pair: (hd/2,) where whole heads are rotated."""
    size = config.rotated(head_dim)
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    frequencies = 1.0 / (torch.tensor(config.theta, dtype=torch.float64) ** exponents)
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = config.low_freq_factor, config.high_freq_factor
        smooth = ((config.original_max_positions / wavelengths - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * frequencies / config.factor + smooth * frequencies
    if config.kind == "yarn":
        stretched = _yarn_ramp(config, size)
        return stretched * frequencies / config.factor + (1 - stretched) * frequencies
    if config.kind == "longrope":
        return frequencies / torch.tensor(config.short_factors, dtype=torch.float64)
    return frequencies


def _yarn_ramp(config: RopeConfig, size: int) -> Tensor:
    """Return for each frequency, f64 (size/2,), how far it is stretched: 0 for those that turn often in the original context,
    1 for those that hardly turn once, and between them a ramp (YaRN §3.2)."""

    def pair_that_turns(times: float) -> float:
        turns = math.log(config.original_max_positions / (times * 2 * math.pi))
        return size * turns / (2 * math.log(config.theta))

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001  # a ramp of no width would divide by 0
    return ((torch.arange(size // 2, dtype=torch.float64) - low) / width).clamp(0, 1)


def rotations(config: LlamaConfig, positions: Tensor, device: torch.device) -> tuple[Rotation | None, ...]:
    """Return each layer's rotation of the positions (N,), on `device`; None for a layer that rotates nothing."""
    made = {rope: _rotation(rope, config.head_dim, positions, device) for rope in set(config.ropes) if rope is not None}
    return tuple(None if rope is None else made[rope] for rope in config.ropes)


def _rotation(rope: RopeConfig, head_dim: int, positions: Tensor, device: torch.device) -> Rotation:
    # In f64, since the angles of far positions are large, and on the CPU, since MPS has no f64.
    places = positions.cpu().double().unsqueeze(1)
    angles = places * rope_frequencies(rope, head_dim)
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    k = cos.float().to(device), sin.float().to(device)
    if rope.query_beta == 0:
        return Rotation(*k, *k)
    scale = 1 + rope.query_beta * torch.log1p(torch.floor(places / rope.original_max_positions))
    return Rotation((cos * scale).float().to(device), (sin * scale).float().to(device), *k)
