"""Find the settings of RoPE in a GGUF model's metadata and tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetune.conversion.metadata import Keys, shown
from edgetune.runtime.rope import rope_frequencies
from edgetune.runtime.rope_config import RopeConfig

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor (hd/2,) by which llama.cpp divides the frequencies of RoPE."""
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
"""The same for longrope, within the context before the scaling and beyond it."""
_LLAMA3_CONTEXTS = (8192, *(2**power for power in range(5, 21)))
"""Context lengths before Llama 3.1's scaling that are tried: that of all published models first."""
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
"""low_freq_factor and high_freq_factor of all published models with Llama 3.1's scaling."""
_FACTOR_ERROR = 1e-5
"""Largest relative difference of a stored factor of RoPE from the computed one. Rounding to f32 leaves 1e-7; another context
length changes some factor by more than 1e-2."""


def plain_rope(keys: Keys, head_dim: int, usual_theta: float = 10000.0) -> dict[str, Any]:
    """Return config.json's rope_parameters. Raises ModelError for a kind of RoPE that edgetune does not compute."""
    theta = keys.real("rope.freq_base", 0.0, 1e15, usual_theta)
    kind = keys.text("rope.scaling.type", "linear")
    old = keys.real("rope.scale_linear", 0.0, 1e6, 1.0)
    factor = keys.real("rope.scaling.factor", -1.0, 1e6, old) or 1.0  # llama.cpp reads 0 as no scaling
    if kind == "yarn" and ROPE_FACTORS not in keys.tensors:
        return {"rope_type": "yarn", "rope_theta": theta, **scaling_of_yarn(keys)}
    if kind not in ("none", "linear"):
        raise keys.unsupported(
            f"its RoPE is scaled by the method {shown(kind)}, which edgetune does not compute for {keys.arch}"
        )
    scaled = kind == "linear" and factor != 1.0
    if ROPE_FACTORS in keys.file.tensors:
        llama3 = _llama3_scaling(keys, RopeConfig(theta), head_dim)
        if llama3 and scaled:
            raise keys.unsupported(f"it has both {ROPE_FACTORS} and a linear scaling of RoPE")
        if llama3:
            return {"rope_type": "llama3", "rope_theta": theta, **llama3}
    if scaled:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _factors(keys: Keys, name: str, count: int) -> Tensor:
    """Return a tensor of `count` factors, f32. Raises ModelError for any other number of them."""
    shape = keys.tensors[name].shape
    if shape != (count,):
        raise keys.fault(f"its {name} has {list(shape)} numbers, expected {count}")
    return keys.file.dequantized(name)


def scaling_of_yarn(keys: Keys) -> dict[str, Any]:
    """Return the numbers of YaRN. Its ramp has the bounds of the paper where the file gives none."""
    return {
        "factor": keys.real("rope.scaling.factor", 0.0, 1e6),
        "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length", 2**31 - 1),
        "beta_fast": keys.real("rope.scaling.yarn_beta_fast", 0.0, 1e6, 32.0),
        "beta_slow": keys.real("rope.scaling.yarn_beta_slow", 0.0, 1e6, 1.0),
    }


def longrope(keys: Keys, head_dim: int) -> tuple[dict[str, Any], int]:
    """Return the rope_parameters of Phi 3, which rotates a part of each head, and the context before the scaling."""
    rotated, context = keys.whole("rope.dimension_count", head_dim, head_dim), keys.whole("context_length", 2**31 - 1)
    original = keys.whole("rope.scaling.original_context_length", 2**31 - 1, context)
    theta = keys.real("rope.freq_base", 0.0, 1e15, 10000.0)
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotated / head_dim}
    if SHORT_FACTORS not in keys.tensors or LONG_FACTORS not in keys.tensors:
        return rope, original
    short, long = (_factors(keys, name, rotated // 2).tolist() for name in (SHORT_FACTORS, LONG_FACTORS))
    attention = keys.real("rope.scaling.attn_factor", 0.0, 1e6, 1.0)
    scaling = {"short_factor": short, "long_factor": long, "attention_factor": attention}
    return rope | {"rope_type": "longrope", "original_max_position_embeddings": original, **scaling}, original


def _llama3_scaling(keys: Keys, plain: RopeConfig, head_dim: int) -> dict[str, Any]:
    """Return the parameters of Llama 3.1's scaling that give the factors in the file, or {} if all are 1.

    The factors are all that the model computes with, so it does not matter which parameters gave them. Raises ModelError if
    none of those that are tried did.
    """
    factors = _factors(keys, ROPE_FACTORS, head_dim // 2).double()
    if bool((factors == 1).all()):
        return {}
    largest = float(str(np.float32(factors.max().item())))
    unscaled = rope_frequencies(plain, head_dim)
    for context in _LLAMA3_CONTEXTS if 1 < largest < math.inf else ():
        tried = RopeConfig(plain.theta, "llama3", largest, _LLAMA3_LOW, _LLAMA3_HIGH, context)
        if torch.allclose(unscaled / rope_frequencies(tried, head_dim), factors, rtol=_FACTOR_ERROR, atol=0.0):
            numbers = {"factor": largest, "low_freq_factor": _LLAMA3_LOW, "high_freq_factor": _LLAMA3_HIGH}
            return numbers | {"original_max_position_embeddings": context}
    raise keys.unsupported(f"its {ROPE_FACTORS} holds other factors than Llama 3's scaling of RoPE gives")
