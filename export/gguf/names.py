"""Translate between Hugging Face and llama.cpp: names of architectures and tensors, and the order of rows in a head.

Hugging Face's LLaMA rotates the pairs (i, i + hd/2) of a head, llama.cpp's llama architecture the pairs (2i, 2i + 1). So the
rows of q and k, and of the lora_B that adds to them, are in another order there. Its qwen2 and qwen3 keep Hugging Face's order.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.names import EMBEDDING, FINAL_NORM, HEAD
from edgetune.runtime.rope_config import RopeConfig

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3", "granite": "granite",
    "gemma3_text": "gemma3",
}  # fmt: skip
"""llama.cpp's architecture for each model_type of Hugging Face."""
_REORDERED = frozenset(["llama", "granite", "smollm3", "mistral3"])
"""The architectures that have the rows of q and k in llama.cpp's order: those of LLAMA_ROPE_TYPE_NORM in llama-model.cpp."""
LINEARS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
"""llama.cpp's name of each linear."""
_MODULES = {
    **LINEARS,
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OWN_MODULES = {
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "phi3": {"qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up"},
}
"""The modules of a layer that an architecture names otherwise than LLaMA, or that LLaMA has not."""
_OUTSIDE_LAYERS = {
    EMBEDDING: "token_embd.weight",
    FINAL_NORM: "output_norm.weight",
    HEAD: "output.weight",
}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.(weight|bias)")


def architecture(config: LlamaConfig) -> str:
    """Return llama.cpp's name of a model's architecture.

    Raises ModelError for a model that llama.cpp would compute differently, with the reason.
    """
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise ModelError(f"edgetune writes no GGUF of {config.model_type} models yet; type `edgetune export hf`.")
    if config.rope.kind == "yarn":
        raise ModelError("edgetune writes no GGUF of models with YaRN yet; type `edgetune export hf`.")
    if name == "qwen3" and config.qkv_bias:
        raise ModelError("llama.cpp's qwen3 has no attention biases, but this model does; type `edgetune export hf`.")
    if name != "llama" and config.rope.kind == "llama3":
        raise ModelError(f"llama.cpp's {name} has no llama3 rope scaling, but this model does; type `edgetune export hf`.")
    if (lack := _lack(config, name)) is not None:
        raise ModelError(f"{lack}; type `edgetune export hf`.")
    return name


def _lack(config: LlamaConfig, arch: str) -> str | None:
    """Return what llama.cpp has not for a model: it takes some settings of these families for given."""
    if arch == "smollm3" and (any(config.windows) or [rope is None for rope in config.ropes] != _every(4, config.num_layers)):
        return "llama.cpp's smollm3 leaves every fourth layer unrotated and has no windows, but this model differs"
    if arch != "gemma3":
        return None
    local = {rope for rope, window in zip(config.ropes, config.windows, strict=True) if window}
    if [window is None for window in config.windows] != _every(6, config.num_layers) or local - {RopeConfig(10000.0)}:
        return "llama.cpp's gemma3 gives all but every sixth layer a window and a RoPE base of 10,000, but this model differs"
    if not math.isclose(config.score_scale, config.head_dim**-0.5):
        return "llama.cpp's gemma3 scales scores by the size of a head, but this model does not (query_pre_attn_scalar)"
    return None


def _every(step: int, layers: int) -> list[bool]:
    """Return True for layers `step`, 2 * `step`, … counted from 1."""
    return [(layer + 1) % step == 0 for layer in range(layers)]


def tensor_name(name: str, arch: str = "llama") -> str:
    """Return the name of a tensor in GGUF, given its full Hugging Face name."""
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        raise ValueError(f"no tensor of a LLaMA is called {name}")
    module = (_MODULES | _OWN_MODULES.get(arch, {}))[found[2]]
    return f"blk.{found[1]}.{module}.{found[3]}"


def is_rotated(arch: str, name: str) -> bool:
    """Return True if llama.cpp has the rows of this tensor or linear (by its Hugging Face name) in its own order."""
    return arch in _REORDERED and ("q_proj" in name or "k_proj" in name)


def to_llama_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder rows (heads * hd, ...) from Hugging Face's order to llama.cpp's."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def from_llama_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder rows (heads * hd, ...) from llama.cpp's order to Hugging Face's."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
