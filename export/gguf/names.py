"""Translate between Hugging Face and llama.cpp: names of architectures and tensors, and the order of rows in a head.

Hugging Face's LLaMA rotates the pairs (i, i + hd/2) of a head, llama.cpp's llama architecture the pairs (2i, 2i + 1). So the
rows of q and k, and of the lora_B that adds to them, are in another order there. Its qwen2 and qwen3 keep Hugging Face's order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.names import EMBEDDING, FINAL_NORM, HEAD

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
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
    name = ARCHITECTURES[config.model_type]
    if name == "qwen3" and config.qkv_bias:
        raise ModelError("llama.cpp's qwen3 has no attention biases, but this model does; type `edgetune export hf`.")
    if name != "llama" and config.rope.kind == "llama3":
        raise ModelError(f"llama.cpp's {name} has no llama3 rope scaling, but this model does; type `edgetune export hf`.")
    return name


def tensor_name(name: str, modules: Mapping[str, str] | None = None) -> str:
    """Return the name of a tensor in GGUF, given its full Hugging Face name.

    modules: the names in GGUF of those modules of a layer that a family calls otherwise than LLaMA, or that LLaMA has not.
    """
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        raise ValueError(f"no tensor of a LLaMA is called {name}")
    module = {**_MODULES, **(modules or {})}[found[2]]
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
