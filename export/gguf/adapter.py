"""A LoRA adapter as a GGUF file, there and back, value-exact: both matrices in f32, and alpha so that alpha / r is the scale.

llama.cpp's loader (src/llama-adapter.cpp) asks for general.type, general.architecture, adapter.type and
adapter.lora.alpha, and for `<tensor of the model>.lora_a` (r, in) and `.lora_b` (out, r). We add what it does not read: the
head counts, since the order of rows depends on them, and what its one alpha in f32 was made of.
"""

from __future__ import annotations

import math
import mmap
import re
import reprlib
import statistics
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.gguf.names import ARCHITECTURES, LINEARS, architecture, from_llama_rows, is_rotated, to_llama_rows
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LINEARS as ORDER
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError, UsageError
from edgetune.runtime.files import PRIVATE_FILE
from edgetune.runtime.peft_folder import NO_LORA, NO_MATRIX, NOT_FINITE, refuse_tensors

_MOST_KEYS, _MOST_TENSORS, _MOST_ITEMS = 1024, 1 << 16, 1 << 20
_MOST_DIMS = 4  # ggml's
_LONGEST_TEXT, _LONGEST_HEADER = 1 << 20, 16 << 20
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # gguf's types as struct spells them
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # ggml's types of tensors
_TENSOR = re.compile(r"blk\.(\d{1,4})\.(\w+)\.weight\.lora_([ab])")
_NAMES = {theirs: ours for ours, theirs in LINEARS.items()}
_ALPHA, _ACTIVATED = "adapter.lora.alpha", "adapter.alora.invocation_tokens"


