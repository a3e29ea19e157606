"""Keeps the best adapter so far in a file of the unfinished run, so that memory holds only the adapter being trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import ResourceError
from edgetune.training.sealed_files import DamagedError, read_sealed, write_sealed

FILE = "best.safetensors"


class BestAdapter:
    """The adapter with the lowest held-out score so far. Its tensors are named "layer.linear.part", as in a checkpoint."""

    def __init__(self, folder: Path, config: LoraConfig) -> None:
        self._path, self._config = folder / FILE, config
        self.exists = False

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the stored adapter atomically. Raises ResourceError when the disk is full."""
        write_sealed(self._path, tensors)
        self.exists = True

    def save_from_model(self, tensors: Mapping[tuple[int, str, str], Tensor]) -> None:
        """Replace the stored adapter by one whose tensors are keyed as on the model: (layer, linear, part)."""
        self.save({".".join(map(str, key)): tensor for key, tensor in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors, memory-mapped; empty if none was saved yet. Raises ResourceError for a damaged file."""
        if not self.exists:
            return {}
        try:
            return read_sealed(self._path)[0]
        except DamagedError as error:
            raise ResourceError(
                "The file with the best adapter so far is damaged. Run the same command again: it resumes from the last "
                "checkpoint."
            ) from error

    def adapter(self) -> Adapter:
        """Return the stored adapter, memory-mapped. Raises ResourceError for a damaged file."""
        tensors = {}
        for name, tensor in self.tensors().items():
            layer, linear, part = name.split(".")
            tensors[int(layer), linear, part] = tensor
        return Adapter(self._config, tensors)
