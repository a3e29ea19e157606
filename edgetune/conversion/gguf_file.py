"""Open a GGUF model, whole or split into parts. Anybody may have made it: all numbers of its header are checked before use."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.conversion.dequantize import dequantize
from edgetune.export.gguf.header import TENSOR_TYPES, Header, overlap
from edgetune.runtime.errors import ModelError
from edgetune.runtime.files import read_at
from edgetune.runtime.untrusted_file import MAX_SHARDS, MODEL_WEIGHTS, open_untrusted

_SLICE_NUMBERS = 1 << 20
"""Numbers of a tensor that are dequantised at a time, at least one row. Chosen by hand."""
_LEAST_BYTES = 24
"""Bytes of the shortest GGUF file: its mark, version and two counts."""
GGUF = ".gguf"
"""Suffix of a GGUF file."""
_PART = re.compile(r"(.*)-[0-9]{5}-of-(?!00000)([0-9]{5})\.gguf", re.DOTALL)
"""The name of a part of a split file, as llama.cpp's gguf-split writes it and its loader expects it."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as it is stored."""

    shape: tuple[int, ...]
    """The sizes, outermost dimension first."""
    kind: str
    """The type by its name in ggml, such as Q4_1."""
    file: Path
    """The part that holds it."""
    start: int
    """The first byte in that part."""
    nbytes: int
    """The bytes that it takes there."""


@dataclass(frozen=True)
class _Part:
    """A file and its parsed header, with its size and the time of its last change when it was opened."""

    path: Path
    header: Header
    file: FileIO
    size: int
    modified: int

    def read(self, start: int, nbytes: int) -> bytearray:
        """Return bytes of the file, which is not mapped: to touch a page that another program has cut off ends a process.

        Raises ModelError where they are not there any more, or cannot be read.
        """
        content = bytearray(nbytes)
        try:
            read_at(self.file, memoryview(content), start)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error.strerror}); copy it again.") from error
        return content

    def refuse_changes(self) -> None:
        """Raise ModelError if the file has changed since it was opened."""
        about = os.fstat(self.file.fileno())
        if (about.st_size, about.st_mtime_ns) != (self.size, self.modified):
            raise ModelError(f"{self.path} has changed while it was read; run the same command again when it is complete.")


