"""Write and read a LoRA adapter as a GGUF file, value-exact: both matrices in f32, and alpha such that alpha / r is the scale.

The file has one alpha, and llama.cpp divides it by the rank of each linear: the rest of the scale of a linear that has an alpha
of its own is multiplied into its B.

llama.cpp's loader (src/llama-adapter.cpp) asks for general.type, general.architecture, adapter.type and adapter.lora.alpha, and
for `<tensor of the model>.lora_a` (r, in) and `.lora_b` (out, r). edgetune adds keys that it ignores: the head counts, on which
the order of the rows depends, and the settings from which llama.cpp's single alpha in f32 was computed.
"""

from __future__ import annotations

import math
import mmap
import re
import reprlib
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.gguf.header import Header, overlap
from edgetune.export.gguf.names import ARCHITECTURES, LINEARS, architecture, from_llama_rows, is_rotated, to_llama_rows
from edgetune.runtime.adapter import Adapter, check_shapes
from edgetune.runtime.config import LINEARS as ORDER
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError, UsageError
from edgetune.runtime.files import PRIVATE_FILE
from edgetune.runtime.peft_folder import NO_MATRIX, NOT_FINITE, fault_of_name, refuse_tensors
from edgetune.runtime.untrusted_file import ADAPTER_WEIGHTS, open_untrusted

ADAPTER_FILE = "adapter.gguf"
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""The dtype of each of ggml's tensor types (ggml_type) that an adapter may have."""
_TENSOR = re.compile(r"blk\.(\d{1,4})\.(\w+)\.weight\.lora_([ab])")
_HF_NAMES = {gguf_name: hf_name for hf_name, gguf_name in LINEARS.items()}
"""Hugging Face's name of each linear by llama.cpp's."""
_ALPHA, _ACTIVATED = "adapter.lora.alpha", "adapter.alora.invocation_tokens"


def write_adapter(adapter: Adapter, config: LlamaConfig, path: Path) -> None:
    """Write an adapter of a base with `config`. Raises ModelError for a base whose architecture llama.cpp does not have."""
    import gguf

    arch = architecture(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(_ALPHA, _alpha(adapter.config))
    writer.add_float64("edgetune.lora.alpha", adapter.config.alpha)
    writer.add_float64("edgetune.lora.dropout", adapter.config.dropout)
    writer.add_bool("edgetune.lora.rslora", adapter.config.rslora)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    order = {name: n for n, name in enumerate(ORDER)}
    for layer, name, part in sorted(adapter.tensors, key=lambda key: (key[0], order[key[1]], key[2])):
        tensor = adapter.tensors[layer, name, part].float()
        if part == "B" and not adapter.is_uniform:
            tensor = tensor * (adapter.scale_of(layer, name) * tensor.shape[1] / _alpha(adapter.config))
        if part == "B" and is_rotated(arch, name):
            tensor = to_llama_rows(tensor, config.head_dim)
        writer.add_tensor(f"blk.{layer}.{LINEARS[name]}.weight.lora_{part.lower()}", tensor.contiguous().numpy())
    try:
        path.touch(PRIVATE_FILE)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_adapter(path: Path, base: LlamaConfig) -> Adapter:
    """Read a GGUF LoRA, written by any program, as f32. The order of its rows depends on the heads of the model `base`.

    Raises AdapterError for a file that is damaged or holds anything but LoRA, naming every such tensor, and for one that was
    made for another architecture, another shape or other head counts than those of `base`; no tensor is read before that. Files
    of llama.cpp's own converter do not give their head counts.
    """
    try:
        with open_untrusted(path, ADAPTER_WEIGHTS) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(Header(data), data, path, base)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); check that it is there and yours to read.") from error
    except (ValueError, UsageError) as error:
        reason = str(error).rstrip(".")
        raise AdapterError(f"{path} is not a usable GGUF LoRA adapter ({reason}); export or copy it again.") from error


def _read(header: Header, data: mmap.mmap, path: Path, base: LlamaConfig) -> Adapter:
    """Build the adapter from an opened file. Raises ValueError or AdapterError where it does not fit."""
    _check_keys(header.keys, path, base)
    tensors = _tensors(header, data, path, base)
    if not tensors:
        raise ValueError("it holds no tensors")
    for (layer, name, part), tensor in tensors.items():
        if part == "B" and is_rotated(ARCHITECTURES[base.model_type], name):
            tensors[layer, name, part] = from_llama_rows(tensor, base.head_dim)
    ranks = {(layer, name): len(tensor) for (layer, name, part), tensor in tensors.items() if part == "A"}
    found, layers = {name for _, name in ranks}, tuple(sorted({layer for layer, _ in ranks}))
    config = _lora_config(header.keys, statistics.mode(ranks.values()), tuple(name for name in ORDER if name in found))
    if len(set(ranks.values())) > 1:  # llama.cpp's rule, which edgetune's own settings need not give for every rank
        config = replace(config, alpha=config.scale * config.rank, rslora=False)
    alphas = {} if header.keys.get(_ALPHA) else {linear: float(rank) for linear, rank in ranks.items() if rank != config.rank}
    return Adapter(config, tensors, {}, None if layers == tuple(range(base.num_layers)) else layers, alphas)