def write_adapter(adapter: Adapter, config: LlamaConfig, path: Path) -> None:
    """Write an adapter of a base with `config`. Raises ModelError for a base that llama.cpp has no architecture for."""
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
    """Read a GGUF LoRA, whoever wrote it, for the model `base`, whose heads the order of its rows goes by; it becomes f32.

    Raises AdapterError for a file that is none, is damaged or holds anything else, every tensor named, and for one whose
    rows stand in the order of another architecture or of other heads than `base` has, where it says so: the files of
    llama.cpp's own converter do not. Shapes are for adapter.check_fits.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Header(data), data, path, base)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); check that it is there and yours to read.") from error
    except (ValueError, UsageError) as error:
        said = str(error).rstrip(".")
        raise AdapterError(f"{path} is no usable GGUF LoRA adapter ({said}); export or copy it again.") from error


class _Header:
    """keys: every scalar and string key; tensors: name -> (shape outermost first, ggml type, place in the file)."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0
        magic, version = self._take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin with GGUF, version 2 or 3")
        tensors, keys = self._take("QQ")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise ValueError(f"it announces {tensors} tensors and {keys} keys")
        self.keys: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            self.keys[key] = self._value(*self._take("I"))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._text()
            (dims,) = self._take("I")
            if not 1 <= dims <= _MOST_DIMS or name in found:
                raise ValueError(f"tensor {name[:80]!r} {'stands twice' if name in found else f'has {dims} dimensions'}")
            *sizes, kind, offset = self._take(f"{dims}QIQ")
            found[name] = (tuple(reversed(sizes)), kind, offset)
        alignment = self.keys.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 16:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: (shape, kind, start + offset) for name, (shape, kind, offset) in found.items()}

    def _take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + form)
        if self._at + size > min(len(self._data), _LONGEST_HEADER):
            raise ValueError("it ends within its header, or has none that ends")
        values = struct.unpack_from("<" + form, self._data, self._at)
        self._at += size
        return values

    def _text(self) -> str:
        (length,) = self._take("Q")
        if length > _LONGEST_TEXT:
            raise ValueError(f"it holds a text of {length} bytes")
        return str(self._take(f"{length}s")[0], "utf-8")

    def _value(self, kind: int) -> Any:
        """A scalar or a text; of an array, what it holds is passed over."""
        if kind == 8:
            return self._text()
        if kind == 9:
            inner, count = self._take("IQ")
            if inner == 9 or count > _MOST_ITEMS:
                raise ValueError(f"it holds an array of {count} items of type {inner}")
            if inner == 8:
                for _ in range(count):
                    self._text()
            else:
                self._take(f"{count * struct.calcsize('<' + self._form(inner))}x")
            return None
        return self._take(self._form(kind))[0]

    @staticmethod
    def _form(kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        return _SCALARS[kind]


def _read(header: _Header, data: mmap.mmap, path: Path, base: LlamaConfig) -> Adapter:
    _check_keys(header.keys, path, base)
    tensors = _tensors(header, data, path)
    if not tensors:
        raise ValueError("it holds no tensor")
    shapes = base.linear_shapes()
    for (layer, name, part), tensor in tensors.items():  # rows of another number have no order, and are refused with the rest
        if part == "B" and is_rotated(ARCHITECTURES[base.model_type], name) and tensor.shape[0] == shapes[name][0]:
            tensors[layer, name, part] = from_llama_rows(tensor, base.head_dim)
    rank = statistics.mode(tensor.shape[0 if part == "A" else 1] for (_, _, part), tensor in tensors.items())
    found, layers = {name for _, name, _ in tensors}, tuple(sorted({layer for layer, _, _ in tensors}))
    config = _lora_config(header.keys, rank, tuple(name for name in ORDER if name in found))
    return Adapter(config, tensors, {}, None if layers == tuple(range(base.num_layers)) else layers)


def _check_keys(keys: dict[str, Any], path: Path, base: LlamaConfig) -> None:
    """Raise where the file is no LoRA, or the rows of its q and k, whose shapes may fit, stand in another order."""
    kinds = keys.get("general.type"), keys.get("adapter.type")
    if kinds != ("adapter", "lora"):
        raise ValueError(f"its types are {reprlib.repr(kinds)}, expected ('adapter', 'lora')")
    if _ACTIVATED in keys:
        raise ValueError("it is an aLoRA, which acts after certain tokens alone; expected plain LoRA")
    arch = ARCHITECTURES[base.model_type]
    heads = f"{arch}.attention.head_count"
    expected: dict[str, Any] = {"general.architecture": arch}
    expected |= {key: n for key, n in ((heads, base.num_heads), (f"{heads}_kv", base.num_kv_heads)) if key in keys}
    wrong = [f"{key} {str(keys.get(key))[:40]}, expected {n}" for key, n in expected.items() if keys.get(key) != n]
    if wrong:
        raise AdapterError(f"{path} was made for another base: {'; '.join(wrong)}; name its model with --model.")


def _tensors(header: _Header, data: mmap.mmap, path: Path) -> dict[tuple[int, str, str], Tensor]:
    """The file's matrices in f32, rows as they stand there. Raises AdapterError, naming them, for any that are none."""
    sizes = {
        full: math.prod(shape) * _DTYPES[kind].itemsize for full, (shape, kind, _) in header.tensors.items() if kind in _DTYPES
    }
    if sum(sizes.values()) > len(data):  # tensors that lie over each other would make a small file a large adapter
        raise ValueError("its tensors together are larger than the file")
    tensors: dict[tuple[int, str, str], Tensor] = {}
    faults: defaultdict[str, list[str]] = defaultdict(list)
    for full, (shape, kind, place) in header.tensors.items():
        match = _TENSOR.fullmatch(full)
        if match is None or match[2] not in _NAMES:
            faults[NO_LORA].append(full)
        elif kind not in _DTYPES:
            faults["neither f32 nor f16 nor bf16"].append(full)
        elif len(shape) != 2 or 0 in shape:
            faults[NO_MATRIX].append(full)
        elif place + sizes[full] > len(data):
            faults["beyond the file's end"].append(full)
        elif (where := (int(match[1]), _NAMES[match[2]], match[3].upper())) in tensors:
            faults["given twice"].append(full)
        else:
            raw = bytearray(data[place : place + sizes[full]])
            tensors[where] = torch.frombuffer(raw, dtype=_DTYPES[kind]).view(shape).float()
            if not torch.isfinite(tensors[where]).all():
                faults[NOT_FINITE].append(full)
    refuse_tensors(path, faults)
    return tensors


def _alpha(config: LoraConfig) -> float:
    """What llama.cpp divides by the rank, as the file's f32 has it."""
    return torch.tensor(config.scale * config.rank, dtype=torch.float32).item()


def _lora_config(keys: dict[str, Any], rank: int, targets: tuple[str, ...]) -> LoraConfig:
    """Alpha as llama.cpp takes it; what edgetune made it of, where the file tells and it still gives that alpha."""
    alpha = keys.get(_ALPHA, 0.0)
    if not isinstance(alpha, float):
        raise ValueError(f"its {_ALPHA} is {reprlib.repr(alpha)}, expected a number")
    own, dropout, rslora = (keys.get(f"edgetune.lora.{name}") for name in ("alpha", "dropout", "rslora"))
    if isinstance(own, float) and isinstance(dropout, float) and isinstance(rslora, bool):
        written = LoraConfig(rank, own, dropout, targets, rslora)
        if _alpha(written) == alpha:
            return written
    return LoraConfig(rank, alpha or float(rank), 0.0, targets)  # llama.cpp's scale is 1 where there is none
