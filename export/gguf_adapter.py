"""A LoRA adapter as a GGUF file, there and back, value-exact: both matrices in f32, and alpha so that alpha / r is the scale.

llama.cpp's loader (src/llama-adapter.cpp) asks for general.type, general.architecture, adapter.type and
adapter.lora.alpha, and for `<tensor of the model>.lora_a` (r, in) and `.lora_b` (out, r). We add the head counts that the
order of rows depends on, which it does not read and a reader without the base needs.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.gguf_names import ARCHITECTURES, LINEARS, architecture, from_llama_rows, is_rotated, to_llama_rows
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LINEARS as ORDER
from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError, UsageError
from edgetune.runtime.files import PRIVATE_FILE

_MOST_KEYS, _MOST_TENSORS, _MOST_ITEMS = 1024, 1 << 16, 1 << 20
_LONGEST_TEXT, _LONGEST_HEADER = 1 << 20, 16 << 20
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # gguf's types as struct spells them
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # ggml's types of tensors
_TENSOR = re.compile(r"blk\.(\d{1,4})\.(\w+)\.weight\.lora_([ab])")


def write_adapter(adapter: Adapter, config: LlamaConfig, path: Path) -> None:
    """Write an adapter of a base with `config`. Raises ModelError for a base that llama.cpp has no architecture for."""
    import gguf

    arch = architecture(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.config.scale * adapter.config.rank)
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


def read_adapter(path: Path, base: LlamaConfig | None = None) -> Adapter:
    """Read a GGUF LoRA, whoever wrote it; its tensors become f32.

    base: the model it is for, which an adapter for llama's row order needs where the file has no head counts; those of
    llama.cpp's own converter have none. Raises AdapterError for a file that is none, is damaged or holds anything else, and
    for one whose rows stand in the order of another architecture or of other heads than `base` has.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Header(data), data, path, base)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); check that it is there and yours to read.") from error
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is no usable GGUF LoRA adapter ({error}); export or copy it again.") from error
    except UsageError as error:
        raise AdapterError(f"{path} is no usable GGUF LoRA adapter: {error}") from error


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
            if dims != 2 or name in found:
                raise ValueError(f"tensor {name[:80]!r} stands twice" if name in found else f"a tensor has {dims} dimensions")
            inner, outer, kind, offset = self._take("QQIQ")
            found[name] = ((outer, inner), kind, offset)
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


def _read(header: _Header, data: mmap.mmap, path: Path, base: LlamaConfig | None) -> Adapter:
    keys = header.keys
    kinds = keys.get("general.type"), keys.get("adapter.type")
    if kinds != ("adapter", "lora"):
        raise ValueError(f"its types are {kinds}, expected ('adapter', 'lora')")
    arch = keys.get("general.architecture")
    if arch not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"it is for the architecture {str(arch)[:40]!r}, expected llama, qwen2 or qwen3")
    if base is not None:
        _check_base(arch, keys, path, base)
    names = {ours: name for name, ours in LINEARS.items()}
    # Tensors that lie over each other would make a small file a large adapter.
    if sum(math.prod(shape) * _DTYPES[kind].itemsize for shape, kind, _ in header.tensors.values() if kind in _DTYPES) > len(
        data
    ):
        raise ValueError("its tensors together are larger than the file")
    tensors: dict[tuple[int, str, str], Tensor] = {}
    for full, (shape, kind, place) in header.tensors.items():
        match = _TENSOR.fullmatch(full)
        if match is None or match[2] not in names:
            raise ValueError(f"tensor {full[:80]!r} is no LoRA of a linear")
        if kind not in _DTYPES:
            raise ValueError(f"{full} is of ggml's type {kind}, expected f32, f16 or bf16")
        dtype = _DTYPES[kind]
        count = math.prod(shape)
        if count == 0 or place + count * dtype.itemsize > len(data):
            raise ValueError(f"{full} of shape {shape} lies beyond the file's end")
        raw = bytearray(data[place : place + count * dtype.itemsize])
        tensors[int(match[1]), names[match[2]], match[3].upper()] = torch.frombuffer(raw, dtype=dtype).view(shape).float()
    if not tensors:
        raise ValueError("it holds no tensor")
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("it holds inf or NaN")
    for layer, name, part in tensors:
        if part == "B" and is_rotated(arch, name):
            tensors[layer, name, part] = _unrotated(tensors[layer, name, part], _heads(name, keys, path, base))
    ranks = {tensor.shape[0 if part == "A" else 1] for (_, _, part), tensor in tensors.items()}
    if len(ranks) > 1:
        raise ValueError(f"it has the ranks {sorted(ranks)}, expected one")
    rank = ranks.pop()
    alpha = keys.get("adapter.lora.alpha") or float(rank)  # llama.cpp's scale is 1 where there is none
    found = {name for _, name, _ in tensors}
    return Adapter(LoraConfig(rank, float(alpha), 0.0, tuple(name for name in ORDER if name in found)), tensors)


def _check_base(arch: str, keys: dict[str, Any], path: Path, base: LlamaConfig) -> None:
    """Raise AdapterError where the rows of q and k, whose shapes may fit, would be taken in another order than they have."""
    heads = f"{arch}.attention.head_count"
    expected: dict[str, Any] = {"general.architecture": ARCHITECTURES[base.model_type]}
    expected |= {
        key: n for key, n in ((heads, base.num_heads), (f"{heads}_kv", base.num_kv_heads)) if keys.get(key) is not None
    }
    wrong = [f"{key} {str(keys[key])[:40]}, expected {value}" for key, value in expected.items() if keys[key] != value]
    if wrong:
        raise AdapterError(f"{path} was made for another base: {'; '.join(wrong)}; name its model with --model.")


def _heads(name: str, keys: dict[str, Any], path: Path, base: LlamaConfig | None) -> int:
    """How many heads the rows of q_proj or k_proj belong to."""
    if base is not None:
        return base.num_heads if name == "q_proj" else base.num_kv_heads
    heads = keys.get("llama.attention.head_count" if name == "q_proj" else "llama.attention.head_count_kv")
    if type(heads) is not int:
        raise AdapterError(f"{path} does not say how many heads its base has; name the base with --model.")
    return heads


def _unrotated(rows: Tensor, heads: int) -> Tensor:
    head_dim, rest = divmod(rows.shape[0], max(heads, 1))
    if heads < 1 or rest or head_dim % 2:
        raise ValueError(f"{rows.shape[0]} rows do not belong to {heads} heads")
    return from_llama_rows(rows, head_dim)
