"""Name the tensors of a model the way Hugging Face's LLaMA does: "model.layers.0.self_attn.q_proj.weight".

The names of the seven linears alone ("q_proj", …) stand in config.py, since configurations list them too.
"""

from __future__ import annotations

from edgetune.runtime.config import ATTENTION_LINEARS

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
"""The three tensors outside the layers. A model with tied embeddings has no HEAD: it uses EMBEDDING."""
ATTENTION_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
"""The norms before attention and before the MLP, by their names inside a layer."""
POST_ATTENTION_NORM = MLP_NORM
PRE_MLP_NORM, POST_MLP_NORM = "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"
"""The other three of a model with four norms a layer (Gemma 3), where the second name stands for another norm."""
Q_NORM, K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"
"""The norms of each head's queries and keys (Qwen3 and Gemma 3), by their names inside a layer."""
LINEAR_WEIGHT = "_proj.weight"
"""Ends the name of every linear's weight, and stands in the names of all parts of a 4-bit one."""


def layer_tensor(layer: int, name: str) -> str:
    """Return the full name of a layer's tensor: (3, "input_layernorm.weight") -> "model.layers.3.input_layernorm.weight"."""
    return f"model.layers.{layer}.{name}"


def hf_linear_name(name: str) -> str:
    """Return a linear's name inside its layer: "q_proj" -> "self_attn.q_proj", "up_proj" -> "mlp.up_proj"."""
    return f"self_attn.{name}" if name in ATTENTION_LINEARS else f"mlp.{name}"


def linear_weight(layer: int, name: str) -> str:
    """Return the full name of a linear's weight: (3, "up_proj") -> "model.layers.3.mlp.up_proj.weight"."""
    return layer_tensor(layer, f"{hf_linear_name(name)}.weight")


def is_linear(name: str) -> bool:
    """Return True for the weight of one of a layer's seven linears, the tensors that NF4 and LoRA apply to."""
    return name.endswith(LINEAR_WEIGHT)
