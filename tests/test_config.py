"""config.json: supported fields are read, and unsupported ones are refused by name."""

from __future__ import annotations

import tracemalloc
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


# huggyllama/llama-7b and decapoda-research/llama-7b-hf, vicuna-7b-v1.1, and what transformers writes for a GGUF, at our sizes.
LLAMA_1: dict[str, Any] = {
    "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 64,
    "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 2048, "max_sequence_length": 2048,
    "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": -1, "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True,
    "vocab_size": 128,
}  # fmt: skip


def test_llama_1_opens() -> None:
    config = LlamaConfig.from_hf(LLAMA_1)
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (4, 16, 2048)
    assert (config.bos_token_id, config.eos_token_ids, config.rope.theta) == (0, (1,), 10000.0)


@pytest.mark.parametrize(
    "harmless",
    [
        {"_model_name_or_path": "/home/me/model.gguf", "_commit_hash": "a1b2", "_attn_implementation_autoset": True},
        {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}, "attn_implementation": "flash_attention_2"},
        {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "top_k": 20, "do_sample": True, "repetition_penalty": 1.1},
        {"unk_token_id": 0, "mask_token_id": 4, "model_max_length": 2048, "tokenizer_model_max_length": 4096},
        {
            "neftune_noise_alpha": 5,
            "keys_to_ignore_at_inference": ["past_key_values"],
            "pretraining_tp": 2,
            "torchscript": True,
        },
        {"use_flash_attn": True, "_flash_attn_2_enabled": True, "use_cache": False, "gradient_checkpointing": True},
        {"resid_pdrop": 0.1, "hidden_dropout": 0.1, "attention_probs_dropout_prob": 0.1, "init_std": 0.02, "seq_length": 2048},
        {"logit_scale": None, "final_logit_softcapping": None, "use_qk_norm": False, "no_rope_layers": [], "alibi": {}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "default", "original_max_position_embeddings": 64, "factor": 1.0}},
        {"rope_theta": 500000, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0},
            "rope_theta": 10000.0,
        },
    ],
)
def test_a_key_that_changes_no_logit_is_passed_over(harmless: dict[str, Any]) -> None:
    """transformers gives the same logits with the keys and without."""
    known = {key: value for key, value in harmless.items() if key.startswith("rope")}
    assert LlamaConfig.from_hf({**PLAIN, **harmless}) == LlamaConfig.from_hf({**PLAIN, **known})


@pytest.mark.parametrize(
    "key",
    [
        "logit_scale", "embedding_multiplier", "attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping",
        "use_qk_norm", "qk_layernorm", "no_rope_layers", "attention_chunk_size", "clip_qkv", "num_local_experts", "alibi",
        "parallel_attn", "use_parallel_residual", "rotary_pct", "norm_type", "use_dynamic_ntk", "kv_lora_rank", "num_experts",
    ],
)  # fmt: skip
def test_a_key_that_could_change_a_logit_is_refused_by_name(key: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json sets {key}, which edgetune does not support and which could change"):
        LlamaConfig.from_hf({**PLAIN, key: 2})


NUMBERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("value", ["64", True, 64.0, -64, 0, 2**31, 10**390, [64], {"a": 1}], ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_size_that_is_no_size_is_refused_by_name(key: str, value: object) -> None:
    said = rf"^config\.json's {key} is .{{1,60}}; expected a whole number from 1 to \d+\. Copy"
    with pytest.raises(ModelError, match=said) as error:
        LlamaConfig.from_hf({**PLAIN, key: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "value", ["1e-5", True, -1.0, 0, float("nan"), float("inf"), 10**390, [1.0], {}], ids=lambda v: repr(v)[:9]
)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_number_that_is_none_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"^config\.json's {key} is .{{1,60}}; expected a number of more than 0 and at most "):
        LlamaConfig.from_hf({**PLAIN, key: value})


@pytest.mark.parametrize("value", ["true", 1, 0.0, [], {}], ids=repr)
@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "use_sliding_window"])
def test_a_yes_or_no_that_is_neither_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"^config\.json's {key} is .*; expected true or false"):
        LlamaConfig.from_hf({**PLAIN, key: value})


LLAMA_3 = {key: value for key, value in tiny.LLAMA3_ROPE.items() if key != "rope_theta"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
            "contradicts itself: rope_theta is 1000000.0 and",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            r"contradicts itself: rope_scaling\.factor is 2\.0 and rope_parameters\.factor is 4\.0",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}}, "contradicts itself"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
            r"rope_scaling\.type is 'linear'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', of the wrong type"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor is True, of the wrong type"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, out of range"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor is -2.0, out of range"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, "factor is 1e-300, .*; expected at least 1, as"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "k" * 5000: 1}}, r"unknown keys \['k{80}'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 1e30}}, r"factor is 1e\+30, out of range"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, r"lacks \['factor'\]"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, r"unknown keys \['factor'\]"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, r"rope_scaling is \['linear'\]"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', which edgetune does not support; expected an object or null"),
        ({"rope_scaling": {**LLAMA_3, "high_freq_factor": 1.0}}, "low_freq_factor that is not below"),
        ({"rope_scaling": {**LLAMA_3, "low_freq_factor": "1"}}, "low_freq_factor is '1'"),
        (
            {"rope_scaling": {**LLAMA_3, "original_max_position_embeddings": 8192.5}},
            "position_embeddings is 8192.5",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"unknown keys \['full_attention'\]"),
        ({"model_type": ["llama"]}, "Unsupported architecture"),
        ({"model_type": None}, "has no model_type, so its architecture is unknown; expected one of llama, mistral"),
        ({"model_type": {}, "architectures": [{"a": 1}]}, "Unsupported architecture"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        ({"mlp_bias": "false"}, "mlp_bias is 'false'"),
        ({"eos_token_id": "2"}, "eos_token_id is '2', of the wrong type; expected a token id or a list"),
        ({"eos_token_id": [2, 2.5]}, "eos_token_id is"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"model_type": "mistral", "sliding_window": "16"}, "sliding_window is '16'"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "layer_types": 7}, "layer_types is 7"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": -1},
            "max_window_layers",
        ),
    ],
)
def test_contradictions_and_values_of_another_type_are_one_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        LlamaConfig.from_hf({**PLAIN, **change})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_sizes_beyond_any_model_take_no_time_and_no_memory() -> None:
    tracemalloc.start()
    try:
        for key in NUMBERS:
            with pytest.raises(ModelError, match=key):
                LlamaConfig.from_hf({**PLAIN, key: 2**40})
        with pytest.raises(ModelError, match="num_hidden_layers"):
            LlamaConfig.from_hf({**PLAIN, "num_hidden_layers": 100_000_000})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_mistral_without_a_window_has_the_one_that_transformers_gives_it() -> None:
    mistral = {**PLAIN, "model_type": "mistral"}
    assert LlamaConfig.from_hf(mistral).windows == (4096, 4096)
    assert LlamaConfig.from_hf({**mistral, "sliding_window": None}).windows == (None, None)


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
