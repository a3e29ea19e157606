"""Parse the header of a GGUF file, with limits against hostile files. The format is specified in ggml's docs/gguf.md."""

from __future__ import annotations

import hashlib
import itertools
import math
import mmap
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from edgetune.runtime.untrusted_file import (
    MAX_GGUF_ALIGNMENT,
    MAX_GGUF_HEADER,
    MAX_GGUF_ITEMS,
    MAX_GGUF_KEYS,
    MAX_GGUF_TENSORS,
    MAX_GGUF_TEXT,
)

_MAX_DIMS = 4
"""Most dimensions of a tensor: ggml's GGML_MAX_DIMS."""
_DEFAULT_ALIGNMENT = 32
"""Alignment of the tensors in bytes where the header gives none, from the specification."""
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""The struct format of each scalar value type, by its number in the specification."""
_STRING, _ARRAY = 8, 9
"""The numbers of the other two value types."""


class TensorType(NamedTuple):
    """A type of tensors: its name in ggml, the numbers in a block, and the bytes that a block takes."""

    name: str
    block: int
    nbytes: int


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4), 1: TensorType("F16", 1, 2), 2: TensorType("Q4_0", 32, 18), 3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22), 7: TensorType("Q5_1", 32, 24), 8: TensorType("Q8_0", 32, 34), 9: TensorType("Q8_1", 32, 40),
    10: TensorType("Q2_K", 256, 84), 11: TensorType("Q3_K", 256, 110), 12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176), 14: TensorType("Q6_K", 256, 210), 15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66), 17: TensorType("IQ2_XS", 256, 74), 18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50), 20: TensorType("IQ4_NL", 32, 18), 21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82), 23: TensorType("IQ4_XS", 256, 136), 24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2), 26: TensorType("I32", 1, 4), 27: TensorType("I64", 1, 8), 28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56), 30: TensorType("BF16", 1, 2), 34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66), 39: TensorType("MXFP4", 32, 17), 40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
}  # fmt: skip
"""The types of tensors by their numbers, from ggml.h (ggml_type) and the block structures of ggml-common.h."""


class TensorInfo(NamedTuple):
    """An entry of the header: the shape, outermost dimension first, the number of the type, and the first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def nbytes(self) -> int:
        """Return the bytes that the tensor takes. Raises ValueError for an unknown type, and for rows of broken blocks."""
        if self.kind not in TENSOR_TYPES:
            raise ValueError(f"is of the type {self.kind}, which edgetune does not know")
        name, block, nbytes = TENSOR_TYPES[self.kind]
        if self.shape[-1] % block:
            raise ValueError(f"has rows of {self.shape[-1]} numbers, which {name} cannot store: its blocks hold {block}")
        return math.prod(self.shape) // block * nbytes


def overlap(spans: Iterable[tuple[int, int]]) -> bool:
    """Return True if any two of these spans (first byte, byte after the last) share a byte: a small file could then give huge
    tensors."""
    return any(stop > start for (_, stop), (start, _) in itertools.pairwise(sorted(spans)))


class Header:
    """A parsed header.

    keys: the value of every key: a number, a truth value, a text, a list of texts, or a numpy array of numbers. tensors: the
    entry of each tensor by name. digest: the SHA-256 over all of this, which the tensors' numbers do not change.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._end = data, 0, min(len(data), MAX_GGUF_HEADER)
        self._items = 0
        magic, version = self._take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            found = ": it is for big-endian machines" if magic == b"GGUF" and version in (2 << 24, 3 << 24) else ""
            raise ValueError(f"it does not begin with GGUF, version 2 or 3{found}")
        tensors, keys = self._take("QQ")
        if tensors > MAX_GGUF_TENSORS or keys > MAX_GGUF_KEYS:
            raise ValueError(f"it announces {tensors} tensors and {keys} keys")
        self.keys: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            if key in self.keys:
                raise ValueError(f"its key {key[:80]!r} is given twice")
            self.keys[key] = self._value(*self._take("I"))
        self.tensors = self._tensors(tensors)
        self.digest = hashlib.sha256(self._data[: self._at]).hexdigest()

    def _tensors(self, count: int) -> dict[str, TensorInfo]:
        """Read the entries of the tensors."""
        found: dict[str, TensorInfo] = {}
        for _ in range(count):
            name = self._text()
            (dims,) = self._take("I")
            if not 1 <= dims <= _MAX_DIMS or name in found:
                raise ValueError(f"tensor {name[:80]!r} {'is given twice' if name in found else f'has {dims} dimensions'}")
            *sizes, kind, offset = self._take(f"{dims}QIQ")
            found[name] = TensorInfo(tuple(reversed(sizes)), kind, offset)
        alignment = self.keys.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment.bit_count() != 1 or not 0 < alignment <= MAX_GGUF_ALIGNMENT:
            raise ValueError(f"its alignment is {str(alignment)[:80]}, expected a power of two up to {MAX_GGUF_ALIGNMENT}")
        odd = next((name for name, info in found.items() if info.start % alignment), None)
        if odd is not None:
            raise ValueError(f"tensor {odd[:80]!r} does not begin at a multiple of the alignment, {alignment}")
        start = -(-self._at // alignment) * alignment
        return {name: info._replace(start=start + info.start) for name, info in found.items()}

    def _take(self, form: str) -> tuple[Any, ...]:
        """Read values of a struct format and move past them."""
        return struct.unpack("<" + form, self._bytes(struct.calcsize("<" + form)))

    def _bytes(self, count: int) -> bytes:
        """Read bytes and move past them."""
        stop = self._at + count
        if stop > self._end:
            raise ValueError("its header is cut off or too large")
        taken = self._data[self._at : stop]
        self._at = stop
        return taken

    def _text(self, errors: str = "strict") -> str:
        """Read a text: its length, then its bytes. `errors`: what becomes of bytes that are not UTF-8, as for `str`."""
        length = int.from_bytes(self._bytes(8), "little")
        if length > MAX_GGUF_TEXT:
            raise ValueError(f"it holds a text of {length} bytes")
        return str(self._bytes(length), "utf-8", errors)

    def _texts(self, count: int) -> list[str]:
        """Read many texts, at twice the speed of `_text`: a vocabulary has hundreds of thousands.

        Here and in other values, bytes that are not UTF-8 become lone surrogates: they matter only to whoever uses that text.
        """
        data, at, texts = self._data, self._at, []
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            if at > self._end or at - start > MAX_GGUF_TEXT:
                raise ValueError("it holds an array of texts that are cut off or too long")
            texts.append(str(data[start:at], "utf-8", "surrogateescape"))
        self._at = at
        return texts

    def _value(self, kind: int) -> Any:
        """Read a value of a type of the specification."""
        if kind == _STRING:
            return self._text("surrogateescape")
        if kind == _ARRAY:
            return self._array(*self._take("IQ"))
        return self._take(self._form(kind))[0]

    def _array(self, kind: int, count: int) -> Any:
        """Read the items of an array: a list of texts, or a numpy array."""
        self._items += count
        if kind == _ARRAY or self._items > MAX_GGUF_ITEMS:
            raise ValueError(f"it holds an array of {count} items of type {kind}")
        if kind == _STRING:
            return self._texts(count)
        form = np.dtype(self._form(kind)).newbyteorder("<")
        return np.frombuffer(self._bytes(count * form.itemsize), form)

    @staticmethod
    def _form(kind: int) -> str:
        """Return the struct format of a scalar value type, which numpy knows by the same letter."""
        if kind not in _SCALARS:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        return _SCALARS[kind]
