"""Parse the header of a GGUF file, with limits against hostile files. The format is specified in ggml's docs/gguf.md."""

from __future__ import annotations

import mmap
import struct
from typing import Any

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


class Header:
    """A parsed header.

    keys: the value of every scalar and string key, and None for every array. tensors: shape (outermost dimension first), ggml
    type, and first byte in the file, by name.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0
        magic, version = self._take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin with GGUF, version 2 or 3")
        tensors, keys = self._take("QQ")
        if tensors > MAX_GGUF_TENSORS or keys > MAX_GGUF_KEYS:
            raise ValueError(f"it announces {tensors} tensors and {keys} keys")
        self.keys: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            if key in self.keys:
                raise ValueError(f"its key {key[:80]!r} is given twice")
            self.keys[key] = self._value(*self._take("I"))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._text()
            (dims,) = self._take("I")
            if not 1 <= dims <= _MAX_DIMS or name in found:
                raise ValueError(f"tensor {name[:80]!r} {'is given twice' if name in found else f'has {dims} dimensions'}")
            *sizes, kind, offset = self._take(f"{dims}QIQ")
            found[name] = (tuple(reversed(sizes)), kind, offset)
        alignment = self.keys.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment.bit_count() != 1 or not 0 < alignment <= MAX_GGUF_ALIGNMENT:
            raise ValueError(f"its alignment is {str(alignment)[:80]}, expected a power of two up to {MAX_GGUF_ALIGNMENT}")
        odd = next((name for name, (_, _, offset) in found.items() if offset % alignment), None)
        if odd is not None:
            raise ValueError(f"tensor {odd[:80]!r} does not begin at a multiple of the alignment, {alignment}")
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: (shape, kind, start + offset) for name, (shape, kind, offset) in found.items()}

    def _take(self, form: str) -> tuple[Any, ...]:
        """Read values of a struct format and move past them."""
        size = struct.calcsize("<" + form)
        if self._at + size > min(len(self._data), MAX_GGUF_HEADER):
            raise ValueError("its header is cut off or too large")
        values = struct.unpack_from("<" + form, self._data, self._at)
        self._at += size
        return values

    def _text(self) -> str:
        """Read a text: its length, then its bytes."""
        (length,) = self._take("Q")
        if length > MAX_GGUF_TEXT:
            raise ValueError(f"it holds a text of {length} bytes")
        return str(self._take(f"{length}s")[0], "utf-8")

    def _value(self, kind: int) -> Any:
        """Read a scalar or a text and return it; skip an array and return None."""
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            inner, count = self._take("IQ")
            if inner == _ARRAY or count > MAX_GGUF_ITEMS:
                raise ValueError(f"it holds an array of {count} items of type {inner}")
            if inner == _STRING:
                for _ in range(count):
                    self._text()
            else:
                self._take(f"{count * struct.calcsize('<' + self._form(inner))}x")
            return None
        return self._take(self._form(kind))[0]

    @staticmethod
    def _form(kind: int) -> str:
        """Return the struct format of a scalar value type."""
        if kind not in _SCALARS:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        return _SCALARS[kind]
