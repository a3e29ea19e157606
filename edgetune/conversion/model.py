"""Describe a GGUF model as Hugging Face does: its metadata as config.json, its tensors by Hugging Face's names, in its order.

A family of models is an entry of FAMILIES. Whatever in a file would change what the model computes, and is not understood here,
is refused by name: a model runs correctly or is not converted. Keys: llama.cpp's gguf-py/gguf/constants.py.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetune.conversion.dequantize import READABLE
from edgetune.conversion.gguf_file import GgufFile
from edgetune.export.gguf.names import from_llama_rows, is_rotated, tensor_name
from edgetune.runtime.checkpoint import model_shapes
from edgetune.runtime.config import ARCHITECTURES, LlamaConfig, RopeConfig
from edgetune.runtime.errors import ModelError
from edgetune.runtime.model import rope_frequencies
from edgetune.runtime.names import EMBEDDING, HEAD, hf_linear_name, layer_tensor
from edgetune.runtime.untrusted_file import MAX_LAYERS, MAX_WIDTH

_SHOWN = 8
"""Most tensors or keys that a message names. Chosen by hand."""
_ROPE_FACTORS = "rope_freqs.weight"
"""The tensor (hd/2,) by which llama.cpp divides the frequencies of RoPE."""
_LLAMA3_CONTEXTS = (8192, *(2**power for power in range(5, 21)))
"""Context lengths before Llama 3.1's scaling that are tried: that of all published models first."""
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
"""low_freq_factor and high_freq_factor of all published models with Llama 3.1's scaling."""
_FACTOR_ERROR = 1e-5
"""Largest relative difference of a stored factor of RoPE from the computed one. Rounding to f32 leaves 1e-7; another context
length changes some factor by more than 1e-2."""
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


class Keys:
    """The metadata of a model, read with checks."""

    def __init__(self, file: GgufFile) -> None:
        self.path, self.metadata, self.tensors = file.path, file.metadata, file.tensors
        self.arch = str(file.metadata.get("general.architecture"))[:80]

    def whole(self, name: str, most: int, default: int | None = None, least: int = 1) -> int:
        """Return a whole number, `least` to `most`, under a key of the architecture. Raises ModelError for anything else."""
        return self._number(name, default, lambda value: type(value) is int and least <= value <= most, "a whole number")

    def real(self, name: str, least: float, most: float, default: float | None = None) -> float:
        """Return a number above `least` and up to `most`: the shortest decimal with the same f32, 1e-05 for 9.99999975e-06."""

        def in_range(value: Any) -> bool:
            return type(value) in (int, float) and math.isfinite(value) and least < value <= most

        return float(str(np.float32(self._number(name, default, in_range, "a number"))))

    def _number(self, name: str, default: Any, valid: Callable[[Any], bool], kind: str) -> Any:
        value = self.metadata.get(f"{self.arch}.{name}", default)
        if value is None:
            raise self.fault(f"its metadata lacks {self.arch}.{name}")
        if not valid(value):
            raise self.fault(f"its {self.arch}.{name} is {_shown(value)}, expected {kind} that a model can have")
        return value

    def fault(self, reason: str) -> ModelError:
        """Return the error for a file that contradicts itself or is damaged."""
        return ModelError(f"{self.path} is not a usable GGUF model ({reason}); download or copy it again.")

    def unsupported(self, what: str) -> ModelError:
        """Return the error for a model that edgetune cannot run."""
        return ModelError(f"{self.path} cannot be used: {what}. Choose another model with `edgetune models`.")


@dataclass(frozen=True)
class Family:
    """One of llama.cpp's architectures: the model_type in config.json, and what its config.json says beyond the common keys."""

    model_type: str
    settings: Callable[[Keys], dict[str, Any]] = lambda keys: {}
    keys: frozenset[str] = frozenset()
    """Keys of the metadata, after the architecture's name, that `settings` reads."""


def _llama_settings(keys: Keys) -> dict[str, Any]:
    """Return what differs among the models that llama.cpp calls llama: biases, and Mistral's sliding window."""
    biased = tensor_name(layer_tensor(0, f"{hf_linear_name('q_proj')}.bias")) in keys.tensors
    window = keys.whole("attention.sliding_window", 2**31 - 1, 0, least=0)
    mistral = {"model_type": "mistral", "architectures": [ARCHITECTURES["mistral"]], "sliding_window": window}
    return {"attention_bias": biased} | (mistral if window else {})


