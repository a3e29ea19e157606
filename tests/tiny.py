"""Make tiny random models of every supported family, with transformers or directly as files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import edgetune

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
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MINISTRAL_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    "num_hidden_layers": 3,
}  # fmt: skip
DENSE_GRANITE_4 = {
    "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 80, "layer_types": ["full_attention"] * 3,
    "mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_state": 8,
}  # fmt: skip
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
    "qwen3-yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN_ROPE}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    "smollm3-window": (
        "SmolLM3",
        {
            "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 16,
            "tie_word_embeddings": False, "pad_token_id": 0,
        },
    ),
    "granite-3": ("Granite", GRANITE),
    "granite-4": ("GraniteMoeHybrid", {**GRANITE, **DENSE_GRANITE_4, "position_embedding_type": "rope"}),
    "granite-4-nope": ("GraniteMoeHybrid", {**GRANITE, **DENSE_GRANITE_4}),
    "ministral3": ("Ministral3", {"head_dim": 24, "rope_parameters": MINISTRAL_ROPE}),
    "phi3": ("Phi3", {"sliding_window": 16, "pad_token_id": 0}),
    "phi4-mini": (
        "Phi3",
        {
            "num_hidden_layers": 3, "tie_word_embeddings": True, "pad_token_id": 0, "head_dim": 16,
            "original_max_position_embeddings": 128, "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.25, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
            },
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 16,
            "sliding_window_pattern": 3, "tie_word_embeddings": True, "pad_token_id": 0,
        },
    ),
    "gemma3-scaled": (
        "Gemma3Text",
        {
            "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True, "pad_token_id": 0,
            "layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}  # fmt: skip
UNLIKE_LLAMA = list(FAMILIES)[list(FAMILIES).index("qwen3-yarn") :]
"""The families whose layers or whose RoPE are not Llama's or Qwen's."""


def transformers_model(family: str, **changes: Any) -> Any:
    """Return a tiny fp32 model of a family with random weights, norms and biases."""
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **own, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if "norm" in tensor_name or tensor_name.endswith("bias"):
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif tensor.dim() == 2:
                tensor.mul_(3.0)
    return model


def save_model(folder: Path, family: str = "llama-2-grouped", **changes: Any) -> Any:
    """Write a tiny random model of a family as a Hugging Face folder and return the model."""
    model = transformers_model(family, **changes)
    model.save_pretrained(folder)
    return model


def save_trainable(folder: Path, width: int = 64, inner: int = 96, layers: int = 2, dtype: torch.dtype = torch.float32) -> None:
    """Write a llama with random weights and the demo's tokenizer; a training step of two such layers takes milliseconds."""
    demo = Path(edgetune.__file__).parent / "demo"
    config = json.loads((demo / "config.json").read_text())
    vocab, d, m, kv = config["vocab_size"], width, inner, width // 2
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for layer in range(layers):
        block = {
            "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d), "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d),
            "mlp.down_proj": (d, m),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    sizes = {name: 0.1 if len(shape) > 1 else 1 for name, shape in shapes.items()}
    tensors = {name: (torch.randn(shape, generator=generator) * sizes[name]).to(dtype) for name, shape in shapes.items()}
    del config["quantization_config"]
    own = {"hidden_size": d, "intermediate_size": m, "num_hidden_layers": layers, "num_attention_heads": 4}
    config |= {**own, "num_key_value_heads": 2, "head_dim": d // 4}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads within a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save_letters(folder: Path, **changes: Any) -> None:
    """Write a tokenizer.json with 31 ids: <unk>, <s>, </s>, the letters, a space and a point. `changes` replace its keys."""
    pieces = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "▁", "."]
    control = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    made = {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": pieces[id], **control} for id in range(3)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": {piece: id for id, piece in enumerate(pieces)}, "merges": []},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({**made, **changes}))
