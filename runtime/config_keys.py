"""Read config.json's keys safely: pass over those that change no logit, refuse the others by name, check every value.

transformers' classes of Llama, Mistral and Qwen read the keys in SUPPORTED and no others when they compute logits; the other
families have keys of their own beside them (families.py). A key that they do not read is harmless there, but it can say that
the model needs code of its own ("logit_scale", "use_qk_norm"). So an unknown key is refused unless it is known to be
bookkeeping, is named like bookkeeping, or has a value that switches it off.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from edgetune.runtime.errors import ModelError

SUPPORTED = frozenset(
    [
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "attention_dropout", "partial_rotary_factor",
        "rope_interleaved", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
    ]
)  # fmt: skip
"""Keys that decide what the model computes and that `LlamaConfig.from_hf` reads or checks."""
LOADING = frozenset(
    [
        "auto_map", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
        "attn_implementation", "_experts_implementation", "experts_implementation", "custom_pipelines", "trust_remote_code",
        "_commit_hash", "_name_or_path", "_model_name_or_path", "name_or_path",
    ]
)  # fmt: skip
"""Keys that tell another library which code to load, or where the model came from. They change no logit, and edgetune never
passes them on: a kernel or a class that a stranger's folder names would be fetched and run by the reader of an export."""
# Keys that change no logit: those of transformers' PreTrainedConfig (4 and 5) and of what writes such files beside it.
_BOOKKEEPING = LOADING | frozenset(
    [
        "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "initializer_range", "use_cache",
        "quantization_config", "id2label", "label2id", "num_labels", "problem_type", "is_encoder_decoder", "is_decoder",
        "pretraining_tp", "return_dict", "return_dict_in_generate", "chunk_size_feed_forward", "task_specific_params",
        "finetuning_task", "tokenizer_class", "prefix", "is_llama_config", "use_bfloat16", "torchscript", "pruned_heads",
        "license", "transformers.js_config", "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder",
        "keys_to_ignore_at_inference", "base_model_tp_plan", "base_model_pp_plan", "neftune_noise_alpha", "license_name",
        "use_return_dict", "tf_legacy_loss", "onnx_dynamic_axes", "unk_token", "bos_token", "eos_token", "pad_token",
        "rescale_prefix", "description", "author", "tags", "n_ctx", "n_positions",
    ]
)  # fmt: skip
# The sampling settings that transformers once kept in config.json (GenerationConfig's fields).
_GENERATION = frozenset(
    [
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "stop_strings",
        "do_sample", "num_beams", "cache_implementation", "cache_config", "temperature", "top_k", "top_p", "min_p", "top_h",
        "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "token_healing",
        "guidance_scale", "watermarking_config", "num_return_sequences", "output_scores", "output_logits", "low_memory",
        "penalty_alpha", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids", "prefill_chunk_size",
        "compile_config", "disable_compile",
    ]
)  # fmt: skip
# Names of bookkeeping: token ids, lengths that no rotation reads, versions, paths, initialisation, dropout (none of which acts
# outside training), how a kernel is chosen, and what trainers leave behind.
_HARMLESS_NAMES = re.compile(
    r".*token_ids?|.*_token_index|output_\w+|(model|tokenizer|tokenizer_model)_(max|padding|name|type|path)\w*"
    r"|(max|min)_seq\w*_len\w*|max_(sequence|context|model)_len\w*|seq(uence)?_len(gth)?|.*_versions?|version|.*_path"
    r"|init(ializer)?_(std|range|scale|method|device|config)|init_\w+_std|.*dropout\w*|.*_pdrop|.*(flash|xformers|sdpa)_?att\w*"
    r"|use_(cache|flash)\w*|gradient_checkpointing\w*|unsloth_\w+|_unsloth\w*|lora_\w+|peft_\w+|neftune_\w+|training_\w+"
    r"|.*_loss(_coef|_weight)?|transformers\w*|torch_\w+|license\w*|(model|tensor|pipeline|sequence)_(model_)?parallel\w*"
)
_NEUTRAL: tuple[Any, ...] = (None, False, "", [], {})


def refuse_unknown(config: Mapping[str, Any], families: str, own: frozenset[str]) -> None:
    """Raise ModelError, which names them, for keys that could change a logit and that edgetune does not know.

    own: keys of the model's family that Llama has not.
    """
    known = _BOOKKEEPING | _GENERATION | SUPPORTED | own
    unknown = sorted(
        key[:80]
        for key, value in config.items()
        if key not in known and not _HARMLESS_NAMES.fullmatch(key[:200]) and not _switched_off(value)
    )
    if unknown:
        more = f" and {len(unknown) - 12} more" if len(unknown) > 12 else ""
        raise ModelError(
            f"config.json sets {', '.join(unknown[:12])}{more}, which edgetune does not support and which could change what "
            f"the model computes; expected a plain {families} config. Choose another model with `edgetune models`."
        )


def _switched_off(value: Any) -> bool:
    return type(value) in (type(None), bool, str, list, dict) and value in _NEUTRAL


def unsupported(option: str, found: str, expected: str) -> ModelError:
    """Return the error for an option whose value edgetune does not implement."""
    return ModelError(f"config.json's {option} is {found}, which edgetune does not support; expected {expected}.")


def whole(config: Mapping[str, Any], key: str, most: int, default: int | None = None, least: int = 1) -> int:
    """Return a whole number of config.json, `least` to `most`; `default` where the key is absent or null.

    Raises ModelError for any other value, and for a missing one without a default.
    """
    value = _present(config, key, default)
    if type(value) is not int or not least <= value <= most:
        raise _bad_value(key, value, f"a whole number from {least} to {most}")
    return value


def real(config: Mapping[str, Any], key: str, least: float, most: float, default: float | None = None) -> float:
    """Return a number of config.json that is more than `least` and at most `most`. Raises ModelError as `whole` does."""
    value = _present(config, key, default)
    if type(value) not in (int, float) or not (least < value <= most and math.isfinite(float(value))):
        raise _bad_value(key, value, f"a number of more than {least:g} and at most {most:g}")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """Return a yes or no of config.json, no where the key is absent or null. Raises ModelError for any other value."""
    value = _present(config, key, False)
    if type(value) is not bool:
        raise _bad_value(key, value, "true or false")
    return value


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Return the token ids under a key: a number, a list of numbers, or none (null or -1). Raises ModelError for others."""
    value = config.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if len(found) > 1024 or not all(type(item) is int and -1 <= item < 2**31 for item in found):
        raise _bad_value(key, value, "a token id or a list of token ids")
    return tuple(item for item in found if item >= 0)


def _present(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json lacks {key!r}; copy the model folder again.")
    return value


def _bad_value(key: str, value: Any, expected: str) -> ModelError:
    kind = "of the wrong type" if isinstance(value, str | bool | list | dict) else "out of range"
    shown = reprlib.repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return ModelError(f"config.json's {key} is {shown}, {kind}; expected {expected}. Copy the model folder again.")
