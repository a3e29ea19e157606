"""The best adapter so far, in a file of the unfinished run: memory holds the one that is trained, and no second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from edgetune.runtime.adapter import Adapter
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.safetensors_file import SafetensorsFile, write_tensors

FILE = "best.safetensors"


class BestAdapter:
    """What a later reading may still be better than. Tensors go by "layer.linear.part", as in a checkpoint."""

    def __init__(self, folder: Path, config: LoraConfig) -> None:
        self._path, self._config = folder / FILE, config
        self.exists = False

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace it, at once or not at all. Raises ResourceError when the disk is full."""
        write_tensors(self._path, tensors)
        self.exists = True

    def keep_live(self, tensors: Mapping[tuple[int, str, str], Tensor]) -> None:
        """The same, by the keys that an adapter on a model has."""
        self.keep({".".join(map(str, key)): tensor for key, tensor in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Mapped: they take memory while they are read. None where nothing was kept yet."""
        if not self.exists:
            return {}
        file = SafetensorsFile.open(self._path)
        return {name: file.tensor(name) for name in file.tensors}

    def adapter(self) -> Adapter:
        """All of it, mapped."""
        tensors = {}
        for name, tensor in self.tensors().items():
            layer, linear, part = name.split(".")
            tensors[int(layer), linear, part] = tensor
        return Adapter(self._config, tensors)
