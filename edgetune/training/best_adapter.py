"""The best adapter so far, in a file of the unfinished run: memory holds the one that is trained, and no second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.errors import ResourceError
from edgetune.training.checkpoints import Damaged, read_sealed, write_sealed

FILE = "best.safetensors"


class BestAdapter:
    """What a later reading may still be better than. Tensors go by "layer.linear.part", as in a checkpoint."""

    def __init__(self, folder: Path, config: LoraConfig) -> None:
        self._path, self._config = folder / FILE, config
        self.exists = False

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace it, at once or not at all. Raises ResourceError when the disk is full."""
        write_sealed(self._path, tensors)
        self.exists = True

    def keep_live(self, tensors: Mapping[tuple[int, str, str], Tensor]) -> None:
        """The same, by the keys that an adapter on a model has."""
        self.keep({".".join(map(str, key)): tensor for key, tensor in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Mapped: they take memory while they are read. Empty where nothing was kept yet.

        Raises ResourceError where the file is not what was written.
        """
        if not self.exists:
            return {}
        try:
            return read_sealed(self._path)[0]
        except Damaged as error:
            raise ResourceError(
                "The best adapter so far cannot be read back from the disk; type the same command again: it goes on from the "
                "last checkpoint."
            ) from error

    def adapter(self) -> Adapter:
        """All of it, mapped."""
        tensors = {}
        for name, tensor in self.tensors().items():
            layer, linear, part = name.split(".")
            tensors[int(layer), linear, part] = tensor
        return Adapter(self._config, tensors)
