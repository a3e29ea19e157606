"""A .mlpackage as files: its program, and its weights a tensor at a time, read from the mapped file or written in their place.

    Manifest.json       names the model among the items below Data/
    model.mlmodel       protobuf, coremltools.proto's Model: operations, and each large constant as a place in weight.bin
    weights/weight.bin  a header of 64 bytes, then the constants, each behind 64 bytes that tell its type, bytes and first byte;
                        all at multiples of 64, little-endian, numbers of 4 bits two a byte, the first in the low half

So a package can be laid out by coremltools around weights that stand in for others, and be given those one by one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.runtime.errors import ModelError
from edgetune.runtime.files import explain_full_disk
from edgetune.runtime.json_file import EXPORT_RECORD, read_object

Array = npt.NDArray[Any]
DTYPES: dict[str, type[np.generic]] = {
    "FLOAT16": np.float16, "FLOAT32": np.float32, "INT32": np.int32, "INT16": np.int16, "UINT16": np.uint16, "INT8": np.int8,
    "UINT8": np.uint8, "INT4": np.int8, "UINT4": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""What a tensor is in numpy, by the specification's name of its type; 4 bits take a byte there."""
_BLOB_TYPES = {"FLOAT16": 1, "FLOAT32": 2, "UINT8": 3, "INT8": 4, "INT4": 8, "UINT4": 11}
_BLOB = struct.Struct("<IIQQ")  # sentinel, type, bytes, first byte
_SENTINEL = 0xDEADBEEF
_MAX_GRAPH = 1 << 30


class Package:
    """An opened package. `functions`: the operations of each, as coremltools.proto's MIL_pb2 has them."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError for what is no package of an ML program."""
        from coremltools.proto import Model_pb2

        try:
            manifest = read_object(path / "Manifest.json", EXPORT_RECORD)
            file = path / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
            if file.stat().st_size > _MAX_GRAPH:
                raise ValueError("too large")
            model = Model_pb2.Model.FromString(file.read_bytes())
            self.functions = {
                name: function.block_specializations[function.opset] for name, function in model.mlProgram.functions.items()
            }
            self.inputs = {name: list(function.inputs) for name, function in model.mlProgram.functions.items()}
            self.default: str = model.description.defaultFunctionName or "main"
            if self.default not in self.functions:
                raise ValueError("no function")
        except Exception as error:  # whatever a damaged file makes of a parser
            raise ModelError(f"{path} is no readable Core ML package ({type(error).__name__}); export it again.") from error
        self._path, self._weights = path, file.parent / "weights"

    def constant(self, value: Any) -> Array:
        """A constant's numbers: out of the graph, or mapped while whoever asks holds them, 4-bit ones unpacked.

        Raises ModelError for one that the file does not hold as the graph says.
        """
        name, shape = tensor_type(value.type)
        if value.WhichOneof("value") == "immediateValue":
            return _immediate(value.immediateValue.tensor, name, shape)
        file, first, size = self._place(value)
        if name not in ("INT4", "UINT4"):
            # copy on write: torch wants what it could write to
            return np.memmap(file, DTYPES[name], "c", first, tuple(shape))
        pairs = np.fromfile(file, np.uint8, size, offset=first)
        codes = np.empty((size, 2), np.uint8)
        np.bitwise_and(pairs, 15, out=codes[:, 0])
        np.right_shift(pairs, 4, out=codes[:, 1])
        codes = codes.reshape(-1)[: math.prod(shape)].reshape(shape)
        return (codes ^ 8).view(np.int8) - np.int8(8) if name == "INT4" else codes

    def fill(self, value: Any, numbers: Array) -> None:
        """Write a constant's numbers where the package has room for them.

        Raises ModelError where they are not what the graph says, ResourceError for a full disk.
        """
        name, shape = tensor_type(value.type)
        if numbers.shape != tuple(shape) or numbers.dtype != DTYPES[name]:
            raise ModelError(f"{self._path} has room for {name} {list(shape)}, not for {numbers.dtype} {list(numbers.shape)}.")
        if name in ("INT4", "UINT4"):
            codes = numbers.reshape(-1).view(np.uint8)
            numbers = np.bitwise_or(codes[::2] & 15, codes[1::2] << 4)
        file, first, size = self._place(value)
        assert numbers.nbytes == size
        with explain_full_disk(file), file.open("r+b") as out:
            out.seek(first)
            out.write(np.ascontiguousarray(numbers).view(np.uint8).data)

    def _place(self, value: Any) -> tuple[Path, int, int]:
        """The file, first byte and bytes of a constant, held to what the graph says of it."""
        name, shape = tensor_type(value.type)
        bits = 4 if name in ("INT4", "UINT4") else 8 * np.dtype(DTYPES[name]).itemsize
        wanted, file = -(-bits * math.prod(shape) // 8), self._weights / Path(value.blobFileValue.fileName).name
        try:
            with file.open("rb") as weights:
                weights.seek(value.blobFileValue.offset)
                sentinel, kind, size, first = _BLOB.unpack(weights.read(_BLOB.size))
            whole = first + size <= file.stat().st_size
        except (OSError, struct.error) as error:
            raise ModelError(f"{file} cannot be read where the graph points; export the package again.") from error
        if (sentinel, kind, size) != (_SENTINEL, _BLOB_TYPES.get(name), wanted) or not whole:
            raise ModelError(f"{file} does not hold {name} {list(shape)} where the graph points; export the package again.")
        return file, first, size


def tensor_type(type_: Any) -> tuple[str, Sequence[int]]:
    """A type as (name, shape); -1 stands for a size that is known when it runs, and a state is what it holds.

    Raises ModelError for what is no tensor.
    """
    from coremltools.proto import MIL_pb2

    tensor = type_.stateType.wrappedType.tensorType if type_.WhichOneof("type") == "stateType" else type_.tensorType
    name = MIL_pb2.DataType.Name(tensor.dataType)
    if name not in DTYPES and name != "STRING":
        raise ModelError(f"The package holds values of type {name}, which edgetune does not write; export it again.")
    return name, [size.constant.size if size.WhichOneof("dimension") == "constant" else -1 for size in tensor.dimensions]


def _immediate(tensor: Any, name: str, shape: Sequence[int]) -> Array:
    """A constant that stands in the graph."""
    kind = tensor.WhichOneof("value")
    values = getattr(tensor, kind).values
    if name == "STRING":
        return np.array(values[0])
    if kind == "bytes":
        return np.frombuffer(bytearray(values), DTYPES[name]).reshape(shape)
    return np.array(values, DTYPES[name]).reshape(shape)
