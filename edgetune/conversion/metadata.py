"""Read the metadata of a GGUF model with checks, and say what is wrong with it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

from edgetune.conversion.gguf_file import GgufFile
from edgetune.runtime.errors import ModelError
from edgetune.runtime.untrusted_file import MAX_LAYERS

_SHOWN = 8
"""Most tensors or keys that a message names. Chosen by hand."""


class Keys:
    """The metadata of a model, read with checks."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.path, self.metadata, self.tensors = file, file.path, file.metadata, file.tensors
        self.arch = str(file.metadata.get("general.architecture"))[:80]

    def whole(self, name: str, most: int, default: int | None = None, least: int = 1) -> int:
        """Return a whole number, `least` to `most`, under a key of the architecture. Raises ModelError for anything else."""
        return self._number(name, default, lambda value: type(value) is int and least <= value <= most, "a whole number")

    def real(self, name: str, least: float, most: float, default: float | None = None) -> float:
        """Return a number above `least` and up to `most`: the shortest decimal with the same f32, 1e-05 for 9.99999975e-06."""

        def in_range(value: Any) -> bool:
            return type(value) in (int, float) and math.isfinite(value) and least < value <= most

        return float(str(np.float32(self._number(name, default, in_range, "a number"))))

    def text(self, name: str, default: str) -> str:
        """Return the text under a key of the architecture. Raises ModelError for anything else."""
        value = self.metadata.get(f"{self.arch}.{name}", default)
        if not isinstance(value, str):
            raise self.fault(f"its {self.arch}.{name} is {shown(value)}, expected a text that a model can have")
        return value

    def _number(self, name: str, default: Any, valid: Callable[[Any], bool], kind: str) -> Any:
        value = self.metadata.get(f"{self.arch}.{name}", default)
        if value is None:
            raise self.fault(f"its metadata lacks {self.arch}.{name}")
        if not valid(value):
            raise self.fault(f"its {self.arch}.{name} is {shown(value)}, expected {kind} that a model can have")
        return value

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return self.whole("block_count", MAX_LAYERS)

    def fault(self, reason: str) -> ModelError:
        """Return the error for a file that contradicts itself or is damaged."""
        return ModelError(f"{self.path} is not a usable GGUF model ({reason}); download or copy it again.")

    def unsupported(self, what: str) -> ModelError:
        """Return the error for a model that edgetune cannot run."""
        return ModelError(f"{self.path} cannot be used: {what}. Choose another model with `edgetune models`.")


def listed(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(item[:200] for item in items[:_SHOWN]) + more


def shown(value: Any) -> str:
    """Return a value of the metadata for a message."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)} items"
    return "a huge number" if isinstance(value, int) and abs(value) >= 10**20 else reprlib.repr(value)
