"""Say, for each family of models, how it differs from Llama: the one place that names them.

A family is data: its class, the keys of config.json that it reads, and a small function that turns them into fields of
LlamaConfig. model.py implements those fields and knows no family.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.runtime.config_keys import flag, real, unsupported, whole
from edgetune.runtime.errors import ModelError
from edgetune.runtime.rope_config import RopeConfig

Config = Mapping[str, Any]
Fields = dict[str, Any]
"""Fields of LlamaConfig by name."""
_SLIDING, _FULL = "sliding_attention", "full_attention"
_MISTRAL_WINDOW = 4096
"""Sliding window of a Mistral config that has no such key: transformers' MistralConfig."""
_THETA_OF_SMOLLM3 = 2e6
"""Base of RoPE of a SmolLM3 config that has none: transformers' SmolLM3Config."""
_YARN_OF_MINISTRAL = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
"""RoPE of a Ministral 3 config that has none: transformers' Ministral3Config."""


# ---- windows: the sliding window of each layer, None where a token sees all before it ----


def _no_windows(config: Config, layers: int) -> Fields:
    return {"windows": (None,) * layers}


def _windows(config: Config, layers: int, window: int | None, slides: Callable[[int], bool]) -> Fields:
    """Return the windows that `layer_types` gives, or `slides` where the config has no such key."""
    kinds = config.get("layer_types")
    known = kinds is None or (isinstance(kinds, list) and set(map(str, kinds)) <= {_FULL, _SLIDING})
    if not known or (window is not None and kinds is not None and len(kinds) != layers):
        raise unsupported("layer_types", reprlib.repr(kinds), f"{layers} of {_FULL}, {_SLIDING}")
    if window is None:
        return _no_windows(config, layers)
    if kinds is None:
        return {"windows": tuple(window if slides(layer) else None for layer in range(layers))}
    return {"windows": tuple(window if kind == _SLIDING else None for kind in kinds)}


def _window(config: Config, usual: int | None = None) -> int | None:
    found = config.get("sliding_window", usual)
    return None if found is None else whole({"sliding_window": found}, "sliding_window", 2**31 - 1)


def _used_window(config: Config) -> int | None:
    """Return the window of a family whose configs name one that `use_sliding_window` switches on."""
    return _window(config) if flag(config, "use_sliding_window") else None


# ---- the families ----


def _llama(config: Config, layers: int) -> Fields:
    return {"rope": RopeConfig.from_hf(config), **_no_windows(config, layers)}


def _mistral(config: Config, layers: int) -> Fields:
    return {
        "rope": RopeConfig.from_hf(config),
        **_windows(config, layers, _window(config, _MISTRAL_WINDOW), lambda layer: True),
    }


def _qwen(config: Config, layers: int) -> Fields:
    window = _used_window(config)
    first = 0 if window is None else whole(config, "max_window_layers", 2**31 - 1, 28, least=0)
    return {"rope": RopeConfig.from_hf(config), **_windows(config, layers, window, lambda layer: layer >= first)}


def _qwen2(config: Config, layers: int) -> Fields:
    return {"qkv_bias": True, "o_bias": False, **_qwen(config, layers)}


def _qwen3(config: Config, layers: int) -> Fields:
    return {"qk_norm": True, **_qwen(config, layers)}


def _smollm3(config: Config, layers: int) -> Fields:
    """Leave queries and keys of every fourth layer unrotated (NoPE, arXiv 2501.18795)."""
    interval, rotated = whole(config, "no_rope_layer_interval", 2**31 - 1, 4), config.get("no_rope_layers")
    if rotated is None:
        rotated = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or not all(type(item) in (int, bool) for item in rotated):
        raise unsupported("no_rope_layers", reprlib.repr(rotated), f"{layers} times 0 or 1")
    rope = RopeConfig.from_hf(config, usual_theta=_THETA_OF_SMOLLM3)
    ropes = tuple(rope if rotated[layer] else None for layer in range(layers))
    return {"rope": rope, "layer_ropes": ropes, **_windows(config, layers, _used_window(config), lambda i: not rotated[i])}


