"""Read the files of a .mlpackage, and read or overwrite its constants one at a time.

    Manifest.json       names the model among the items below Data/
    model.mlmodel       protobuf, coremltools.proto's Model: operations, and for each large constant its offset in weight.bin
    weights/weight.bin  a header of 64 bytes, then the constants, each after 64 bytes that give its type, its size in bytes and
                        its first byte; all at multiples of 64, little-endian; 4-bit numbers lie two to a byte, the first in
                        the low half

Because constants can be overwritten in place, coremltools lays out a package around placeholders, and the real weights are
then written one by one.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.runtime.errors import ModelError
from edgetune.runtime.files import explain_full_disk
from edgetune.runtime.json_file import read_object
from edgetune.runtime.untrusted_file import CORE_ML_GRAPH, CORE_ML_WEIGHTS, EXPORT_RECORD, open_untrusted, read_untrusted

Array = npt.NDArray[Any]
DTYPES: dict[str, type[np.generic]] = {
    "FLOAT16": np.float16, "FLOAT32": np.float32, "INT32": np.int32, "INT16": np.int16, "UINT16": np.uint16, "INT8": np.int8,
    "UINT8": np.uint8, "INT4": np.int8, "UINT4": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""The numpy dtype for each data type of the specification that edgetune writes. A 4-bit number takes a whole byte in numpy."""
_BLOB_TYPES = {"FLOAT16": 1, "FLOAT32": 2, "UINT8": 3, "INT8": 4, "INT4": 8, "UINT4": 11}
"""The number of each data type in weight.bin, from coremltools' BlobDataType."""
_BLOB_HEADER = struct.Struct("<IIQQ")  # sentinel, type, size in bytes, first byte
_SENTINEL = 0xDEADBEEF


class Package:
    """An opened package. `functions` maps each function's name to its block of operations (coremltools.proto's MIL_pb2)."""

    def __init__(self, path: Path) -> None:
        """Open the package at `path`. Raises ModelError where it holds no ML program."""
        from coremltools.proto import Model_pb2

        try:
            manifest = read_object(path / "Manifest.json", EXPORT_RECORD)
            file = path / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
            model = Model_pb2.Model.FromString(read_untrusted(file, CORE_ML_GRAPH))
            self.functions = {
                name: function.block_specializations[function.opset] for name, function in model.mlProgram.functions.items()
            }
            self.inputs = {name: list(function.inputs) for name, function in model.mlProgram.functions.items()}
            self.default: str = model.description.defaultFunctionName or "main"
            if self.default not in self.functions:
                raise ValueError("no function")
        except Exception as error:  # a damaged file can make the parsers raise anything
            raise ModelError(f"{path} is not a readable Core ML package ({type(error).__name__}); export it again.") from error
        self._path, self._weights = path, file.parent / "weights"

    def constant(self, value: Any) -> Array:
        """Return a constant's numbers. Those in weight.bin are memory-mapped, except 4-bit ones, which are unpacked to bytes.

        Raises ModelError where the file does not hold the type and size that the graph declares.
        """
        name, shape = tensor_type(value.type)
        if value.WhichOneof("value") == "immediateValue":
            return _immediate(value.immediateValue.tensor, name, shape)
        file, first, size = self._locate(value)
        with open_untrusted(file, CORE_ML_WEIGHTS) as weights:
            if name not in ("INT4", "UINT4"):
                # "c" is copy-on-write: torch warns about arrays that it cannot write to
                return np.memmap(weights, DTYPES[name], "c", first, tuple(shape))
            pairs = np.memmap(weights, np.uint8, "r", first, (size,))
        codes = np.empty((size, 2), np.uint8)
        np.bitwise_and(pairs, 15, out=codes[:, 0])
        np.right_shift(pairs, 4, out=codes[:, 1])
        codes = codes.reshape(-1)[: math.prod(shape)].reshape(shape)
        return (codes ^ 8).view(np.int8) - np.int8(8) if name == "INT4" else codes

    def fill(self, value: Any, numbers: Array) -> None:
        """Overwrite a constant in weight.bin with `numbers`.

        Raises ModelError where their shape or dtype is not the one that the graph declares, ResourceError for a full disk.
        """
        name, shape = tensor_type(value.type)
        if numbers.shape != tuple(shape) or numbers.dtype != DTYPES[name]:
            raise ModelError(
                f"{self._path} expects {name} {list(shape)} here, not {numbers.dtype} {list(numbers.shape)}; export it again."
            )
        if name in ("INT4", "UINT4"):
            codes = numbers.reshape(-1).view(np.uint8)
            numbers = np.bitwise_or(codes[::2] & 15, codes[1::2] << 4)
        file, first, size = self._locate(value)
        assert numbers.nbytes == size
        with explain_full_disk(file), file.open("r+b") as out:
            out.seek(first)
            out.write(np.ascontiguousarray(numbers).view(np.uint8).data)

    def _locate(self, value: Any) -> tuple[Path, int, int]:
        """Return the file, the first byte and the size in bytes of a constant, checked against the graph."""
        name, shape = tensor_type(value.type)
        bits = 4 if name in ("INT4", "UINT4") else 8 * np.dtype(DTYPES[name]).itemsize
        expected_size, file = -(-bits * math.prod(shape) // 8), self._weights / Path(value.blobFileValue.fileName).name
        try:
            with open_untrusted(file, CORE_ML_WEIGHTS) as weights:
                weights.seek(value.blobFileValue.offset)
                sentinel, kind, size, first = _BLOB_HEADER.unpack(weights.read(_BLOB_HEADER.size))
                complete = first + size <= os.fstat(weights.fileno()).st_size
        except (OSError, struct.error) as error:
            raise ModelError(f"{file} cannot be read where the graph points; export the package again.") from error
        if (sentinel, kind, size) != (_SENTINEL, _BLOB_TYPES.get(name), expected_size) or not complete:
            raise ModelError(f"{file} does not hold {name} {list(shape)} where the graph points; export the package again.")
        return file, first, size


def tensor_type(type_: Any) -> tuple[str, Sequence[int]]:
    """Return the (name, shape) of a tensor type, or of the tensor in a state; -1 is a size that is known only at run time.

    Raises ModelError for a data type that edgetune does not write.
    """
    from coremltools.proto import MIL_pb2

    tensor = type_.stateType.wrappedType.tensorType if type_.WhichOneof("type") == "stateType" else type_.tensorType
    name = MIL_pb2.DataType.Name(tensor.dataType)
    if name not in DTYPES and name != "STRING":
        raise ModelError(f"The package holds values of type {name}, which edgetune does not write; export it again.")
    return name, [size.constant.size if size.WhichOneof("dimension") == "constant" else -1 for size in tensor.dimensions]


def _immediate(tensor: Any, name: str, shape: Sequence[int]) -> Array:
    """Return a constant that is stored in the graph itself."""
    kind = tensor.WhichOneof("value")
    values = getattr(tensor, kind).values
    if name == "STRING":
        return np.array(values[0])
    if kind == "bytes":
        return np.frombuffer(bytearray(values), DTYPES[name]).reshape(shape)
    return np.array(values, DTYPES[name]).reshape(shape)
