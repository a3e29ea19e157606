"""config.json: values of the wrong type or size, keys that change a logit, and keys that change none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corpus.case import CASES, DROP, Case, Place, of_kind

KIND = "config.json"
case = of_kind(KIND)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip

# Name, changes to the tiny LLaMA's config.json, and what the refusal names.
REFUSED: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("a vocabulary size in quotes", {"vocab_size": "8192"}, ("vocab_size",)),
    ("a vocabulary size of thirty digits", {"vocab_size": 10**30}, ("vocab_size",)),
    ("one row more in the vocabulary than in the embedding", {"vocab_size": 8193}, (r"embed_tokens", "8193")),
    ("half a hidden dimension", {"hidden_size": 64.5}, ("hidden_size",)),
    ("a hidden size that the tensors do not have", {"hidden_size": 128, "head_dim": 16}, (r"\[\d+, 64\]|shape",)),
    ("a hidden size of null", {"hidden_size": None}, ("hidden_size",)),
    ("no hidden size", {"hidden_size": DROP}, ("hidden_size",)),
    ("a list of intermediate sizes, as OpenELM has", {"intermediate_size": [96, 128]}, ("intermediate_size",)),
    ("a negative number of layers", {"num_hidden_layers": -1}, ("num_hidden_layers",)),
    ("a hundred million layers", {"num_hidden_layers": 100_000_000}, ()),
    ("true for the number of layers", {"num_hidden_layers": True}, ("num_hidden_layers",)),
    ("one layer more than the weights have", {"num_hidden_layers": 3}, (r"layers\.2",)),
    ("one layer fewer than the weights have", {"num_hidden_layers": 1}, (r"layers\.1",)),
    ("no attention heads", {"num_attention_heads": 0}, ("num_attention_heads",)),
    ("key/value heads that do not divide the heads", {"num_key_value_heads": 3}, ("heads",)),
    ("zero key/value heads", {"num_key_value_heads": 0}, ("num_key_value_heads",)),
    ("an odd head size", {"head_dim": 15}, ("head",)),
    ("a head size in an object", {"head_dim": {"value": 16}}, ("head_dim",)),
    ("an epsilon in quotes, as YAML reads 1e-5", {"rms_norm_eps": "1e-5"}, ("rms_norm_eps",)),
    ("an epsilon of zero", {"rms_norm_eps": 0}, ("rms_norm_eps",)),
    ("a negative epsilon", {"rms_norm_eps": -1e-5}, ("rms_norm_eps",)),
    ("an epsilon of true", {"rms_norm_eps": True}, ("rms_norm_eps",)),
    ("a theta of zero", {"rope_theta": 0}, ("rope_theta",)),
    ("a negative theta", {"rope_theta": -10000.0}, ("rope_theta",)),
    ("a theta in quotes", {"rope_theta": "10000"}, ("rope_theta",)),
    (
        "two thetas that contradict each other",
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        ("rope_theta",),
    ),
    (
        "two scalings that contradict each other",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        ("rope_scaling|rope_parameters",),
    ),
    (
        "two names of one scaling that contradict each other",
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        ("type|dynamic",),
    ),
    ("a scaling factor in quotes", {"rope_scaling": {"type": "linear", "factor": "2.0"}}, ("factor",)),
    ("a scaling factor of zero", {"rope_scaling": {"type": "linear", "factor": 0}}, ("factor",)),
    ("a negative scaling factor", {"rope_scaling": {"type": "linear", "factor": -2.0}}, ("factor",)),
    ("a scaling factor of null", {"rope_scaling": {"type": "linear", "factor": None}}, ("factor",)),
    ("a linear scaling without a factor", {"rope_scaling": {"type": "linear"}}, ("factor",)),
    ("a scaling that is a word", {"rope_scaling": "linear"}, ("rope_scaling",)),
    ("a scaling type that is a number", {"rope_scaling": {"type": 3, "factor": 2.0}}, ("rope|type",)),
    ("YaRN", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("yarn",)),
    ("dynamic scaling", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("dynamic",)),
    ("llama3 scaling with a frequency of null", {"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, ("low_freq_factor",)),
    ("llama3 scaling whose two frequencies are equal", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ("freq_factor",)),
    (
        "llama3 scaling of zero positions",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}},
        ("original_max_position_embeddings",),
    ),
    ("half of each head rotated", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
    ('"false" in quotes for tied embeddings', {"tie_word_embeddings": "false"}, ("tie_word_embeddings",)),
    ('"false" in quotes for a bias', {"attention_bias": "false"}, ("attention_bias",)),
    ("another activation", {"hidden_act": "gelu"}, ("hidden_act",)),
    ("a bias in the MLP", {"mlp_bias": True}, ("mlp_bias",)),
    ("Granite's multipliers", {"embedding_multiplier": 12.0}, ("embedding_multiplier",)),
    ("Gemma's soft cap on logits", {"final_logit_softcapping": 30.0}, ("final_logit_softcapping",)),
    ("Cohere's scaled logits", {"logit_scale": 0.0625}, ("logit_scale",)),
    ("experts", {"num_local_experts": 8, "num_experts_per_tok": 2}, ("num_local_experts",)),
    ("no model type", {"model_type": DROP}, ("architecture",)),
    ("a model type that edgetune does not run", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ("GPT2",)),
    ("a list of model types", {"model_type": ["llama"]}, ("architecture|model_type",)),
    ("an object of architectures", {"model_type": "x", "architectures": {"a": 1}}, ("architecture",)),
    ("a negative sliding window", {"model_type": "mistral", "sliding_window": -4}, ("sliding_window",)),
    ("a sliding window in quotes", {"model_type": "mistral", "sliding_window": "4096"}, ("sliding_window",)),
    (
        "kinds for three of two layers",
        {"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"] * 3},
        ("layer_types",),
    ),
    (
        "an unknown kind of layer",
        {"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention", "linear_attention"]},
        ("layer_types",),
    ),
    ("an end-of-text id in quotes", {"eos_token_id": "2"}, ("eos_token_id",)),
    ("half an end-of-text id", {"eos_token_id": 2.5}, ("eos_token_id",)),
    ("a list with a word among the end-of-text ids", {"eos_token_id": [2, "</s>"]}, ("eos_token_id",)),
    ("no positions", {"max_position_embeddings": 0}, ("max_position_embeddings",)),
    ("a million million positions", {"max_position_embeddings": 10**12}, ("max_position_embeddings",)),
    ("GPTQ", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("gptq",)),
    ("FP8", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, ("fp8",)),
    ("8 bits of bitsandbytes", {"quantization_config": {"load_in_8bit": True}}, ("8-bit",)),
    ("FP4", {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}, ("fp4",)),
)

# Name, and changes that alter no logit: the model writes what it writes without them.
TAKEN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("max_sequence_length, which LLaMA 1 has", {"max_sequence_length": 2048}),
    ("_model_name_or_path, which transformers writes for GGUF", {"_model_name_or_path": "TheBloke/x.gguf"}),
    ("auto_map, whose code is never run", {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}),
    ("sampling settings", {"temperature": 0.6, "top_p": 0.9, "max_length": 20, "do_sample": True}),
    ("the tokenizer's settings", {"unk_token_id": 0, "model_max_length": 4096}),
    ("noise of a past training", {"neftune_noise_alpha": 5}),
    ("keys_to_ignore_at_inference", {"keys_to_ignore_at_inference": ["past_key_values"]}),
    ("an unknown key that is null", {"sliding_window_pattern": None}),
    ("no architectures", {"architectures": DROP}),
    ("a head size of null", {"head_dim": None}),
    ("a theta of null", {"rope_theta": None}),
    ("a default scaling with its original positions", {"rope_scaling": {"type": "default",
        "original_max_position_embeddings": 1024}}),
    ("two thetas that agree", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("a whole number as a decimal for theta", {"rope_theta": 10000}),
    ("swish for silu", {"hidden_act": "swish"}),
    ("a padding id of -1, as LLaMA 1 has", {"pad_token_id": -1}),
    ("an attention implementation of another library", {"attn_implementation": "kernels-community/flash-attn3"}),
    ("a private attention implementation", {"_attn_implementation": "flash_attention_2"}),
    ("no quantisation in an empty object", {"quantization_config": None}),
    ("a dtype that torch does not have", {"torch_dtype": "float13"}),
)  # fmt: skip


def _refusing(changes: dict[str, Any], words: tuple[str, ...]) -> Any:
    return lambda place: place.opened(place.model(**changes)).refused(*words)


def _taking(changes: dict[str, Any]) -> Any:
    return lambda place: place.opens_as_plain(place.model(**changes))


CASES.extend(Case(KIND, name, _refusing(changes, words)) for name, changes, words in REFUSED)
CASES.extend(Case(KIND, name, _taking(changes)) for name, changes in TAKEN)


def written(place: Place, content: str | bytes) -> Path:
    """Write the tiny LLaMA with other bytes for its config.json."""
    model = place.model()
    (model / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return model


def text(place: Place) -> str:
    """Return the tiny LLaMA's config.json."""
    return (place.model("plain") / "config.json").read_text()


