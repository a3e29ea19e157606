"""The configurations of a model, an adapter and a quantisation, as frozen dataclasses.

`LlamaConfig.from_hf` reads Hugging Face's config.json for every architecture that the engine supports. It refuses, by name,
every option that would change a logit and that the engine does not implement: a model runs correctly or is not opened.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field
from typing import Any

from edgetune.runtime.config_keys import flag, real, refuse_unknown, token_ids, unsupported, whole
from edgetune.runtime.errors import ModelError, SettingError
from edgetune.runtime.untrusted_file import MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH

# The linears of a layer, in the order of their use.
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS
MAX_RANK = 1024
"""Largest rank of an adapter. Chosen by hand."""
LEAST_ALPHA, MOST_ALPHA = 1e-9, 1e9
"""Range of an adapter's alpha: outside it, formats that store it in f32 get 0 or inf."""

DEVICES = ("auto", "cpu", "cuda", "mps")
"""Names of the devices; auto prefers an NVIDIA card, then an Apple GPU, then the CPU."""

ARCHITECTURES = {  # model_type in config.json -> the class name in its "architectures"
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_MISTRAL_WINDOW = 4096
"""Sliding window of a Mistral config that has no such key: transformers' MistralConfig."""
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The kinds of RoPE that the engine computes, and the numbers that each needs beside theta."""


@dataclass(frozen=True)
class RopeConfig:
    """A rotary position embedding. `kind`: default, linear (positions divided by factor) or llama3 (Llama 3.1's scaling)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> RopeConfig:
        """Read `rope_theta` and `rope_scaling`, or `rope_parameters` as transformers 5 writes them.

        A config may hold both forms, for readers of either version, but they must agree. Raises ModelError.
        """
        fields, kind = _rope_fields(config)
        theta = real(fields, "rope_theta", 0.0, 1e15, 10000.0)
        needed = _ROPE_KEYS[kind]
        unread = {"rope_theta"} if kind == "llama3" else {"rope_theta", "original_max_position_embeddings"}
        if kind == "default" and fields.get("factor") == 1:
            unread.add("factor")
        unknown = sorted(name[:80] for name in set(fields) - set(needed) - unread)
        missing = sorted(set(needed) - set(fields))
        if unknown or missing:
            raise ModelError(
                f"config.json's rope_scaling of type {kind!r} has unknown keys {unknown[:8]} and lacks {missing}; "
                f"expected exactly {sorted(needed)}."
            )
        for name in needed:
            if name == "original_max_position_embeddings":
                whole(fields, name, 2**31 - 1)
            else:
                real(fields, name, 0.0, 1e6)
        if "factor" in needed and fields["factor"] < 1:
            raise unsupported(
                "rope_scaling.factor", reprlib.repr(fields["factor"]), "at least 1, as scaling lengthens a context"
            )
        if kind == "llama3" and not fields["low_freq_factor"] < fields["high_freq_factor"]:
            raise unsupported("rope_scaling", "a low_freq_factor that is not below its high_freq_factor", "one that is")
        # As the file has them, whole numbers included: the digest of a base model covers how these numbers are written.
        values = {name.replace("max_position_embeddings", "max_positions"): fields[name] for name in needed}
        return cls(theta=theta, kind=kind, **values)


def _rope_fields(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the fields of all RoPE entries of config.json as one, and the kind. Raises ModelError if they contradict."""
    fields: dict[str, Any] = {}
    for entry in ("rope_parameters", "rope_scaling"):
        found = config.get(entry)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise unsupported(entry, reprlib.repr(found), "an object or null")
        values = {"type" if key == "rope_type" else key: value for key, value in found.items() if value is not None}
        if found.get("type") not in (None, values.get("type")):
            raise _contradiction(f"{entry}.type", found["type"], "its rope_type", values["type"])
        values.setdefault("type", "default")
        for key in sorted(fields.keys() & values.keys()):
            if fields[key] != values[key]:
                raise _contradiction(f"{entry}.{key}", values[key], f"rope_parameters.{key}", fields[key])
        if fields and (fields.keys() ^ values.keys()) - {"rope_theta", "partial_rotary_factor"}:
            raise _contradiction(entry, values, "rope_parameters", fields)
        fields |= values
    theta = config.get("rope_theta")
    if theta is not None and "rope_theta" in fields and fields["rope_theta"] != theta:
        raise _contradiction("rope_theta", theta, "the one beside its scaling", fields["rope_theta"])
    if theta is not None:
        fields["rope_theta"] = theta
    kind = fields.pop("type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise unsupported("rope_scaling", reprlib.repr(kind), "default, linear or llama3")
    if fields.pop("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported("rope_parameters.partial_rotary_factor", "not 1.0", "rotation of whole heads")
    return fields, kind


def _contradiction(one: str, value: Any, other: str, second: Any) -> ModelError:
    return ModelError(
        f"config.json contradicts itself: {one} is {reprlib.repr(value)} and {other} is {reprlib.repr(second)}; "
        "copy the model folder again from its publisher."
    )


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA-like decoder; see model.py for the letters (D, F, H, KV, V)."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens: a token sees itself and the window - 1 tokens before it. None: it sees all."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """Read a Hugging Face config.json.

        Raises ModelError, naming it, for an architecture or an option that this engine does not support.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise _unknown_architecture(config)
        _refuse_unsupported(config)
        hidden, heads = whole(config, "hidden_size", MAX_WIDTH), whole(config, "num_attention_heads", MAX_WIDTH)
        layers, bias = whole(config, "num_hidden_layers", MAX_LAYERS), flag(config, "attention_bias")
        result = cls(
            model_type=model_type,
            hidden_size=hidden,
            intermediate_size=whole(config, "intermediate_size", 8 * MAX_WIDTH),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=whole(config, "num_key_value_heads", MAX_WIDTH, heads),
            head_dim=whole(config, "head_dim", MAX_WIDTH, 128 if model_type == "qwen3" else max(1, hidden // heads)),
            vocab_size=whole(config, "vocab_size", MAX_VOCABULARY),
            max_positions=whole(config, "max_position_embeddings", 2**31 - 1, 2048),
            rms_norm_eps=real(config, "rms_norm_eps", 0.0, 1.0, 1e-6),
            rope=RopeConfig.from_hf(config),
            tie_embeddings=flag(config, "tie_word_embeddings"),
            qkv_bias=model_type == "qwen2" or bias,
            o_bias=model_type != "qwen2" and bias,
            qk_norm=model_type == "qwen3",
            windows=_windows(config, model_type, layers),
            bos_token_id=next(iter(token_ids(config, "bos_token_id")), None),
            eos_token_ids=token_ids(config, "eos_token_id"),
        )
        result._check()
        return result

    def _check(self) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ModelError(
                f"config.json contradicts itself: {self.num_heads} attention heads over {self.num_kv_heads} key/value heads "
                f"of {self.head_dim}; expected a multiple of the key/value heads and an even head size."
            )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of each linear of a layer, by its name."""
        d, f, q, kv = (
            self.hidden_size,
            self.intermediate_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        return {
            "q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q),
            "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f),
        }  # fmt: skip

    @property
    def linear_parameters(self) -> int:
        """Return the number of weights in the linears of all layers, without embedding and head."""
        return self.num_layers * sum(out * inputs for out, inputs in self.linear_shapes().values())

    @property
    def longest_row(self) -> int:
        """Return the most tokens of a row. Linear RoPE scaling is counted in: most configs give the positions before it."""
        return int(self.max_positions * self.rope.factor) if self.rope.kind == "linear" else self.max_positions

    @property
    def parameters(self) -> int:
        """Return the number of all weights but the norms'."""
        return self.linear_parameters + self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)


def _unknown_architecture(config: dict[str, Any]) -> ModelError:
    if config.get("model_type") is None:
        return ModelError(
            f"config.json has no model_type, so its architecture is unknown; expected one of {', '.join(ARCHITECTURES)}. Copy "
            "the model folder again."
        )
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and named else config.get("model_type")
    return ModelError(
        f"Unsupported architecture {reprlib.repr(found)}; edgetune runs {', '.join(sorted(ARCHITECTURES.values()))}. "
        "Type `edgetune models` to see what on this machine it can use."
    )


def _refuse_unsupported(config: dict[str, Any]) -> None:
    refuse_unknown(config, "/".join(ARCHITECTURES))
    for option, plain, expected in (
        ("hidden_act", ("silu", "swish"), "silu"),
        ("mlp_bias", (False,), "false"),
        ("attention_dropout", (0,), "0"),
        ("rope_interleaved", (False,), "false"),
        ("partial_rotary_factor", (1,), "1.0"),
    ):
        found = config.get(option)
        if found is not None and (isinstance(found, list | dict) or found not in plain):
            raise unsupported(option, reprlib.repr(found), expected)


def _windows(config: dict[str, Any], model_type: str, layers: int) -> tuple[int | None, ...]:
    """Return each layer's sliding window, which the four architectures spell differently."""
    qwen, used = model_type in ("qwen2", "qwen3"), flag(config, "use_sliding_window")
    found = config.get("sliding_window", _MISTRAL_WINDOW if model_type == "mistral" else None)
    if found is None or model_type == "llama" or (qwen and not used):
        return (None,) * layers
    window = whole({"sliding_window": found}, "sliding_window", 2**31 - 1)
    kinds = config.get("layer_types")
    if kinds is None:
        first = whole(config, "max_window_layers", 2**31 - 1, 28, least=0) if qwen else 0
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= _LAYER_TYPES:
        raise unsupported("layer_types", reprlib.repr(kinds), f"{layers} of {', '.join(sorted(_LAYER_TYPES))}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@dataclass(frozen=True)
class LoraConfig:
    """The configuration of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685): W' = W + scale * B A on each target linear."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS
    rslora: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise SettingError(f"The rank is {self.rank}; expected 1 to {MAX_RANK}, e.g. 16.")
        if not LEAST_ALPHA <= self.alpha <= MOST_ALPHA:
            raise SettingError(f"Alpha is {self.alpha}; expected {LEAST_ALPHA:g} to {MOST_ALPHA:g}, e.g. 16.")
        if not 0.0 <= self.dropout < 1.0:
            raise SettingError(f"The dropout is {self.dropout}; expected at least 0 and less than 1, e.g. 0.05.")
        unknown = sorted(set(self.targets) - set(LINEARS))
        if unknown or not self.targets:
            raise SettingError(f"The targets name {unknown or 'nothing'}; expected one or more of {', '.join(LINEARS)}.")

    @property
    def scale(self) -> float:
        """Return alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class QuantConfig:
    """The quantisation of a linear. The defaults are the QLoRA paper's: NF4 with double quantisation."""

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