def _granite(config: Config, layers: int) -> Fields:
    """Multiply embedding, attention's scores and what a layer adds, and divide logits (muP, arXiv 2203.03466)."""

    def multiplier(key: str) -> float:
        return real(config, key, 0.0, 1e6, 1.0)

    return {
        "rope": RopeConfig.from_hf(config),
        "embedding_scale": multiplier("embedding_multiplier"),
        "attention_scale": multiplier("attention_multiplier"),
        "residual_scale": multiplier("residual_multiplier"),
        "logit_divisor": multiplier("logits_scaling"),
        **_no_windows(config, layers),
    }


def _granite_4(config: Config, layers: int) -> Fields:
    """Accept Granite 4 without experts and without Mamba layers: Granite 3 with other names, rotated or not."""
    kinds, places = config.get("layer_types"), config.get("position_embedding_type")
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= {"attention", _FULL}:
        raise unsupported("layer_types", reprlib.repr(kinds), f"{layers} times attention: a dense Granite 4, such as micro")
    unrotated = {} if places == "rope" else {"layer_ropes": (None,) * layers}
    size = whole(config, "shared_intermediate_size", 2**31 - 1, 1024)
    return {**_granite(config, layers), **unrotated, "intermediate_size": size}


def _ministral_3(config: Config, layers: int) -> Fields:
    """Stretch RoPE with YaRN, and scale up the queries of positions beyond the original context."""
    given = any(config.get(key) is not None for key in ("rope_parameters", "rope_scaling"))
    whole_config = config if given else {**config, "rope_parameters": _YARN_OF_MINISTRAL}
    rope = RopeConfig.from_hf(whole_config, query_beta="llama_4_scaling_beta")
    return {"rope": rope, **_windows({}, layers, _window(config), lambda layer: True)}


def _phi_3(config: Config, layers: int) -> Fields:
    """Rotate a part of each head, by longrope where the config asks for it."""
    renamed = {"su": "longrope", "yarn": "longrope"}
    rope = RopeConfig.from_hf(config, ("default", "longrope"), partial=True, renamed=renamed)
    return {"rope": rope, **_windows({}, layers, _window(config), lambda layer: True)}


def _gemma_3(config: Config, layers: int) -> Fields:
    """Add 1 to norms' weights, norm what a layer adds too, scale the embedding, and mix local and global layers."""
    every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    every = whole({"sliding_window_pattern": every}, "sliding_window_pattern", 2**31 - 1, 6)
    found = _windows(config, layers, _window(config, 4096), lambda layer: (layer + 1) % every != 0)
    everywhere, local = _ropes_of_gemma(config)
    return {
        "rope": everywhere,
        "layer_ropes": tuple(everywhere if window is None else local for window in found["windows"]),
        "embedding_scale": float(whole(config, "hidden_size", 2**31 - 1)) ** 0.5,
        "attention_scale": real(config, "query_pre_attn_scalar", 0.0, 1e9, 256.0) ** -0.5,
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "post_norms": True,
        "qk_norm": True,
        **found,
    }


def _ropes_of_gemma(config: Config) -> tuple[RopeConfig, RopeConfig]:
    """Return the RoPE of the layers that see everything, and that of those with a window."""
    older = {"rope_theta": config.get("rope_theta"), "rope_scaling": config.get("rope_scaling")}
    flat = RopeConfig.from_hf({**older, "rope_theta": older["rope_theta"] or 1e6})
    local = RopeConfig.from_hf({"rope_theta": config.get("rope_local_base_freq") or 1e4})
    nested = config.get("rope_parameters")
    if nested is None:
        return flat, local
    if not (isinstance(nested, dict) and set(nested) <= {_FULL, _SLIDING} and _are_objects(nested)):
        raise unsupported("rope_parameters", reprlib.repr(nested), f"objects named {_FULL} and {_SLIDING}")
    own = [
        RopeConfig.from_hf({"rope_parameters": {"rope_theta": theta, **(nested.get(kind) or {})}})
        for kind, theta in ((_FULL, flat.theta), (_SLIDING, local.theta))
    ]
    given = config.get("rope_theta") is not None or config.get("rope_scaling") is not None
    if (given and own[0] != flat) or (config.get("rope_local_base_freq") is not None and own[1] != local):
        raise ModelError(
            "config.json contradicts itself: rope_parameters has other numbers than rope_theta, rope_scaling and "
            "rope_local_base_freq beside it; copy the model folder again from its publisher."
        )
    return own[0], own[1]


