"""Describe a GGUF model as Hugging Face does: its metadata as config.json, its tensors by Hugging Face's names, in its order.

Whatever in a file would change what the model computes, and is not understood here, is refused by name: a model runs correctly
or is not converted. Keys: llama.cpp's gguf-py/gguf/constants.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetune.conversion.dequantize import READABLE
from edgetune.conversion.families import FAMILIES, Family
from edgetune.conversion.gguf_file import GgufFile
from edgetune.conversion.metadata import Keys, listed, shown
from edgetune.conversion.rope import ROPE_FACTORS
from edgetune.export.gguf.names import from_llama_rows, is_rotated, tensor_name
from edgetune.runtime.checkpoint import model_shapes
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.fused import fused_shapes, fused_weights
from edgetune.runtime.names import EMBEDDING, HEAD, is_linear
from edgetune.runtime.untrusted_file import MAX_WIDTH

_COMMON_KEYS = frozenset(
    [
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
        "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
        "rope.scaling.finetuned", "pooling_type", "expert_used_count",
    ]
)  # fmt: skip
"""Keys, after the architecture's name, that are read for every family or that change no logit."""
_OTHER_PARTS = {
    "adapter": "a LoRA adapter and not a model; name it with --adapter, and its base with --model",
    "mmproj": "the part of a model that sees pictures; name the model's other file",
    "imatrix": "an importance matrix and not a model; name the model's own file",
}
"""Kinds of GGUF files that are no models, and what to do, by general.type."""


class Model:
    """A GGUF model in Hugging Face's terms.

    hf_config: the content of config.json, without the dtype. config: the same as the engine reads it. shapes: the shape of each
    tensor by its Hugging Face name, layer by layer. linears: the names of those that NF4 applies to.
    """

    def __init__(self, file: GgufFile) -> None:
        """Describe a file. Raises ModelError for a model that edgetune cannot run or read, or that contradicts itself."""
        self.file = file
        keys = Keys(file)
        self.arch = keys.arch
        self.family = _family(keys)
        _refuse_unknown_keys(keys, self.family)
        self.hf_config = _hf_config(keys, self.family, file)
        try:
            self.config = LlamaConfig.from_hf(self.hf_config)
        except ModelError as error:
            raise keys.unsupported(f"as a Hugging Face model, {str(error).rstrip('.')}") from error
        self.shapes = fused_shapes(self.config, model_shapes(self.config))
        self.linears = {name for name in self.shapes if is_linear(name)} | fused_weights(self.config).keys()
        self._names = {name: tensor_name(name, self.arch) for name in self.shapes}
        _refuse_tensors(keys, self.family, {self._names[name]: shape for name, shape in self.shapes.items()})

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in f32, by its Hugging Face name and with its rows in Hugging Face's order. Raises ModelError."""
        return torch.cat(list(self.pieces(name))).view(self.shapes[name])

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor as `tensor` returns it, in pieces of some rows. Raises ModelError for inf and NaN."""
        pieces = self.file.slices(self._names[name])
        if is_rotated(self.arch, name):
            pieces = iter([from_llama_rows(self.file.dequantized(self._names[name]), self.config.head_dim)])
        for piece in pieces:
            if not all(torch.isfinite(end) for end in torch.aminmax(piece)):
                raise ModelError(
                    f"{self.file.path} holds inf or NaN in {self._names[name]}, so it can compute nothing; copy it again."
                )
            yield piece - self.family.norm_offset if name.endswith("norm.weight") else piece


def _family(keys: Keys) -> Family:
    """Return the family of a model. Raises ModelError for a file that is no model, and for a family that edgetune has not."""
    kind, arch = keys.metadata.get("general.type", "model"), keys.metadata.get("general.architecture")
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        raise ModelError(f"{keys.path} is {_OTHER_PARTS[kind]}.")
    if not isinstance(arch, str):
        raise keys.fault("its metadata lacks general.architecture")
    known = ", ".join(sorted(FAMILIES))
    if arch not in FAMILIES:
        raise keys.unsupported(f"its architecture is {shown(arch)}, and edgetune converts GGUF files of {known}")
    if keys.whole("expert_count", 2**31 - 1, 0, least=0):
        raise keys.unsupported("it is a mixture of experts, which edgetune does not run")
    return FAMILIES[arch]


def _refuse_unknown_keys(keys: Keys, family: Family) -> None:
    """Raise ModelError, which names them, for keys of the architecture that could change what the model computes."""
    unknown = [
        name
        for name, value in keys.metadata.items()
        if name.startswith(f"{keys.arch}.")
        and name.removeprefix(f"{keys.arch}.") not in _COMMON_KEYS | family.keys
        and (isinstance(value, list | np.ndarray) or value not in (0, "", False))
    ]
    if unknown:
        raise keys.unsupported(f"its metadata sets {listed(unknown)}, which edgetune does not know")


def _hf_config(keys: Keys, family: Family, file: GgufFile) -> dict[str, Any]:
    """Return the content of config.json, without the dtype."""
    hidden, heads = keys.whole("embedding_length", MAX_WIDTH), keys.whole("attention.head_count", MAX_WIDTH)
    head_dim = keys.whole("attention.key_length", MAX_WIDTH, max(1, hidden // heads))
    for name in ("attention.value_length", *(() if family.reads_partial_rope else ("rope.dimension_count",))):
        if keys.whole(name, MAX_WIDTH, head_dim) != head_dim:
            raise keys.unsupported(f"its {name} is not {head_dim}, the length of its keys")
    embedding = file.tensors.get(tensor_name(EMBEDDING))
    if embedding is None or len(embedding.shape) != 2:
        raise keys.fault(f"it has no matrix {tensor_name(EMBEDDING)}")
    vocabulary = embedding.shape[0]
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length", 8 * MAX_WIDTH),
        "num_hidden_layers": keys.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", MAX_WIDTH, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": vocabulary,
        "max_position_embeddings": keys.whole("context_length", 2**31 - 1),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        "tie_word_embeddings": tensor_name(HEAD) not in file.tensors,
    }
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = keys.metadata.get(f"tokenizer.ggml.{key}_token_id")
        config[name] = token if type(token) is int and 0 <= token < vocabulary else None
    return config | family.settings(keys, head_dim)


def _refuse_tensors(keys: Keys, family: Family, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError for tensors that are missing, unknown, of another shape than `wanted`, or of a type that is not read."""
    stored = keys.tensors
    faults = [f"{name} is missing" for name in wanted if name not in stored]
    faults += [
        f"{name} has shape {list(stored[name].shape)} where its metadata says {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    unknown = [name for name in stored if name not in wanted and name not in family.tensors | {ROPE_FACTORS}]
    if unknown and not faults:
        raise keys.unsupported(f"it holds {listed(unknown)}, which a {keys.arch} model that edgetune runs does not have")
    if faults:
        raise keys.fault(listed(faults, "; "))
    kinds = sorted({stored[name].kind for name in wanted} - READABLE)
    if kinds:
        raise ModelError(
            f"{keys.path} stores weights as {', '.join(kinds)}, which edgetune cannot read; fetch the model's Q4_K_M, Q8_0 or "
            "F16 file instead."
        )