def _check_keys(keys: dict[str, Any], path: Path, base: LlamaConfig) -> None:
    """Raise ValueError if the file is not a LoRA, AdapterError if it is for another architecture or other head counts: then the
    rows of q and k are in another order, even where their shapes fit."""
    kinds = keys.get("general.type"), keys.get("adapter.type")
    if kinds != ("adapter", "lora"):
        raise ValueError(f"its types are {reprlib.repr(kinds)}, expected ('adapter', 'lora')")
    if _ACTIVATED in keys:
        raise ValueError("it is an aLoRA, which takes effect only after certain tokens; expected plain LoRA")
    arch = ARCHITECTURES[base.model_type]
    heads = f"{arch}.attention.head_count"
    expected: dict[str, Any] = {"general.architecture": arch}
    expected |= {key: n for key, n in ((heads, base.num_heads), (f"{heads}_kv", base.num_kv_heads)) if key in keys}
    wrong = [f"{key} {str(keys.get(key))[:40]}, expected {n}" for key, n in expected.items() if keys.get(key) != n]
    if wrong:
        raise AdapterError(f"{path} was made for another base: {'; '.join(wrong)}; name its model with --model.")


def _tensors(header: Header, data: mmap.mmap, path: Path, base: LlamaConfig) -> dict[tuple[int, str, str], Tensor]:
    """Return the file's matrices in f32, their rows in the file's order.

    Raises AdapterError that names every other tensor, or every matrix whose shape does not fit the model `base`.
    """
    sizes = {
        full: math.prod(shape) * _DTYPES[kind].itemsize for full, (shape, kind, _) in header.tensors.items() if kind in _DTYPES
    }
    if overlap((start, start + sizes[full]) for full, (_, _, start) in header.tensors.items() if full in sizes):
        raise ValueError("its tensors overlap")
    shapes: dict[tuple[int, str, str], tuple[int, ...]] = {}
    names: dict[tuple[int, str, str], str] = {}
    faults: defaultdict[str, list[str]] = defaultdict(list)
    for full, (shape, kind, start) in header.tensors.items():
        match = _TENSOR.fullmatch(full)
        if match is None or match[2] not in _HF_NAMES:
            faults[fault_of_name(full)].append(full)
        elif kind not in _DTYPES:
            faults["neither f32 nor f16 nor bf16"].append(full)
        elif len(shape) != 2 or 0 in shape:
            faults[NO_MATRIX].append(full)
        elif start + sizes[full] > len(data):
            faults["beyond the file's end"].append(full)
        elif (key := (int(match[1]), _HF_NAMES[match[2]], match[3].upper())) in shapes:
            faults["given twice"].append(full)
        else:
            shapes[key], names[key] = tuple(shape), full
    if not faults:
        check_shapes(shapes, None, base)
    tensors = {}
    for key, full in names.items():
        shape, kind, start = header.tensors[full]
        raw = bytearray(data[start : start + sizes[full]])
        tensors[key] = torch.frombuffer(raw, dtype=_DTYPES[kind]).view(shape).float()
        if not torch.isfinite(tensors[key]).all():
            faults[NOT_FINITE].append(full)
        if faults:
            del tensors[key]
    refuse_tensors(path, faults)
    return tensors


def _alpha(config: LoraConfig) -> float:
    """Return the alpha that llama.cpp divides by the rank, rounded to f32 as in the file."""
    return torch.tensor(config.scale * config.rank, dtype=torch.float32).item()


def _lora_config(keys: dict[str, Any], rank: int, targets: tuple[str, ...]) -> LoraConfig:
    """Return the configuration that edgetune wrote if it still gives the file's alpha, otherwise one with the file's alpha."""
    alpha = keys.get(_ALPHA, 0.0)
    if not isinstance(alpha, float):
        raise ValueError(f"its {_ALPHA} is {reprlib.repr(alpha)}, expected a number")
    own_alpha, dropout, rslora = (keys.get(f"edgetune.lora.{name}") for name in ("alpha", "dropout", "rslora"))
    if isinstance(own_alpha, float) and isinstance(dropout, float) and isinstance(rslora, bool):
        written = LoraConfig(rank, own_alpha, dropout, targets, rslora)
        if _alpha(written) == alpha:
            return written
    return LoraConfig(rank, alpha or float(rank), 0.0, targets)  # without an alpha llama.cpp's scale is 1
