"""Remember in a quantised folder what its 4 bits cost, so that no command has to measure it again."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.runtime.errors import ModelError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.json_file import read_object_if_there
from edgetune.runtime.untrusted_file import MODEL_CONFIG

FILE = "quantisation.json"
"""Name of the record in a quantised folder: a Cost or, until that is measured, an Unmeasured."""


@dataclass(frozen=True)
class Cost:
    """Bits per byte of the built-in text, before and after quantisation, and how the weights were rounded."""

    before: float
    """Bits per byte of the model that was quantised."""
    after: float
    """Bits per byte of the 4-bit model."""
    calibration_tokens: int
    """Tokens that the rounding was calibrated on; 0 if the weights were rounded to nearest."""
    edgetune: str
    """The version of edgetune that measured this."""

    def sentence(self) -> str:
        """Return the cost in a sentence without its full stop."""
        share, figures = self.after / self.before - 1.0, f"({self.before:.3f} to {self.after:.3f})"
        start = "with calibration, 4 bits" if self.calibration_tokens else "4 bits"
        if share < 0:
            return f"{start} cost nothing in bits per byte on the built-in text {figures}"
        return f"{start} cost {share:.1%} in bits per byte on the built-in text {figures}"

    def write(self, folder: Path) -> None:
        """Write the record into a quantised folder."""
        atomic_write(folder / FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Cost | None:
        """Return the record of a model folder, or None for one without a record, or with one that cannot be read."""
        content = _read(folder, {"before": float, "after": float, "calibration_tokens": int, "edgetune": str})
        cost = None if content is None else cls(**content)
        return cost if cost is not None and 0 < cost.before < math.inf and 0 < cost.after < math.inf else None


@dataclass(frozen=True)
class Unmeasured:
    """The record of a quantised folder whose cost is still to be measured, so that an interrupted command can do that alone."""

    work: str
    """SHA-256 over the source and the settings of the quantisation."""

    def text(self) -> str:
        """Return the record as the contents of FILE."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Unmeasured | None:
        """Return the record of a model folder, or None for one without such a record, or with one that cannot be read."""
        content = _read(folder, {"work": str})
        return None if content is None else cls(**content)


def _read(folder: Path, kinds: dict[str, type]) -> dict[str, Any] | None:
    """Return the record in a model folder if it has exactly these keys and types; None for any other, or none."""
    if not folder.is_dir():  # a GGUF file
        return None
    try:
        content = read_object_if_there(folder / FILE, MODEL_CONFIG)
    except ModelError:
        return None
    fits = content.keys() == kinds.keys() and all(type(content[name]) is kind for name, kind in kinds.items())
    return content if fits else None