def _are_objects(found: dict[str, Any]) -> bool:
    return all(value is None or isinstance(value, dict) for value in found.values())


_LLAMA_VALUES: Mapping[str, tuple[Any, ...] | None] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
}
"""The values that Llama's options must have, since no others are implemented. The first is what a message expects."""


@dataclass(frozen=True)
class Family:
    """A family of models: how its config.json and its tensors differ from Llama's.

    read: returns fields of LlamaConfig, given config.json and the number of layers. defaults: values of absent keys, where
    transformers' are not Llama's. keys: what config.json may hold beside Llama's keys and the options. values: the values
    that an option must have, None for one that may have any.
    """

    architecture: str
    read: Callable[[Config, int], Fields]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    values: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules of a layer whose weight is stored as one matrix, and the linears whose rows lie in it, in their order."""

    def complete(self, config: Config) -> dict[str, Any]:
        """Return config.json with the family's own defaults where it has no value."""
        return {**config, **{key: value for key, value in self.defaults.items() if config.get(key) is None}}

    def check_options(self, config: Config) -> None:
        """Raise ModelError, which names it, for an option with a value that is not implemented."""
        flag(config, "use_sliding_window")  # also where the family does not read it
        for option, allowed in {**_LLAMA_VALUES, **self.values}.items():
            found = config.get(option)
            if found is None or allowed is None or (not isinstance(found, list | dict) and found in allowed):
                continue
            first = allowed[0]
            expected = "false" if first is False else "1.0" if option == "partial_rotary_factor" else str(first)
            raise unsupported(option, reprlib.repr(found), expected)

    @property
    def all_keys(self) -> frozenset[str]:
        """Return the keys that the family has beside Llama's."""
        return self.keys | frozenset(self.values)


_GRANITE_KEYS = frozenset(["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"])
_UNUSED_MAMBA = ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "chunk_size", "conv_bias", "proj_bias")
_GRANITE_4_KEYS = frozenset(
    [
        *(f"mamba_{name}" for name in _UNUSED_MAMBA), "time_step_limit", "num_experts_per_tok", "shared_intermediate_size",
        "position_embedding_type",
    ]
)  # fmt: skip
_GEMMA_ACTIVATION = ("gelu_pytorch_tanh",)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _mistral),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, {"head_dim": 128}),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3,
        {"tie_word_embeddings": True, "max_position_embeddings": 32768},
        frozenset(["no_rope_layers", "no_rope_layer_interval"]),
    ),
    "granite": Family("GraniteForCausalLM", _granite, keys=_GRANITE_KEYS, values={"attention_dropout": None}),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        _granite_4,
        {"num_local_experts": 8},
        _GRANITE_KEYS | _GRANITE_4_KEYS,
        {"attention_dropout": None, "num_local_experts": (0,), "normalization_function": ("rmsnorm",)},
        {
            "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
            "shared_mlp.output_linear": ("mlp.down_proj",),
        },
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        _ministral_3,
        {"head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144},
        values={"attention_bias": (False,)},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _phi_3,
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        frozenset(["original_max_position_embeddings"]),
        {"attention_bias": (False,), "partial_rotary_factor": None, "full_attn_mod": (1,), "interpolate_factor": (1,)},
        {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma_3,
        {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 131072},
        frozenset(["rope_local_base_freq", "query_pre_attn_scalar", "sliding_window_pattern", "_sliding_window_pattern"]),
        {"hidden_act": _GEMMA_ACTIVATION, "hidden_activation": _GEMMA_ACTIVATION},
    ),
}
"""Every family by its model_type in config.json."""

_TEXT_MODELS = {
    "gemma3": "the text models gemma-3-270m and gemma-3-1b (Gemma3ForCausalLM)",
    "mistral3": "a folder of its text model alone (Ministral3ForCausalLM)",
}
"""Text models to use instead of models that read pictures too, by the model_type of these."""


def refuse_multimodal(config: Config) -> None:
    """Raise ModelError for a model that reads pictures too, and whose text model alone edgetune runs."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in _TEXT_MODELS:
        raise ModelError(
            f"config.json describes a model of pictures and text (model_type {kind!r}), and edgetune runs text models; use "
            f"{_TEXT_MODELS[kind]}."
        )
