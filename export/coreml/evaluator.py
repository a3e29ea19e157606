"""Run saved ML programs in numpy, because Core ML itself exists only on Apple's systems.

The evaluator opens the .mlpackage that is handed out, its weight file included, and runs it operation by operation: every
result is rounded to the dtype that the program declares, and states are updated in place. That proves the graph and the
weights of a package. It is not Apple's kernels: their rounding and their bugs cannot be seen here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.export.coreml.operations import Arguments, operation, to_half, update_slice
from edgetune.export.coreml.package import DTYPES, Array, Package, tensor_type
from edgetune.runtime.errors import ModelError

_SMALL_CONSTANT = 1 << 16
"""Bytes up to which a constant is always cached: norms, shapes and flags. Chosen by hand."""


class MilProgram:
    """A saved package that can be run. `functions` holds its functions by name; `default` is the name of the default one."""

    def __init__(self, path: Path, cache_bytes: int | None = None) -> None:
        """Open a package. `cache_bytes` limits the weights kept from call to call; None keeps all, and weights that do not
        fit are read again in each call.

        Raises ModelError where `path` is not a readable package.
        """
        quiet_coremltools()
        self.package = Package(path)
        self.default = self.package.default
        self.functions = {name: _Function(block.operations) for name, block in self.package.functions.items()}
        self._cache_left = cache_bytes
        self._cache: dict[tuple[str, str], Array] = {}

    def states(self, function: str | None = None) -> dict[str, Array]:
        """Return fresh states, all zero; pages that are never written take no memory."""
        inputs = self.package.inputs[function or self.default]
        return {
            value.name: np.zeros(tensor_type(value.type)[1], np.float16)
            for value in inputs
            if value.type.WhichOneof("type") == "stateType"
        }

    def run(self, inputs: Mapping[str, Array], states: dict[str, Array], function: str | None = None) -> dict[str, Array]:
        """Make one prediction: return the outputs by name and change `states`.

        Raises ModelError for an unsupported operation and for a missing input.
        """
        name = function or self.default
        body, outputs = self.functions[name], self.package.functions[name].outputs
        values: dict[str, Array] = {}
        for value in self.package.inputs[name]:
            if value.name not in states and value.name not in inputs:
                raise ModelError(f"The package takes an input {value.name}, which was not given.")
            values[value.name] = states[value.name] if value.name in states else inputs[value.name]
        for index, op in enumerate(body.operations):
            arguments = {
                part: [self._argument(name, binding, values) for binding in argument.arguments]
                for part, argument in op.inputs.items()
            }
            if op.type == "write_state":
                state, (data,) = op.inputs["input"].arguments[0].name, arguments["data"]
                states[state] = values[state] = data if data is values[state] else data.copy()
            for output, result in zip(op.outputs, _results(op, arguments, index in body.in_place), strict=True):
                values[output.name] = _as_declared(output, result)
            for used in _used(op):  # free each value after its last use
                if body.last_use[used] == index and used not in outputs:
                    values.pop(used, None)
        return {output: values[output] for output in outputs}

    def weight(self, name: str, function: str | None = None) -> Array:
        """Return a constant by its name, computed by constexpr operations where the package stores it compressed."""
        return self._constant(function or self.default, name)

    def _argument(self, function: str, binding: Any, values: Mapping[str, Array]) -> Array:
        """Return one argument of an operation: a value of this call, or a constant, which is cached where there is room."""
        if binding.WhichOneof("binding") == "value":
            return self.package.constant(binding.value)
        if binding.name in values:
            return values[binding.name]
        key = (function, binding.name)
        if key in self._cache:
            return self._cache[key]
        constant = self._constant(*key)
        if constant.nbytes > _SMALL_CONSTANT and self._cache_left is not None:
            if constant.nbytes > self._cache_left:
                return constant
            self._cache_left -= constant.nbytes
        self._cache[key] = constant
        return constant

    def _constant(self, function: str, name: str) -> Array:
        """Read a constant, or compute it from the constants that its constexpr operation takes."""
        maker = self.functions[function].makers.get(name)
        if maker is None:
            raise ModelError(f"The package uses {name} before anything makes it; export it again.")
        if maker.type == "const":
            return self.package.constant(maker.attributes["val"])
        arguments = {}
        for part, argument in maker.inputs.items():
            (binding,) = argument.arguments
            named = binding.WhichOneof("binding") == "name"
            arguments[part] = self._constant(function, binding.name) if named else self.package.constant(binding.value)
        return _as_declared(maker.outputs[0], operation(maker.type)(arguments))


class _Function:
    """The operations of a function, and what can be found out about them before they run.

    makers: the operation that makes each constant, by the constant's name. operations: all others, in order. last_use: index
    of the last operation that takes each value. in_place: indices of the slice_updates that may write into the state itself.
    """

    def __init__(self, operations: Sequence[Any]) -> None:
        self.makers = {each.outputs[0].name: each for each in operations if each.type.startswith("const")}
        self.operations = [each for each in operations if not each.type.startswith("const")]
        self.last_use = {used: index for index, each in enumerate(self.operations) for used in _used(each)}
        self.in_place = self._updates_in_place()

    def _updates_in_place(self) -> set[int]:
        """Find the updates of a state that need no copy of it: the next operation writes the result back to the same state,
        nothing else uses the result, and nothing later reads the state's old contents."""
        found: set[int] = set()
        state_of: dict[str, str] = {}  # the value that read_state made -> the state that it is a view of
        viewed = set()  # states that an operation other than a slice (slices copy) may still hold a view of
        for index, each in enumerate(self.operations):
            if each.type == "read_state":
                state_of[each.outputs[0].name] = _used(each)[0]
            elif each.type not in ("slice_by_index", "slice_update", "write_state"):
                viewed |= {state_of[used] for used in _used(each) if used in state_of}
            following = self.operations[index + 1] if index + 1 < len(self.operations) else None
            if each.type == "slice_update" and following is not None and following.type == "write_state":
                state, result = state_of.get(each.inputs["x"].arguments[0].name), each.outputs[0].name
                old_unused = all(self.last_use.get(name, 0) <= index for name, its in state_of.items() if its == state)
                written_back = set(_used(following)) == {state, result} and self.last_use[result] == index + 1
                if written_back and old_unused and state not in viewed:
                    found.add(index)
        return found


