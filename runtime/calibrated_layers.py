"""Quantise a model's linears to NF4 with error feedback (error_feedback.py), each layer kept in a file until all are done.

An interrupted run reads the layers that are done from their files and only computes their outputs again. At the same number of
threads, its result is byte for byte that of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgetune.runtime import bnb_layout
from edgetune.runtime.checkpoint import Checkpoint, model_shapes
from edgetune.runtime.config import LINEARS, LlamaConfig, QuantConfig
from edgetune.runtime.error_feedback import Documents, Feedback, rounded_layers, rounding_numbers, with_feedback
from edgetune.runtime.errors import ModelError
from edgetune.runtime.model_folder import is_whole
from edgetune.runtime.names import linear_weight
from edgetune.runtime.nf4_grid import Nf4Grid
from edgetune.runtime.ops_types import Weight
from edgetune.runtime.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec, aligned_order

COPIES = 6
"""Number of fp32 copies of a linear while it is rounded: the weight, its blocks and their shares of power, the scale of each
weight, what is left to round, and the rounded weight."""


@dataclass(frozen=True)
class Calibration:
    """The text to calibrate on, and who hears of the progress, in linears done and all linears."""

    documents: Documents
    progress: Callable[[int, int], None] = lambda done, total: None

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all documents."""
        return sum(map(len, self.documents))

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the token ids."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


def calibration_bytes(config: LlamaConfig, tokens: int) -> int:
    """Forecast the memory in bytes that calibrating on so many tokens takes beside the process itself."""
    return torch.float32.itemsize * rounding_numbers(config, tokens, COPIES)


class CalibratedLayers:
    """The calibrated linears of a model, a file for each layer in `folder`."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, quant: QuantConfig) -> None:
        self._checkpoint, self._folder, self._quant = checkpoint, folder, quant
        self._shapes = model_shapes(checkpoint.config)
        self._made: dict[str, Tensor] = {}

    def make(self, calibration: Calibration) -> None:
        """Write the files that are missing. Raises ModelError for a weight that cannot be quantised."""
        layers = range(self._checkpoint.config.num_layers)
        whole = {layer for layer in layers if is_whole(self._file(layer), self._specs(layer))}
        done, total = 0, len(layers) * len(LINEARS)
        calibration.progress(done, total)
        if whole == set(layers):
            return

        def round_linear(name: str, feedback: Callable[[], Feedback]) -> Weight:
            nonlocal done
            done += 1
            weight = self._stored(name) if _layer(name) in whole else self._rounded(name, feedback())
            calibration.progress(done, total)
            return weight

        for layer in rounded_layers(self._checkpoint, calibration.documents, round_linear):
            if layer not in whole:
                self._write(layer)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the stored tensors of a linear, by name."""
        file = SafetensorsFile.open(self._file(_layer(name)))
        return {spec.name: file.tensor(spec.name) for spec in self._weight_specs(name)}

    def _rounded(self, name: str, feedback: Feedback) -> Weight:
        weight = self._checkpoint.dense(name).float()
        try:
            grid = Nf4Grid.of(weight, self._quant, feedback.power)
        except ValueError as error:
            raise ModelError(f"{name} of {self._checkpoint.folder} cannot be quantised: {error}.") from error
        codes = with_feedback(weight, grid, feedback)
        self._made |= grid.tensors(name, codes)
        return grid.weight(codes)

    def _stored(self, name: str) -> Weight:
        file = SafetensorsFile.open(self._file(_layer(name)))
        state = bnb_layout.parse_state(file.raw(f"{name}{bnb_layout.STATE_PREFIX}nf4"))
        return bnb_layout.assemble(name, state, file.tensor)

    def _write(self, layer: int) -> None:
        specs = self._specs(layer)
        with SafetensorsWriter(self._file(layer), specs, {"format": "pt"}) as writer:
            for spec in specs:
                writer.write(spec.name, self._made.pop(spec.name))

    def _specs(self, layer: int) -> list[TensorSpec]:
        names = [linear_weight(layer, linear) for linear in LINEARS]
        return aligned_order(spec for name in names for spec in self._weight_specs(name))

    def _weight_specs(self, name: str) -> list[TensorSpec]:
        return bnb_layout.weight_specs(name, self._shapes[name], self._quant.block_size, self._quant.double_quant)

    def _file(self, layer: int) -> Path:
        return self._folder / f".calibrated-{layer:05}.safetensors"  # hidden: deleted when the folder is published


def _layer(name: str) -> int:
    """Return the number of the layer that a tensor belongs to."""
    return int(name.split(".")[2])
