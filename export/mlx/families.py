"""Spell out config.json for mlx-lm, family by family, and refuse what mlx-lm would compute differently.

Source: the model files of mlx-lm 0.29 to 0.31 and its rope_utils.
"""

from __future__ import annotations

import math
from typing import Any

from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.rope_config import RopeConfig


def refuse_unlike(config: LlamaConfig, name: str) -> None:
    """Raise ModelError, with the reason, for a model that mlx-lm does not have or would compute differently."""
    reason = _unlike(config, name)
    if reason is not None:
        raise ModelError(f"{reason}; type `edgetune export hf` or `edgetune export peft`.")


def _unlike(config: LlamaConfig, name: str) -> str | None:
    """Return what mlx-lm lacks for a model; None where it has everything."""
    kind, rope = config.model_type, config.rope
    if kind in ("phi3", "granitemoehybrid"):
        return f"export mlx does not write the linears that {kind} models, such as {name}, store as one matrix"
    if config.qk_norm and config.o_bias:
        family = "Qwen3" if kind == "qwen3" else "Gemma 3"
        return f"mlx-lm's {family} has no biases, and {name} has them in its attention (attention_bias)"
    if rope.kind == "yarn" and not rope.truncate:
        return f"mlx-lm's YaRN rounds the bounds of its ramp, and {name} does not (truncate)"
    if kind == "granite" and config.head_dim * config.num_heads != config.hidden_size:
        return f"mlx-lm's Granite has heads of hidden_size / heads, and {name} has heads of {config.head_dim}"
    if kind == "gemma3_text" and sliding_pattern(config) is None:
        return f"mlx-lm's Gemma 3 has windows in a regular pattern, and {name} has another (layer_types)"
    if kind == "gemma3_text" and any(each is not None and each.kind != "default" for each in config.ropes if each != rope):
        return f"mlx-lm's Gemma 3 has no scaling of the local RoPE, and {name} has"
    return None


def sliding_pattern(config: LlamaConfig) -> int | None:
    """Return p if layers p, 2p, … (counted from 1) and no others see everything; None if no number fits."""
    full = [layer + 1 for layer, window in enumerate(config.windows) if window is None]
    every = full[0] if full else config.num_layers + 1
    return every if full == list(range(every, config.num_layers + 1, every)) else None


def rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """Return the settings of a scaled RoPE as mlx-lm reads them, None where it is not scaled."""
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        # mlx-lm has no attention factor, but derives one: (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).
        stretch = 0.1 * math.log(rope.factor)
        magnitude = (rope.attention_factor - 1) / stretch if stretch else 1.0
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "mscale": magnitude, "mscale_all_dim": 0.0}
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return scaling


def own_keys(config: LlamaConfig) -> dict[str, Any]:
    """Return the keys of config.json that mlx-lm has for this family alone."""
    kind = config.model_type
    if kind == "smollm3":
        return {"no_rope_layers": [int(rope is not None) for rope in config.ropes]}
    if kind == "granite":
        return {
            "attention_bias": config.qkv_bias,
            "mlp_bias": False,
            "embedding_multiplier": config.embedding_scale,
            "attention_multiplier": config.score_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": config.logit_divisor,
        }
    if kind == "ministral3":
        plain = {"rope_type": "default", "original_max_position_embeddings": max(1, config.rope.original_max_positions)}
        scaling = rope_scaling(config.rope) or plain
        return {
            "rope_parameters": {**scaling, "rope_theta": config.rope.theta, "llama_4_scaling_beta": config.rope.query_beta},
            "sliding_window": config.windows[0],
            "layer_types": ["full_attention" if window is None else "sliding_attention" for window in config.windows],
        }
    if kind == "gemma3_text":
        local = next((rope for rope, window in zip(config.ropes, config.windows, strict=True) if window), config.rope)
        return {
            "rope_local_base_freq": 10000.0 if local is None else local.theta,
            "query_pre_attn_scalar": config.score_scale**-2,
            "sliding_window": next((window for window in config.windows if window), config.max_positions),
            "sliding_window_pattern": sliding_pattern(config),
        }
    return {}