def _results(op: Any, arguments: Mapping[str, list[Array]], in_place: bool) -> list[Array]:
    """Run one operation and return its outputs. read_state returns the state itself, not a copy."""
    if op.type == "write_state":
        return []
    if op.type == "read_state":
        return arguments["input"]
    # only concat takes several values under one name, `values`
    single: Arguments = {part: values if part == "values" else values[0] for part, values in arguments.items()}
    if in_place:
        return [update_slice(single, single["x"])]
    result = operation(op.type)(single)
    return result if isinstance(result, list) else [result]


def _used(op: Any) -> list[str]:
    """Return the names of the values that an operation takes."""
    return [
        binding.name
        for argument in op.inputs.values()
        for binding in argument.arguments
        if binding.WhichOneof("binding") == "name"
    ]


def _as_declared(output: Any, result: Any) -> Array:
    """Convert a result to the dtype that the program declares. Raises ModelError where its shape is not the declared one."""
    name, shape = tensor_type(output.type)
    result = np.asarray(result)
    if len(shape) != result.ndim or any(size not in (-1, found) for size, found in zip(shape, result.shape, strict=True)):
        raise ModelError(
            f"The package declares {output.name} as {list(shape)}, but its shape is {list(result.shape)}; export it again."
        )
    if name == "FLOAT16" and result.dtype == np.float32:
        return to_half(result)
    return result.astype(DTYPES[name], copy=False)


def quiet_coremltools() -> None:
    """Import coremltools without its warnings about torch's version and about libraries that only macOS has."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools  # noqa: F401