@case("a linear scaling with its original positions")
def _(place: Place) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    plain = place.opened(place.model("a", rope_scaling=scaling)).taken().json["text"]
    with_positions = place.model("b", rope_scaling={**scaling, "original_max_position_embeddings": 1024})
    assert place.opened(with_positions).taken().json["text"] == plain


@case("an empty file")
def _(place: Place) -> None:
    place.opened(written(place, "")).refused(r"config\.json")


@case("a file cut in half")
def _(place: Place) -> None:
    place.opened(written(place, text(place)[:200])).refused(r"config\.json")


@case("an array")
def _(place: Place) -> None:
    place.opened(written(place, f"[{text(place)}]")).refused(r"config\.json", "object")


@case("a comma after the last key")
def _(place: Place) -> None:
    place.opened(written(place, text(place).rstrip()[:-1] + ",}")).refused(r"config\.json", "JSON")


@case("Python's quotes instead of JSON's")
def _(place: Place) -> None:
    place.opened(written(place, text(place).replace('"', "'"))).refused(r"config\.json", "JSON")


@case("a key given twice with two values")
def _(place: Place) -> None:
    twice = text(place).replace('"model_type"', '"rms_norm_eps": 0.1, "model_type"', 1)
    place.opened(written(place, twice)).refused(r"config\.json", "repeated|twice")


