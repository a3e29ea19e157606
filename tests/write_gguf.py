"""Write tiny models as GGUF files with the gguf library, in any of its types, whole or in parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.conversion.families import FAMILIES
from edgetune.export.gguf.names import is_rotated, tensor_name, to_llama_rows

gguf = pytest.importorskip("gguf")
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "ministral3": "mistral3"}
"""llama.cpp's names of architectures where they are not those of config.json."""
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Sizes of a tiny model that fill whole blocks of every type."""
_SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XS": (0,), "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}  # fmt: skip
"""Offsets of the f16 numbers in a block of each type that the library cannot quantise to."""
_SCALE = {"Q6_K": 2e-5, "IQ4_XS": 5e-5, "IQ4_NL": 1e-3}
"""Scales of random blocks that give numbers of about 0.05; 1e-4 for the others."""


def encoded(weights: torch.Tensor, kind: str, seed: int) -> np.ndarray[Any, Any]:
    """Return rows in a type: quantised by the library, or random codes for the types that it cannot quantise to."""
    quant = gguf.GGMLQuantizationType[kind]
    if kind not in _SCALES:
        return gguf.quants.quantize(weights.numpy(), quant)
    block, size = gguf.GGML_QUANT_SIZES[quant]
    rows, width = weights.shape
    raw = np.random.default_rng(seed).integers(0, 256, (rows * width // block, size), dtype=np.uint8)
    for offset in _SCALES[kind]:
        raw[:, offset : offset + 2] = np.frombuffer(np.float16(_SCALE.get(kind, 1e-4)).tobytes(), np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(
    path: Path,
    model: Any,
    kind: str = "F32",
    tensors_a_part: int = 0,
    extra: Mapping[str, torch.Tensor] | None = None,
    **keys: Any,
) -> Path:
    """Write a transformers model, its matrices in one of the library's types, its vectors in F32; return the first part's path.

    extra: more tensors, by their names in GGUF. keys: numbers, truth values and texts under the architecture's name.
    """
    config = model.config
    arch = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_a_part)
    writer.add_type("model")
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for name, value in keys.items():
        writer.add_key_value(f"{arch}.{name}", value, _type_of(value))
    modules = FAMILIES[arch].modules
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = to_llama_rows(tensor, head_dim) if is_rotated(arch, name) else tensor
        if rows.dim() == 1:
            offset = 1.0 if arch == "gemma3" else 0.0
            writer.add_tensor(tensor_name(name, modules), (rows + offset).numpy())
        else:
            raw = encoded(rows.contiguous(), kind, number)
            writer.add_tensor(tensor_name(name, modules), raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _type_of(value: Any) -> gguf.GGUFValueType:
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    return kinds.get(type(value), gguf.GGUFValueType.STRING)
