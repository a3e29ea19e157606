"""Writes and reads tensor files that end with a checksum, so that damage on the disk is noticed before it is trained on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from edgetune.runtime.errors import EdgetuneError, LockedError
from edgetune.runtime.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec

_CHECKSUM = "checksum"
"""Name of the last tensor of a sealed file: one int64 that holds the CRC-32 of every byte before it."""
_CHECKSUM_BYTES = 8
"""Size in bytes of that int64."""


class DamagedError(Exception):
    """Raised where a file of an interrupted run is missing, incomplete or altered."""


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whose last tensor is a checksum of everything before it. Raises ResourceError on a full disk."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    specs.append(TensorSpec(_CHECKSUM, torch.int64, (1,)))
    with SafetensorsWriter(path, specs, metadata) as writer:
        checksum = zlib.crc32(writer.header)
        for name, tensor in tensors.items():
            values = tensor.detach().cpu().contiguous()
            # CRC-32 is twice as fast as SHA-256, and it guards against a bad disk, not against an attacker.
            checksum = zlib.crc32(values.view(-1).view(torch.uint8).numpy().data, checksum)
            writer.write(name, values)
        writer.write(_CHECKSUM, torch.tensor([checksum]))


def read_sealed(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Return the tensors (memory-mapped) and the metadata that `write_sealed` wrote. Raises DamagedError, LockedError."""
    try:
        file = SafetensorsFile.open(path)
        expected = int(file.tensor(_CHECKSUM))
        if zlib.crc32(memoryview(file.mapping)[:-_CHECKSUM_BYTES]) != expected:
            raise DamagedError(path)
        return {name: file.tensor(name) for name in file.tensors if name != _CHECKSUM}, file.metadata
    except LockedError:  # nothing is damaged
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, EdgetuneError) as error:
        raise DamagedError(path) from error