FAMILIES = {
    "llama": Family("llama", _llama_settings, frozenset(["attention.sliding_window"])),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
}
"""The families that can be converted, by llama.cpp's names of their architectures."""


class Model:
    """A GGUF model in Hugging Face's terms.

    hf_config: the content of config.json, without the dtype. config: the same as the engine reads it. shapes: the shape of each
    tensor by its Hugging Face name, layer by layer.
    """

    def __init__(self, file: GgufFile) -> None:
        """Describe a file. Raises ModelError for a model that edgetune cannot run or read, or that contradicts itself."""
        self.file = file
        keys = Keys(file)
        self.arch = keys.arch
        family = _family(keys)
        _refuse_unknown_keys(keys, family)
        self.hf_config = _hf_config(keys, family, file)
        try:
            self.config = LlamaConfig.from_hf(self.hf_config)
        except ModelError as error:
            raise keys.unsupported(f"as a Hugging Face model, {str(error).rstrip('.')}") from error
        self.shapes = model_shapes(self.config)
        self._names = {name: tensor_name(name) for name in self.shapes}
        _refuse_tensors(keys, {self._names[name]: shape for name, shape in self.shapes.items()})

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in f32, by its Hugging Face name and with its rows in Hugging Face's order."""
        tensor = self.file.dequantized(self._names[name])
        return from_llama_rows(tensor, self.config.head_dim) if is_rotated(self.arch, name) else tensor

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor as `tensor` returns it, in pieces of some rows. Raises ModelError for inf and NaN."""
        pieces = iter([self.tensor(name)]) if is_rotated(self.arch, name) else self.file.slices(self._names[name])
        for piece in pieces:
            if not all(torch.isfinite(end) for end in torch.aminmax(piece)):
                raise ModelError(
                    f"{self.file.path} holds inf or NaN in {self._names[name]}, so it can compute nothing; copy it again."
                )
            yield piece


def _family(keys: Keys) -> Family:
    """Return the family of a model. Raises ModelError for a file that is no model, and for a family that edgetune has not."""
    kind, arch = keys.metadata.get("general.type", "model"), keys.metadata.get("general.architecture")
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        raise ModelError(f"{keys.path} is {_OTHER_PARTS[kind]}.")
    if not isinstance(arch, str):
        raise keys.fault("its metadata lacks general.architecture")
    known = ", ".join(sorted(FAMILIES))
    if arch not in FAMILIES:
        raise keys.unsupported(f"its architecture is {_shown(arch)}, and edgetune converts GGUF files of {known}")
    if keys.metadata.get(f"{arch}.expert_count", 0) != 0:
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
        raise keys.unsupported(f"its metadata sets {_listed(unknown)}, which edgetune does not know")


def _hf_config(keys: Keys, family: Family, file: GgufFile) -> dict[str, Any]:
    """Return the content of config.json, without the dtype."""
    hidden, heads = keys.whole("embedding_length", MAX_WIDTH), keys.whole("attention.head_count", MAX_WIDTH)
    head_dim = keys.whole("attention.key_length", MAX_WIDTH, max(1, hidden // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(name, MAX_WIDTH, head_dim) != head_dim:
            raise keys.unsupported(f"its {name} is not {head_dim}, the length of its keys")
    embedding = file.tensors.get(tensor_name(EMBEDDING))
    if embedding is None or len(embedding.shape) != 2:
        raise keys.fault(f"it has no matrix {tensor_name(EMBEDDING)}")
    vocabulary = embedding.shape[0]
    config = {
        "architectures": [ARCHITECTURES[family.model_type]],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length", 8 * MAX_WIDTH),
        "num_hidden_layers": keys.whole("block_count", MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", MAX_WIDTH, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": vocabulary,
        "max_position_embeddings": keys.whole("context_length", 2**31 - 1),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        "rope_parameters": _rope(keys, file, head_dim),
        "tie_word_embeddings": tensor_name(HEAD) not in file.tensors,
    }
    for name in ("bos_token_id", "eos_token_id"):
        token = keys.metadata.get(f"tokenizer.ggml.{name}")
        config[name] = token if type(token) is int and 0 <= token < vocabulary else None
    return config | family.settings(keys)


def _rope(keys: Keys, file: GgufFile, head_dim: int) -> dict[str, Any]:
    """Return config.json's rope_parameters. Raises ModelError for a kind of RoPE that edgetune does not compute."""
    theta = keys.real("rope.freq_base", 0.0, 1e15, 10000.0)
    kind = keys.metadata.get(f"{keys.arch}.rope.scaling.type", "linear")
    old = keys.real("rope.scale_linear", 0.0, 1e6, 1.0)
    factor = keys.real("rope.scaling.factor", -1.0, 1e6, old) or 1.0  # llama.cpp reads 0 as no scaling
    if kind not in ("none", "linear"):
        raise keys.unsupported(f"its RoPE is scaled by the method {_shown(kind)}, and edgetune computes linear and Llama 3's")
    scaled = kind == "linear" and factor != 1.0
    if _ROPE_FACTORS in file.tensors:
        llama3 = _llama3_scaling(keys, file, RopeConfig(theta), head_dim)
        if llama3 and scaled:
            raise keys.unsupported(f"it has both {_ROPE_FACTORS} and a linear scaling of RoPE")
        if llama3:
            return {"rope_type": "llama3", "rope_theta": theta, **llama3}
    if scaled:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_scaling(keys: Keys, file: GgufFile, plain: RopeConfig, head_dim: int) -> dict[str, Any]:
    """Return the parameters of Llama 3.1's scaling that give the factors in the file, or {} if all are 1.

    The factors are all that the model computes with, so it does not matter which parameters gave them. Raises ModelError if
    none of those that are tried did.
    """
    if file.tensors[_ROPE_FACTORS].shape != (head_dim // 2,):
        raise keys.fault(f"its {_ROPE_FACTORS} has {list(file.tensors[_ROPE_FACTORS].shape)} numbers, expected {head_dim // 2}")
    factors = file.dequantized(_ROPE_FACTORS).double()
    if bool((factors == 1).all()):
        return {}
    largest = float(str(np.float32(factors.max().item())))
    unscaled = rope_frequencies(plain, head_dim)
    for context in _LLAMA3_CONTEXTS if 1 < largest < math.inf else ():
        tried = RopeConfig(plain.theta, "llama3", largest, _LLAMA3_LOW, _LLAMA3_HIGH, context)
        if torch.allclose(unscaled / rope_frequencies(tried, head_dim), factors, rtol=_FACTOR_ERROR, atol=0.0):
            numbers = {"factor": largest, "low_freq_factor": _LLAMA3_LOW, "high_freq_factor": _LLAMA3_HIGH}
            return numbers | {"original_max_position_embeddings": context}
    raise keys.unsupported(f"its {_ROPE_FACTORS} holds other factors than Llama 3's scaling of RoPE gives")


def _refuse_tensors(keys: Keys, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError for tensors that are missing, unknown, of another shape than `wanted`, or of a type that is not read."""
    stored = keys.tensors
    faults = [f"{name} is missing" for name in wanted if name not in stored]
    faults += [
        f"{name} has shape {list(stored[name].shape)} where its metadata says {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    unknown = [name for name in stored if name not in wanted and name != _ROPE_FACTORS]
    if unknown and not faults:
        raise keys.unsupported(f"it holds {_listed(unknown)}, which a {keys.arch} model that edgetune runs does not have")
    if faults:
        raise keys.fault(_listed(faults, "; "))
    kinds = sorted({stored[name].kind for name in wanted} - READABLE)
    if kinds:
        raise ModelError(
            f"{keys.path} stores weights as {', '.join(kinds)}, which edgetune cannot read; fetch the model's Q4_K_M, Q8_0 or "
            "F16 file instead."
        )


def _listed(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(item[:200] for item in items[:_SHOWN]) + more


def _shown(value: Any) -> str:
    """Return a value of the metadata for a message."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)} items"
    return "a huge number" if isinstance(value, int) and abs(value) >= 10**20 else reprlib.repr(value)
