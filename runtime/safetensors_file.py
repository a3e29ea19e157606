"""Read safetensors files by mapping them, after checking the whole header, and write them one tensor at a time.

A file is 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors
without gaps. Mapping and paging need aligned tensors and streamed writing, and the safetensors library does neither, so
both are done here: a file that edgetune writes starts every tensor at a multiple of 64 bytes, because it pads the header
with spaces (as the format allows) and puts tensors whose size is not a multiple of 64 last.
Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime import json_file
from edgetune.runtime.files import drop_pages, explain_full_disk, map_file, new_file, size_of, sync_folder
from edgetune.runtime.untrusted_file import (
    MAX_DIMENSIONS,
    MAX_SAFETENSORS_HEADER,
    MODEL_WEIGHTS,
    FileKind,
    open_untrusted,
)

ALIGNMENT = 64
"""Bytes that tensors are aligned to, in files and in buffers: a cache line, and an AVX-512 register."""
_LONGEST_NAME = 200
"""Longest name of a tensor, in characters, that an error message quotes whole. Chosen by hand."""
_SLICE = 4 << 20  # values converted and written at a time (chosen by hand)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U32": torch.uint32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values: all that a header needs."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a file, at file[start : start + nbytes]."""

    start: int


class SafetensorsFile:
    """A read-only mapping of one file. Its tensors are views of the mapping: their pages are read when accessed.

    Of an encrypted file, all plain bytes are in memory.

    Writing to such a tensor kills the process: clone it first.
    """

    def __init__(self, path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str], mapping: mmap.mmap) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self.mapping = mapping
        with warnings.catch_warnings():  # torch warns that the buffer is read-only, which is intended
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)

    @classmethod
    def open(cls, path: Path | str, kind: FileKind = MODEL_WEIGHTS) -> SafetensorsFile:
        """Check the whole header, then map the file.

        Raises `kind.error`, naming the file and the fault, if the file cannot be opened or the format does not allow what it
        holds.
        """
        path = Path(path)
        with open_untrusted(path, kind) as file:
            try:
                header, data, size = _read_header(file)
                tensors, metadata = _check_header(header, data, size)
                mapping = map_file(file)
            except OSError as error:
                raise kind.error(f"{path} cannot be read ({error.strerror}); copy it again.") from error
            except ValueError as error:
                raise kind.error(f"{path} {error}; copy it again.") from error
        return cls(path, tensors, metadata, mapping)

    def tensor(self, name: str, alignment: int = 1) -> Tensor:
        """Return a view of the mapping, or a copy if the file does not store the tensor at a multiple of `alignment` bytes."""
        stored = self.tensors[name]
        if stored.nbytes == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        raw = self._bytes[stored.start : stored.start + stored.nbytes]
        if raw.data_ptr() % max(alignment, stored.dtype.itemsize):
            raw = raw.clone()
        return raw.view(stored.dtype).view(stored.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the numbers of a tensor, flat and in order, in views or copies of at most a few mebibytes."""
        stored = self.tensors[name]
        for start in range(stored.start, stored.start + stored.nbytes, _SLICE):
            raw = self._bytes[start : min(start + _SLICE, stored.start + stored.nbytes)]
            yield (raw.clone() if raw.data_ptr() % stored.dtype.itemsize else raw).view(stored.dtype)

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor without copying them."""
        stored = self.tensors[name]
        return memoryview(self.mapping)[stored.start : stored.start + stored.nbytes]

    def release(self, name: str) -> None:
        """Let the system drop a tensor's pages from memory; the next access reads them again. Linux and macOS only."""
        stored = self.tensors[name]
        drop_pages(self.mapping, stored.start, stored.nbytes)


def _read_header(file: FileIO) -> tuple[dict[str, Any], int, int]:
    """Return the JSON header, the offset of the first tensor, and the size of the file. Raises ValueError."""
    size = size_of(file)
    if size < 8:
        raise ValueError(f"is truncated: {size:,} bytes, too few for a safetensors header")
    count = int.from_bytes(file.read(8), "little")
    if count > MAX_SAFETENSORS_HEADER:
        raise ValueError(f"is not a safetensors file: its header would take {count:,} bytes")
    if count > size - 8:
        raise ValueError(f"is truncated: {size:,} bytes where its header alone takes {count + 8:,}")
    try:
        header = json_file.parse(file.read(count))
    except ValueError as error:
        raise ValueError("is not a safetensors file: its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise ValueError("is not a safetensors file: its header is not a JSON object")
    return header, 8 + count, size


def _check_header(header: dict[str, Any], data: int, size: int) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors by name, and the metadata, after checking that every byte from `data` on belongs to one tensor.

    Raises ValueError.
    """
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("is damaged: its metadata is not text")
    tensors = [_check_entry(name, entry, data) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    position = data
    for tensor in tensors:
        if tensor.start != position:
            fault = "overlaps another tensor" if tensor.start < position else "follows unused bytes"
            raise ValueError(f"is damaged: tensor {_quoted(tensor.name)} {fault}")
        position += tensor.nbytes
    if position != size:
        what = "truncated" if position > size else "damaged"
        raise ValueError(f"is {what}: {size:,} bytes where its header promises {position:,}")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _check_entry(name: str, entry: Any, data: int) -> StoredTensor:
    """Check one tensor's entry of the header, whose offsets count from `data`, and return the tensor. Raises ValueError."""

    def whole_numbers(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"is damaged: tensor {_quoted(name)} lacks a dtype, a shape or its offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"holds tensor {_quoted(name)} of dtype {_quoted(entry['dtype'])}, expected one of {known}")
    if not (whole_numbers(entry["shape"]) and whole_numbers(entry["data_offsets"]) and len(entry["data_offsets"]) == 2):
        raise ValueError(f"is damaged: the shape or offsets of tensor {_quoted(name)} are not whole numbers")
    if len(entry["shape"]) > MAX_DIMENSIONS:
        raise ValueError(f"is damaged: tensor {_quoted(name)} has {len(entry['shape'])} dimensions")
    start, stop = entry["data_offsets"]
    tensor = StoredTensor(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), data + start)
    if stop - start != tensor.nbytes:
        raise ValueError(
            f"is damaged: tensor {_quoted(name)} of shape {list(tensor.shape)} takes {tensor.nbytes:,} bytes, "
            f"but its offsets span {stop - start:,}"
        )
    return tensor


def _quoted(value: object) -> str:
    """Return a value of a header for an error message, cut where it is long."""
    return reprlib.repr(value) if not isinstance(value, str) or len(value) > _LONGEST_NAME else repr(value)


def aligned_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return the tensors in an order that keeps them aligned: those whose size is not a multiple of 64 bytes come last.

    The latter are sorted by the largest power of two that divides their size, largest first, so that each starts at a
    multiple of its own dtype's size.
    """

    def misalignment(spec: TensorSpec) -> int:
        return -min(ALIGNMENT, spec.nbytes & -spec.nbytes) if spec.nbytes else -ALIGNMENT

    return sorted(specs, key=misalignment)  # the sort is stable: layers stay in order


class SafetensorsWriter:
    """Writes a file tensor by tensor, in the order of `specs`; it appears under its name only once it is complete.

    >>> with SafetensorsWriter(path, specs) as writer:  # doctest: +SKIP
    ...     for spec in specs:
    ...         writer.write(spec.name, make(spec))

    Raises ResourceError when the disk is full. Then, and when the block raises, no partial file is left behind.
    """

    def __init__(self, path: Path | str, specs: Sequence[TensorSpec], metadata: dict[str, str] | None = None) -> None:
        self.path = Path(path)
        self._specs = list(specs)
        self._written = 0
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        position = 0
        for spec in self._specs:
            if spec.name in header:
                raise ValueError(f"tensor {spec.name!r} is listed twice")
            offsets = [position, position + spec.nbytes]
            header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            position += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        """The bytes that precede the first tensor."""
        self.nbytes = len(self.header) + position

    def __enter__(self) -> SafetensorsWriter:
        with explain_full_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._temporary = new_file(self.path)
        try:
            self._put(self.header)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, tensor: Tensor | Iterable[Tensor]) -> None:
        """Append the next tensor of `specs`, converted to its dtype slice by slice. Raises ValueError for any other.

        Instead of a tensor it takes pieces of one, in order, so that a large tensor need not be in memory as a whole.
        """
        spec, count = self._specs[self._written], 0
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else spec.shape
        if (name, shape) != (spec.name, spec.shape):
            raise ValueError(f"expected {spec}, got {name!r} of shape {shape}")
        for piece in [tensor] if isinstance(tensor, Tensor) else tensor:
            flat = piece.detach().reshape(-1)
            count += flat.numel()
            for start in range(0, flat.numel(), _SLICE):
                values = flat[start : start + _SLICE].to("cpu", spec.dtype)
                self._put(values.view(torch.uint8).numpy().data)
        if count != math.prod(spec.shape):
            raise ValueError(f"expected {spec}, got {count} numbers")
        self._written += 1

    def _put(self, data: bytes | memoryview) -> None:
        with explain_full_disk(self.path):
            self._file.write(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None and self._written < len(self._specs):
                raise ValueError(f"{len(self._specs) - self._written} tensors of {self.path.name} were never written")
            with explain_full_disk(self.path):
                if error is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    os.replace(self._temporary, self.path)
                    sync_folder(self.path.parent)
        finally:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes the last buffer, which a full disk refuses again
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write the given tensors in their order without copying them as a whole. Raises what SafetensorsWriter raises."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
