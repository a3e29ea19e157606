"""Find where a package stores each weight, so that weights can be read from it and written into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.export.coreml.package import Package
from edgetune.export.coreml.stored_weight import StoredWeight, nf4_table
from edgetune.runtime.errors import ModelError

EMBEDDING_NAME = "embedding"
"""The embedding's name in the program."""


@dataclass(frozen=True)
class WeightLocation:
    """The constants in which a package stores a weight: its codes and, for 4-bit forms, its scale."""

    form: str
    codes: Any
    scale: Any = None

    def read(self, package: Package) -> StoredWeight:
        """Return the weight as the package stores it."""
        scale = None if self.scale is None else package.constant(self.scale)
        return StoredWeight(self.form, package.constant(self.codes), scale)

    def write(self, package: Package, stored: StoredWeight) -> None:
        """Write a weight into the package."""
        assert stored.form == self.form
        package.fill(self.codes, stored.codes)
        if stored.scale is not None:
            package.fill(self.scale, stored.scale)


def weight_locations(package: Package, function: str) -> dict[str, WeightLocation]:
    """Return the location of every weight of a function, by the name of the linear that uses it, the embedding's by
    EMBEDDING_NAME.

    Raises ModelError for a form that edgetune does not write.
    """
    operations = package.functions[function].operations
    makers = {operation.outputs[0].name: operation for operation in operations if operation.type.startswith("const")}
    users = {operation.outputs[0].name: operation.inputs["weight"] for operation in operations if operation.type == "linear"}
    found = {name: _location(package, makers, weight.arguments[0].name) for name, weight in users.items()}
    return found | ({EMBEDDING_NAME: _location(package, makers, EMBEDDING_NAME)} if EMBEDDING_NAME in makers else {})


def _location(package: Package, makers: Mapping[str, Any], name: str) -> WeightLocation:
    """Recognise the form of a weight by the chain of operations that makes it; see stored_weight.constexpr."""
    maker = makers.get(name)
    if maker is not None and maker.type == "const":
        return WeightLocation("fp16", maker.attributes["val"])
    if maker is not None and maker.type == "constexpr_blockwise_shift_scale" and "offset" not in maker.inputs:
        data, scale = (maker.inputs[part].arguments[0] for part in ("data", "scale"))
        if data.WhichOneof("binding") == "value":
            return WeightLocation("int4", data.value, scale.value)
        table = makers[data.name]
        if table.type == "constexpr_lut_to_dense":
            indices, lut = (table.inputs[part].arguments[0].value for part in ("indices", "lut"))
            if np.array_equal(package.constant(lut).reshape(-1), nf4_table()):
                return WeightLocation("nf4", indices, scale.value)
    raise ModelError(f"The package stores {name} in a form that edgetune does not write; export it again.")
