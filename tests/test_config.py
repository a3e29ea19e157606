"""config.json: supported fields are read, and unsupported ones are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from edgetune.runtime.config import LINEARS, LlamaConfig, LoraConfig
from edgetune.runtime.errors import ModelError, UsageError

PLAIN: dict[str, Any] = {"model_type": "llama", **tiny.COMMON, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.0}}, "attention_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"logit_softcapping": 30.0}, "logit_softcapping"),
        ({"residual_multiplier": 0.2}, "residual_multiplier"),
        ({"num_key_value_heads": 3}, "key/value heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": "many"}, "wrong type"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["chunked_attention"] * 2,
            },
            "layer_types",
        ),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        LlamaConfig.from_hf({**PLAIN, **change})


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"])
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=key):
        LlamaConfig.from_hf({name: value for name, value in PLAIN.items() if name != key})


def test_unset_options_are_no_reason_to_refuse() -> None:
    config = LlamaConfig.from_hf({**PLAIN, "some_new_option": None, "another": False, "torch_dtype": "bfloat16"})
    assert config.windows == (None, None)
    assert config.head_dim == 16


def test_parameters_are_counted() -> None:
    model = tiny.transformers_model("llama-2-grouped")
    config = LlamaConfig.from_hf(model.config.to_dict())
    norms = sum(tensor.numel() for name, tensor in model.named_parameters() if "norm" in name)
    assert config.parameters == sum(tensor.numel() for tensor in model.parameters()) - norms


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0},
        {"rank": -1},
        {"alpha": float("nan")},
        {"alpha": 0.0},
        {"alpha": 1e300},
        {"alpha": 1e-300},
        {"dropout": 1.0},
        {"targets": ("lm_head",)},
        {"targets": ()},
    ],
)
def test_an_impossible_adapter_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        LoraConfig(**{"rank": 8, "alpha": 16.0, **values})


def test_scale() -> None:
    assert LoraConfig(16, 32.0).scale == 2.0
    assert LoraConfig(16, 32.0, rslora=True).scale == 8.0
    assert LoraConfig(16, 32.0).targets == LINEARS