@case("NaN for a number")
def _(place: Place) -> None:
    place.opened(written(place, text(place).replace("1e-05", "NaN"))).refused(r"config\.json", "NaN")


@case("a number too large for a double")
def _(place: Place) -> None:
    place.opened(written(place, text(place).replace("1e-05", "1e999"))).refused(r"config\.json", "large")


@case("a number of a million digits")
def _(place: Place) -> None:
    place.opened(written(place, text(place).replace("8192", "9" * 1_000_000))).refused(r"config\.json", "digits")


@case("a hundred thousand brackets")
def _(place: Place) -> None:
    place.opened(written(place, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}")).refused(r"config\.json", "nested")


@case("half of a surrogate pair")
def _(place: Place) -> None:
    lone = text(place).replace('"model_type"', '"_name_or_path": "\\ud83d", "model_type"', 1)
    place.opened(written(place, lone)).refused(r"config\.json", "surrogate")


@case("UTF-16, as PowerShell's > writes")
def _(place: Place) -> None:
    place.opened(written(place, text(place).encode("utf-16"))).refused(r"config\.json")


@case("a byte order mark")
def _(place: Place) -> None:
    place.opens_as_plain(written(place, b"\xef\xbb\xbf" + text(place).encode()))


@case("more than its limit of 4 MiB")
def _(place: Place) -> None:
    place.opened(written(place, text(place) + " " * (5 << 20))).refused(r"config\.json", "MiB")
