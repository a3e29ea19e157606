"""Tiny random models of every family, made by transformers on the spot, and notes to train them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1": ("Llama", {"num_key_value_heads": 4}),
    "llama-2-grouped": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-3.2-tied-scaled": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-head-dim": ("Llama", {"head_dim": 32}),
    "llama-attention-bias": ("Llama", {"attention_bias": True}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 8}),
    "mistral-window": ("Mistral", {"sliding_window": 16, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2.5-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def transformers_model(family: str, **changes: Any) -> Any:
    """A tiny model of a family with random weights, in fp32, norms and biases random too."""
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **own, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if "norm" in tensor_name or tensor_name.endswith("bias"):
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif tensor.dim() == 2:
                tensor.mul_(3.0)
    return model


def save_model(folder: Path, family: str = "llama-2-grouped", **changes: Any) -> Any:
    """Write such a model as a Hugging Face folder and return it."""
    model = transformers_model(family, **changes)
    model.save_pretrained(folder)
    return model
