"""Say, for each of llama.cpp's architectures that can be converted, what config.json and the tensors of its models look like.

A family is an entry of FAMILIES and at most a small function. Sources: the classes of llama.cpp's convert_hf_to_gguf.py, which
wrote the files, and the architectures in llama.cpp's src/models, which read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.conversion.metadata import Keys
from edgetune.conversion.rope import LONG_FACTORS, SHORT_FACTORS, longrope, plain_rope, scaling_of_yarn
from edgetune.export.gguf.names import tensor_name
from edgetune.runtime import families
from edgetune.runtime.names import hf_linear_name, layer_tensor

Settings = dict[str, Any]
"""Keys of config.json with their values."""
_SMOLLM3_UNROTATED = 4
"""Every so many layers of SmolLM3 one does not rotate: a constant of llama.cpp (n_no_rope_layer_step)."""
_GEMMA_GLOBAL = 6
"""Every so many layers of Gemma 3 one sees everything: a constant of llama.cpp (set_swa_pattern)."""
_GEMMA_27B_LAYERS = 62
"""Number of layers by which llama.cpp knows Gemma 3 27B, whose scores have a scale of their own."""


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp.

    model_type: that of config.json. settings: returns what config.json says beyond the common keys, and in place of some,
    given the length of a head. keys: keys of the metadata, after the architecture's name, that `settings` reads.
    """

    model_type: str
    settings: Callable[[Keys, int], Settings]
    keys: frozenset[str] = frozenset()
    modules: Mapping[str, str] = field(default_factory=dict)
    """llama.cpp's names of the modules of a layer that it calls otherwise than LLaMA's, by Hugging Face's names."""
    tensors: frozenset[str] = frozenset()
    """Tensors that `settings` reads."""
    reads_partial_rope: bool = False
    """`settings` takes heads of which a part is rotated."""
    norm_offset: float = 0.0
    """Number that the file's norms are larger by than Hugging Face's."""

    @property
    def architecture(self) -> str:
        """Return the class name in config.json."""
        return families.FAMILIES[self.model_type].architecture

    def tensor_name(self, name: str) -> str:
        """Return the name of a tensor in the file, given its full Hugging Face name."""
        return tensor_name(name, self.modules)


def _llama(keys: Keys, head_dim: int) -> Settings:
    """Return what differs among the models that llama.cpp calls llama: biases, and Mistral's sliding window."""
    biased = tensor_name(layer_tensor(0, f"{hf_linear_name('q_proj')}.bias")) in keys.tensors
    window = keys.whole("attention.sliding_window", 2**31 - 1, 0, least=0)
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {"rope_parameters": plain_rope(keys, head_dim), "attention_bias": biased} | (mistral if window else {})


def _qwen(keys: Keys, head_dim: int) -> Settings:
    return {"rope_parameters": plain_rope(keys, head_dim)}


def _smollm3(keys: Keys, head_dim: int) -> Settings:
    layers = keys.layers
    return {
        "rope_parameters": plain_rope(keys, head_dim),
        "no_rope_layers": [int((layer + 1) % _SMOLLM3_UNROTATED != 0) for layer in range(layers)],
        "no_rope_layer_interval": _SMOLLM3_UNROTATED,
        "layer_types": ["full_attention"] * layers,
        "use_sliding_window": False,
    }


def _granite(keys: Keys, head_dim: int) -> Settings:
    """Return Granite's four multipliers. llama.cpp takes a scaling that is not "finetuned" as no rotation at all."""
    if keys.metadata.get(f"{keys.arch}.rope.scaling.finetuned") is False:
        raise keys.unsupported("it is a Granite without rotary positions, which edgetune reads from Hugging Face folders alone")
    return {
        "rope_parameters": plain_rope(keys, head_dim),
        "embedding_multiplier": keys.real("embedding_scale", 0.0, 1e6, 1.0),
        "attention_multiplier": keys.real("attention.scale", 0.0, 1e6, head_dim**-0.5),
        "residual_multiplier": keys.real("residual_scale", 0.0, 1e6, 1.0),
        "logits_scaling": keys.real("logit_scale", 0.0, 1e6, 1.0),
    }


def _gemma_3(keys: Keys, head_dim: int) -> Settings:
    """Return Gemma 3's two RoPE bases, its windows and its scale. They are spelled as in transformers 4, which 5 reads too."""
    rope, layers = plain_rope(keys, head_dim, 1e6), keys.layers
    every = keys.whole("attention.sliding_window_pattern", 2**31 - 1, _GEMMA_GLOBAL)
    large = layers == _GEMMA_27B_LAYERS
    scalar = keys.whole("embedding_length", 2**31 - 1) // keys.whole("attention.head_count", 2**31 - 1) if large else head_dim
    kinds = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
    theta = rope.pop("rope_theta")
    return {
        "rope_parameters": None,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_local_base_freq": keys.real("rope.freq_base_swa", 0.0, 1e15, 10000.0),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.whole("attention.sliding_window", 2**31 - 1),
        "layer_types": kinds,
    }


def _phi_3(keys: Keys, head_dim: int) -> Settings:
    rope, original = longrope(keys, head_dim)
    window = keys.whole("attention.sliding_window", 2**31 - 1, 0, least=0)
    return {"rope_parameters": rope, "original_max_position_embeddings": original, "sliding_window": window or None}


def _ministral_3(keys: Keys, head_dim: int) -> Settings:
    """Return Ministral 3's YaRN, which leaves the attention as it is, and its scaling of late queries."""
    if keys.real("rope.scaling.yarn_log_multiplier", 0.0, 1e6, 1.0) != 1.0:
        raise keys.unsupported("its YaRN changes the attention, which no Ministral 3 does")
    rope = {
        "rope_type": "yarn",
        "rope_theta": keys.real("rope.freq_base", 0.0, 1e15, 10000.0),
        **scaling_of_yarn(keys),
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": keys.real("attention.temperature_scale", 0.0, 1e3, 0.0) or 0.0,
    }
    return {"rope_parameters": rope, "sliding_window": None}


_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_YARN_KEYS = frozenset(["rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier"])

FAMILIES = {
    "llama": Family("llama", _llama, frozenset(["attention.sliding_window"])),
    "qwen2": Family("qwen2", _qwen),
    "qwen3": Family("qwen3", _qwen),
    "smollm3": Family("smollm3", _smollm3),
    "granite": Family("granite", _granite, frozenset(["embedding_scale", "attention.scale", "residual_scale", "logit_scale"])),
    "gemma3": Family(
        "gemma3_text",
        _gemma_3,
        frozenset(["attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"]),
        _GEMMA_NORMS,
        norm_offset=1.0,
    ),
    "phi3": Family(
        "phi3",
        _phi_3,
        frozenset(["attention.sliding_window", "rope.scaling.attn_factor"]),
        {"qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up"},
        frozenset([LONG_FACTORS, SHORT_FACTORS]),
        reads_partial_rope=True,
    ),
    "mistral3": Family("ministral3", _ministral_3, _YARN_KEYS | {"attention.temperature_scale"}),
}
"""The families that can be converted, by llama.cpp's names of their architectures."""
