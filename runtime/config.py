"""The configurations of a model, an adapter and a quantisation, as frozen dataclasses.

`LlamaConfig.from_hf` reads Hugging Face's config.json for every architecture that the engine supports. It refuses, by name,
every option that would change a logit and that the engine does not implement: a model runs correctly or is not opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from edgetune.runtime.errors import ModelError, UsageError

# The linears of a layer, in the order of their use.
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS

ARCHITECTURES = {  # model_type in config.json -> the class name in its "architectures"
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Keys of config.json that change no logit: bookkeeping, initialisation, generation and training settings.
_BOOKKEEPING = frozenset(
    [
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "initializer_range",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "_name_or_path",
        "name_or_path",
        "quantization_config",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "is_encoder_decoder",
        "is_decoder",
        "pretraining_tp",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "task_specific_params",
        "finetuning_task",
        "tokenizer_class",
        "prefix",
        "decoder_start_token_id",
        "is_llama_config",
        "use_bfloat16",
        "_attn_implementation_autoset",
        "_attn_implementation",
        "attn_implementation",
        "unsloth_fixed",
        "unsloth_version",
        "license",
        "rope_interleaved",
        "transformers.js_config",
        "cross_attention_hidden_size",
        "add_cross_attention",
        "tie_encoder_decoder",
        "max_window_layers",
        "use_sliding_window",
        "layer_types",
        "sliding_window",
    ]
)
_SUPPORTED = frozenset(
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "attention_dropout",
        "partial_rotary_factor",
    ]
)


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
        """Read `rope_theta` and `rope_scaling`, or `rope_parameters` as transformers 5 writes them. Raises ModelError."""
        fields = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        theta = float(fields.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
        kind = str(fields.pop("rope_type", None) or fields.pop("type", None) or "default")
        fields.pop("type", None)
        if fields.pop("partial_rotary_factor", 1.0) != 1.0:
            raise _unsupported("rope_parameters.partial_rotary_factor", "not 1.0", "rotation of whole heads")
        names = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        if kind not in names:
            raise _unsupported("rope_scaling", repr(kind), "default, linear or llama3")
        unknown = sorted(set(fields) - set(names[kind]))
        missing = sorted(set(names[kind]) - set(fields))
        if unknown or missing:
            raise ModelError(
                f"config.json's rope_scaling of type {kind!r} has unknown keys {unknown} and lacks {missing}; "
                f"expected exactly {sorted(names[kind])}."
            )
        values = {name.replace("max_position_embeddings", "max_positions"): fields[name] for name in names[kind]}
        return cls(theta=theta, kind=kind, **values)


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
        model_type = str(config.get("model_type"))
        if model_type not in ARCHITECTURES:
            found = (config.get("architectures") or [model_type])[0]
            raise ModelError(
                f"Unsupported architecture {found!r}; edgetune runs {', '.join(sorted(ARCHITECTURES.values()))}. "
                "Type `edgetune models` to see what on this machine it can use."
            )
        _refuse_unsupported(config)
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            layers = int(config["num_hidden_layers"])
            result = cls(
                model_type=model_type,
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or (128 if model_type == "qwen3" else hidden // max(heads, 1))),
                vocab_size=int(config["vocab_size"]),
                max_positions=int(config.get("max_position_embeddings") or 2048),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                rope=RopeConfig.from_hf(config),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=model_type == "qwen2" or bool(config.get("attention_bias", False)),
                o_bias=model_type != "qwen2" and bool(config.get("attention_bias", False)),
                qk_norm=model_type == "qwen3",
                windows=_windows(config, model_type, layers),
                bos_token_id=config.get("bos_token_id"),
                eos_token_ids=_as_ids(config.get("eos_token_id")),
            )
        except KeyError as error:
            raise ModelError(f"config.json lacks {error.args[0]!r}; copy the model folder again.") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"config.json holds a value of the wrong type ({error}); copy the model folder again.") from error
        result._check()
        return result

    def _check(self) -> None:
        sizes = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
        }
        for name, value in sizes.items():
            if not 0 < value < 2**31:
                raise ModelError(f"config.json's {name} is {value}; expected a positive number. Copy the model folder again.")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ModelError(
                f"config.json contradicts itself: {self.num_heads} attention heads over {self.num_kv_heads} key/value heads "
                f"of {self.head_dim}; expected a multiple of the key/value heads and an even head size."
            )
        if not (self.rms_norm_eps > 0 and math.isfinite(self.rope.theta) and self.rope.theta > 0):
            raise ModelError("config.json's rms_norm_eps and rope_theta must be positive; copy the model folder again.")

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


def _unsupported(option: str, found: str, expected: str) -> ModelError:
    return ModelError(f"config.json's {option} is {found}, which edgetune does not support; expected {expected}.")


def _refuse_unsupported(config: dict[str, Any]) -> None:
    unknown = sorted(key for key in set(config) - _BOOKKEEPING - _SUPPORTED if config[key] not in (None, False))
    if unknown:
        raise ModelError(
            f"config.json sets {', '.join(unknown)}, which edgetune does not support; expected a plain "
            f"{'/'.join(ARCHITECTURES)} config. Choose another model with `edgetune models`."
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _unsupported("hidden_act", repr(config["hidden_act"]), "silu")
    if config.get("mlp_bias"):
        raise _unsupported("mlp_bias", "true", "false")
    if config.get("attention_dropout"):
        raise _unsupported("attention_dropout", repr(config["attention_dropout"]), "0")
    if config.get("rope_interleaved"):
        raise _unsupported("rope_interleaved", "true", "false")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise _unsupported("partial_rotary_factor", repr(config["partial_rotary_factor"]), "1.0")


def _windows(config: dict[str, Any], model_type: str, layers: int) -> tuple[int | None, ...]:
    """Return each layer's sliding window, which the four architectures spell differently."""
    window = config.get("sliding_window")
    if model_type in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        window = None
    if window is None or model_type == "llama":
        return (None,) * layers
    if int(window) < 1:
        raise _unsupported("sliding_window", repr(window), "a positive number of tokens")
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers", 28)) if model_type.startswith("qwen") else 0
        return tuple(int(window) if layer >= first else None for layer in range(layers))
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != layers:
        raise _unsupported("layer_types", f"{len(kinds)} entries with {unknown or 'no unknown kind'}", f"{layers} known kinds")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(value),)


@dataclass(frozen=True)
class LoraConfig:
    """The configuration of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685): W' = W + scale * B A on each target linear."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS
    rslora: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise UsageError(f"The rank is {self.rank}; expected 1 to 1024, e.g. 16.")
        if not 1e-9 <= self.alpha <= 1e9:  # outside this range, formats that store it in f32 get 0 or inf
            raise UsageError(f"Alpha is {self.alpha}; expected 1e-9 to 1e9, e.g. 16.")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"The dropout is {self.dropout}; expected at least 0 and less than 1, e.g. 0.05.")
        unknown = sorted(set(self.targets) - set(LINEARS))
        if unknown or not self.targets:
            raise UsageError(f"The targets name {unknown or 'nothing'}; expected one or more of {', '.join(LINEARS)}.")

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
