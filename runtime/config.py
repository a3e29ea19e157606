"""The configurations of a model, an adapter and a quantisation, as frozen dataclasses.

`LlamaConfig.from_hf` reads Hugging Face's config.json for every architecture that the engine supports. It refuses, by name,
every option that would change a logit and that the engine does not implement: a model runs correctly or is not opened.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field, fields
from typing import Any

from edgetune.runtime.config_keys import flag, real, refuse_unknown, token_ids, whole
from edgetune.runtime.errors import ModelError, SettingError
from edgetune.runtime.families import FAMILIES, refuse_multimodal
from edgetune.runtime.rope_config import RopeConfig
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
    # What follows differs from Llama in some families (families.py); the defaults are Llama's.
    layer_ropes: tuple[RopeConfig | None, ...] = ()
    """RoPE of each layer, None for a layer that rotates nothing; empty where all layers have `rope`."""
    activation: str = "silu"
    """Activation of the MLP's gate: silu or gelu_tanh."""
    norm_offset: float = 0.0
    """Number added to the weights of all norms when they are loaded."""
    post_norms: bool = False
    """Norm also what attention and the MLP give, before it is added to the residual."""
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """Factor of attention's scores; None for 1 / sqrt(head_dim)."""
    residual_scale: float = 1.0
    """Factor of what attention and the MLP add to the residual."""
    logit_divisor: float = 1.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """Read a Hugging Face config.json.

        Raises ModelError, naming it, for an architecture or an option that this engine does not support.
        """
        refuse_multimodal(config)
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise _unknown_architecture(config)
        family = FAMILIES[model_type]
        refuse_unknown(config, "/".join(FAMILIES), family.all_keys)
        config = family.complete(config)
        family.check_options(config)
        hidden, heads = whole(config, "hidden_size", MAX_WIDTH), whole(config, "num_attention_heads", MAX_WIDTH)
        layers, bias = whole(config, "num_hidden_layers", MAX_LAYERS), flag(config, "attention_bias")
        read: dict[str, Any] = {
            "model_type": model_type,
            "hidden_size": hidden,
            "intermediate_size": whole(config, "intermediate_size", 8 * MAX_WIDTH),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": whole(config, "num_key_value_heads", MAX_WIDTH, heads),
            "head_dim": whole(config, "head_dim", MAX_WIDTH, max(1, hidden // heads)),
            "vocab_size": whole(config, "vocab_size", MAX_VOCABULARY),
            "max_positions": whole(config, "max_position_embeddings", 2**31 - 1, 2048),
            "rms_norm_eps": real(config, "rms_norm_eps", 0.0, 1.0, 1e-6),
            "tie_embeddings": flag(config, "tie_word_embeddings"),
            "qkv_bias": bias,
            "o_bias": bias,
            "bos_token_id": next(iter(token_ids(config, "bos_token_id")), None),
            "eos_token_ids": token_ids(config, "eos_token_id"),
        }
        result = cls(**{**read, **family.read(config, layers)})
        result._check()
        return result

    def _check(self) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ModelError(
                f"config.json contradicts itself: {self.num_heads} attention heads over {self.num_kv_heads} key/value heads "
                f"of {self.head_dim}; expected a multiple of the key/value heads and an even head size."
            )
        rotated, factors = self.rope.rotated(self.head_dim), len(self.rope.short_factors)
        if rotated % 2 or rotated < 2 or factors not in (0, rotated // 2):
            raise ModelError(
                f"config.json contradicts itself: {rotated} of {self.head_dim} numbers of a head are rotated, with {factors} "
                "factors; expected an even number, and a factor for each pair."
            )

    @property
    def ropes(self) -> tuple[RopeConfig | None, ...]:
        """Return the RoPE of each layer; None for a layer that rotates nothing."""
        return self.layer_ropes or (self.rope,) * self.num_layers

    def unlike_llama(self) -> tuple[tuple[str, Any], ...]:
        """Return the fields, and those of its RoPE, that no Llama, Mistral or Qwen had when digests were first written.

        Only those that differ from their defaults: a digest of an older family stays as it was.
        """
        unusual: list[tuple[str, Any]] = []
        for of, first in ((self, "layer_ropes"), (self.rope, "rotary_share")):
            each = [(one.name, getattr(of, one.name), one.default) for one in fields(of)]
            later = each[[name for name, *_ in each].index(first) :]
            unusual += [(name, value) for name, value, usual in later if value != usual]
        return tuple(unusual)

    @property
    def score_scale(self) -> float:
        """Return the factor of attention's scores."""
        return 1.0 / math.sqrt(self.head_dim) if self.attention_scale is None else self.attention_scale

    @property
    def has_llama_layers(self) -> bool:
        """Return True if each layer computes what one of Llama's or Qwen's does, with its own window."""
        unusual = self.layer_ropes or self.post_norms or self.activation != "silu" or self.residual_scale != 1.0
        return not (unusual or self.rope.rotary_share != 1.0 or self.rope.query_beta)

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
        """Return the most tokens of a row.

        Linear scaling is counted in, since most configs give the positions before it, and so is YaRN's. Longrope's other
        factors, for rows beyond the original context, are not used.
        """
        if self.rope.kind == "linear":
            return int(self.max_positions * self.rope.factor)
        if self.rope.kind == "yarn":
            return max(self.max_positions, int(self.rope.original_max_positions * self.rope.factor))
        return min(self.max_positions, self.rope.original_max_positions) if self.rope.kind == "longrope" else self.max_positions

    @property
    def parameters(self) -> int:
        """Return the number of all weights but the norms'."""
        return self.linear_parameters + self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)


def _unknown_architecture(config: dict[str, Any]) -> ModelError:
    if config.get("model_type") is None:
        return ModelError(
            f"config.json has no model_type, so its architecture is unknown; expected one of {', '.join(FAMILIES)}. Copy "
            "the model folder again."
        )
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and named else config.get("model_type")
    known = ", ".join(sorted(family.architecture for family in FAMILIES.values()))
    return ModelError(
        f"Unsupported architecture {reprlib.repr(found)}; edgetune runs {known}. "
        "Type `edgetune models` to see what on this machine it can use."
    )


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
