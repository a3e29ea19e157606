"""What llama.cpp calls things: architectures, tensors, and the order of rows in a head of its llama architecture.

Hugging Face's LLaMA rotates pairs (i, i + hd/2) of a head, llama.cpp's llama rotates (2i, 2i + 1): the rows of q and k,
and of the lora_B that adds to them, stand in another order there. Its qwen2 and qwen3 keep Hugging Face's.
"""

from __future__ import annotations

import re

from torch import Tensor

from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.names import EMBEDDING, FINAL_NORM, HEAD

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
LINEARS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
_MODULES = {
    **LINEARS,
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {
    EMBEDDING: "token_embd.weight",
    FINAL_NORM: "output_norm.weight",
    HEAD: "output.weight",
}
_INSIDE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.(weight|bias)")


def architecture(config: LlamaConfig) -> str:
    """llama.cpp's name of a model's architecture.

    Raises ModelError, naming it, for what llama.cpp would compute otherwise.
    """
    name = ARCHITECTURES[config.model_type]
    if name == "qwen3" and config.qkv_bias:
        raise ModelError("llama.cpp's qwen3 has no attention biases and this model does; export it with `edgetune export hf`.")
    if name != "llama" and config.rope.kind == "llama3":
        raise ModelError(f"llama.cpp's {name} has no llama3 rope scaling and this model does; type `edgetune export hf`.")
    return name


def tensor_name(name: str) -> str:
    """A tensor's name in GGUF, from its full Hugging Face name."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = _INSIDE.fullmatch(name)
    if found is None:
        raise ValueError(f"no tensor of a LLaMA is called {name}")
    return f"blk.{found[1]}.{_MODULES[found[2]]}.{found[3]}"


def is_rotated(arch: str, name: str) -> bool:
    """Whether the rows of the tensor with this Hugging Face name, or of such a linear, stand in llama.cpp's own order."""
    return arch == "llama" and ("q_proj" in name or "k_proj" in name)


def to_llama_rows(rows: Tensor, head_dim: int) -> Tensor:
    """(heads * hd, ...) in Hugging Face's order -> the same in llama.cpp's."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def from_llama_rows(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of to_llama_rows."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