class GgufFile:
    """An opened GGUF model.

    path: the file, or its first part. metadata: the value of every key: a number, a truth value, a text, a list of texts or a
    numpy array. tensors: all tensors by their names in GGUF. modified: the time of the last change of any part, in nanoseconds.
    """

    def __init__(self, path: Path, parts: list[_Part]) -> None:
        self.path = path
        self.metadata: Mapping[str, Any] = parts[0].header.keys
        self.tensors: dict[str, GgufTensor] = {}
        self.modified = max(part.modified for part in parts)
        self._parts = {part.path: part for part in parts}
        for part in parts:
            self._add_tensors(part)

    @classmethod
    def open(cls, path: Path | str) -> GgufFile:
        """Check the header of a file, or the headers of all parts of a split file of which `path` is the first.

        Raises ModelError, which names the file and the fault, for what is missing, damaged or no GGUF file.
        """
        path = Path(path)
        first = _open_part(path)
        count = _split_number(first, "count", 1)
        if count <= 1:
            return cls(path, [first])
        paths = _paths_of_parts(path, count)
        if _split_number(first, "no", 0) != 0:
            raise ModelError(f"{path} is not the first part of its model; name {paths[0].name} instead.")
        parts = [first, *(_open_part(part, count) for part in paths[1:])]
        for number, part in enumerate(parts):
            found = _split_number(part, "no", -1), _split_number(part, "count", -1)
            if found != (number, count):
                raise _unusable(part.path, f"its header says part {found[0] + 1} of {found[1]}, unlike its name")
        opened, promised = cls(path, parts), _split_number(first, "tensors.count", -1)
        if promised != len(opened.tensors):
            raise _unusable(path, f"its parts hold {len(opened.tensors)} tensors of the {promised} that it announces")
        return opened

    @property
    def bytes(self) -> int:
        """Return the size of the file, all parts together."""
        return sum(part.size for part in self._parts.values())

    @property
    def digest(self) -> str:
        """Return the SHA-256 over the header, those of all parts where it is split."""
        digests = [part.header.digest for part in self._parts.values()]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def quantisation(self) -> str:
        """Return the type of most numbers, such as Q4_1."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.kind] += math.prod(tensor.shape)
        return counts.most_common(1)[0][0]

    def dequantized(self, name: str) -> Tensor:
        """Return a tensor in f32. Raises ModelError for a type that edgetune cannot read."""
        whole = torch.empty(self.tensors[name].shape)
        rows, done = whole.view(-1, whole.shape[-1]), 0
        for piece in self.slices(name):
            rows[done : done + len(piece)] = piece
            done += len(piece)
        return whole

    def slices(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of a tensor in order, some at a time (rows, row length) in f32, so that little memory is used.

        Raises ModelError for a type that edgetune cannot read.
        """
        tensor = self.tensors[name]
        part, width = self._parts[tensor.file], tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        row_bytes, at_once = tensor.nbytes // rows, max(1, _SLICE_NUMBERS // width)
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            start = tensor.start + first * row_bytes
            raw = torch.frombuffer(part.read(start, count * row_bytes), dtype=torch.uint8)
            try:
                piece = dequantize(raw, tensor.kind)
            except ValueError as error:
                raise ModelError(f"{name} of {tensor.file} {error}.") from error
            yield piece.view(count, width)

    def refuse_changes(self) -> None:
        """Raise ModelError if the file has changed since it was opened: what was read may be of two models."""
        for part in self._parts.values():
            part.refuse_changes()

    def _add_tensors(self, part: _Part) -> None:
        """Add a part's tensors, after checking that each lies within the file and that no two share a byte."""
        spans = []
        for name, info in part.header.tensors.items():
            shown = f"tensor {name[:80]!r}"
            if 0 in info.shape:
                raise _unusable(part.path, f"{shown} has no numbers")
            if name in self.tensors:
                raise _unusable(part.path, f"{shown} is given twice")
            try:
                nbytes = info.nbytes
            except ValueError as error:
                raise _unusable(part.path, f"{shown} {error}") from error
            if info.start + nbytes > part.size:
                more = info.start + nbytes - part.size
                raise _unusable(part.path, f"it is cut off: {shown} ends {more:,} bytes after the file's {part.size:,}")
            spans.append((info.start, info.start + nbytes))
            self.tensors[name] = GgufTensor(info.shape, TENSOR_TYPES[info.kind].name, part.path, info.start, nbytes)
        if overlap(spans):
            raise _unusable(part.path, "its tensors overlap")


def parts_of(path: Path) -> list[Path]:
    """Return the files of a GGUF model of which `path` is a part, first part first: itself alone unless it is split."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    return [path.with_name(f"{match[1]}-{part:05}-of-{match[2]}{GGUF}") for part in range(1, int(match[2]) + 1)]


def stem_of(name: str) -> str:
    """Return a GGUF file's name without its suffix and, for a split one, without the number of its part."""
    match = _PART.fullmatch(name)
    return match[1] if match else name.removesuffix(GGUF)


def _open_part(path: Path, count: int = 1) -> _Part:
    """Open a file and parse its header. `count`: how many parts it is one of. Raises ModelError."""
    if count > 1 and not path.exists():
        raise ModelError(f"{path} is missing: the model is split into {count} parts; download or copy that part too.")
    file = open_untrusted(path, MODEL_WEIGHTS)
    about = os.fstat(file.fileno())
    if about.st_size < _LEAST_BYTES:
        raise _unusable(path, f"its {about.st_size} bytes are too few")
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            return _Part(path, Header(mapping), file, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); copy it again.") from error
    except ValueError as error:
        raise _unusable(path, str(error)) from error


def _split_number(part: _Part, key: str, default: int) -> int:
    """Return a number that gguf-split writes. Raises ModelError for one that is none."""
    number = part.header.keys.get(f"split.{key}", default)
    if type(number) is not int or (number > MAX_SHARDS and key == "count"):
        raise _unusable(part.path, f"its split.{key} is {str(number)[:40]}")
    return number


def _paths_of_parts(path: Path, count: int) -> list[Path]:
    """Return the paths of all parts, given one part's. Raises ModelError for a file that is not named as one of `count`."""
    paths = parts_of(path)
    if _PART.fullmatch(path.name) is None or len(paths) != count:
        raise ModelError(
            f"{path} is part of a model that is split into {count} files, and its name does not end in "
            f"-0000N-of-{count:05}.gguf, so the others cannot be found; give the files their published names."
        )
    return paths


def _unusable(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} is not a usable GGUF model ({reason}); download or copy it again.")
