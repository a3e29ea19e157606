"""An evaluator of saved ML programs in numpy, since Core ML itself runs on Apple's systems alone.

It opens the .mlpackage that is handed out, its weight file included, and computes operation by operation: products and
reductions in fp32, every result rounded to the dtype that the program gives it, states updated in place. So it shows that
the graph and the weights of a package are right. It is not Apple's kernels, whose own rounding and bugs it cannot show.

Operations: Core ML's specification (MIL, opset iOS 18), as far as our exporter uses them; any other is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.runtime.errors import ModelError

Array = npt.NDArray[Any]
Arguments = dict[str, Any]
_DTYPES = {
    "fp16": np.float16, "fp32": np.float32, "int32": np.int32, "int16": np.int16, "uint16": np.uint16, "int8": np.int8,
    "uint8": np.uint8, "bool": np.bool_,
}  # fmt: skip


def _wide(x: Array) -> Array:
    """fp16 as fp32, in which products are summed."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def _elementwise(function: Callable[..., Array]) -> Callable[[Arguments], Array]:
    return lambda i: function(_wide(i["x"]), _wide(i["y"]))


def _slices(i: Arguments) -> tuple[slice | int, ...]:
    """begin, end and stride with their masks -> what numpy indexes with."""
    rank = i["x"].ndim
    masks = {name: [False] * rank if i.get(name) is None else [bool(m) for m in i[name]]
             for name in ("begin_mask", "end_mask", "squeeze_mask")}  # fmt: skip
    begin, end = ([int(value) for value in i[name]] for name in ("begin", "end"))
    stride = [1] * rank if i.get("stride") is None else [int(value) for value in i["stride"]]
    return tuple(
        begin[axis]
        if masks["squeeze_mask"][axis]
        else slice(
            None if masks["begin_mask"][axis] else begin[axis],
            None if masks["end_mask"][axis] else end[axis],
            stride[axis],
        )
        for axis in range(rank)
    )


def _slice_update(i: Arguments) -> Array:
    out = i["x"].copy()
    place = out[_slices(i)]
    if place.shape != i["update"].shape:  # numpy would broadcast, Core ML would not
        raise ModelError(f"slice_update writes {i['update'].shape} where the slice is {place.shape}; export the package again.")
    place[...] = i["update"]
    return out


def _gather(i: Arguments) -> Array:
    if i.get("batch_dims") is not None and int(i["batch_dims"]):
        raise ModelError("The package gathers with batch_dims, which edgetune's evaluator does not know.")
    return np.take(i["x"], i["indices"].astype(np.int64), axis=int(i.get("axis", 0)))


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _attention(i: Arguments) -> Array:
    """softmax(Q K^T / sqrt(width) + mask) V."""
    q, k, v = (_wide(i[name]) for name in ("query", "key", "value"))
    scores, mask = q @ k.swapaxes(-1, -2) / np.sqrt(np.float32(q.shape[-1])), i.get("attn_mask")
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + _wide(mask)
    return _softmax(scores, -1) @ v


def _matmul(i: Arguments) -> Array:
    x, y = _wide(i["x"]), _wide(i["y"])
    x = x.swapaxes(-1, -2) if i.get("transpose_x") else x
    y = y.swapaxes(-1, -2) if i.get("transpose_y") else y
    return x @ y


def _linear(i: Arguments) -> Array:
    y = _wide(i["x"]) @ _wide(i["weight"]).T
    return y if i.get("bias") is None else y + _wide(i["bias"])


def _reduce(function: Callable[..., Array]) -> Callable[[Arguments], Array]:
    def reduced(i: Arguments) -> Array:
        axes = None if i.get("axes") is None else tuple(int(axis) for axis in i["axes"])
        return function(_wide(i["x"]), axis=axes, keepdims=bool(i.get("keep_dims", False)))

    return reduced


def _rsqrt(i: Arguments) -> Array:
    epsilon = 1e-12 if i.get("epsilon") is None else float(i["epsilon"])
    return 1 / np.sqrt(_wide(i["x"]) + np.float32(epsilon))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -88, 88)))


def _reshape(i: Arguments) -> Array:
    """A 0 keeps the axis, a -1 takes what is left."""
    return i["x"].reshape([i["x"].shape[n] if size == 0 else int(size) for n, size in enumerate(i["shape"])])


def _split(i: Arguments) -> list[Array]:
    sizes, axis = i.get("split_sizes"), int(i["axis"])
    return np.split(i["x"], int(i["num_splits"]) if sizes is None else np.cumsum(sizes)[:-1], axis=axis)


def _squeeze(i: Arguments) -> Array:
    return np.squeeze(i["x"], None if i.get("axes") is None else tuple(int(axis) for axis in i["axes"]))


def _table(i: Arguments) -> Array:
    """constexpr_lut_to_dense with one table of scalars a block: indices (a, b, ...), lut (blocks of each axis, entries, 1)."""
    indices, lut = i["indices"].astype(np.int64), i["lut"]
    if i.get("vector_axis") is not None or lut.shape[-1] != 1 or lut.ndim != indices.ndim + 2:
        raise ModelError("The package holds a table of vectors, which edgetune's evaluator does not know.")
    place = [np.arange(size) // (size // blocks) for size, blocks in zip(indices.shape, lut.shape[:-2], strict=True)]
    return lut[(*np.ix_(*place), indices, 0)]


def _scaled(i: Arguments) -> Array:
    """constexpr_blockwise_shift_scale: (data - offset) * scale in the scale's dtype, a scale for each block of each axis."""
    data, scale, offset = i["data"].astype(i["scale"].dtype), i["scale"], i.get("offset")
    for axis, (size, blocks) in enumerate(zip(data.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, size // blocks, axis)
        offset = None if offset is None else np.repeat(offset, size // blocks, axis)
    return (data if offset is None else data - offset.astype(data.dtype)) * scale


OPERATIONS: dict[str, Callable[[Arguments], Any]] = {
    "add": _elementwise(np.add), "sub": _elementwise(np.subtract), "mul": _elementwise(np.multiply),
    "real_div": _elementwise(np.divide), "maximum": _elementwise(np.maximum), "minimum": _elementwise(np.minimum),
    "pow": _elementwise(np.power), "greater_equal": _elementwise(np.greater_equal),
    "cast": lambda i: i["x"].astype(_DTYPES[str(i["dtype"])]),
    "shape": lambda i: np.array(i["x"].shape, np.int32),
    "concat": lambda i: np.concatenate([np.atleast_1d(value) for value in i["values"]], axis=int(i["axis"])),
    "slice_by_index": lambda i: i["x"][_slices(i)], "slice_update": _slice_update, "gather": _gather,
    "select": lambda i: np.where(i["cond"], i["a"], i["b"]),
    "rsqrt": _rsqrt, "sigmoid": lambda i: _sigmoid(_wide(i["x"])), "silu": lambda i: _wide(i["x"]) * _sigmoid(_wide(i["x"])),
    "reduce_mean": _reduce(np.mean), "reduce_sum": _reduce(np.sum), "reduce_max": _reduce(np.max),
    "softmax": lambda i: _softmax(_wide(i["x"]), int(i["axis"])), "scaled_dot_product_attention": _attention,
    "linear": _linear, "matmul": _matmul, "reshape": _reshape, "split": _split, "squeeze": _squeeze,
    "transpose": lambda i: np.transpose(i["x"], [int(axis) for axis in i["perm"]]),
    "expand_dims": lambda i: np.expand_dims(i["x"], tuple(int(axis) for axis in i["axes"])),
    "tile": lambda i: np.tile(i["x"], [int(count) for count in i["reps"]]), "identity": lambda i: i["x"],
    "constexpr_lut_to_dense": _table, "constexpr_blockwise_shift_scale": _scaled,
}  # fmt: skip
"""What each operation makes of its arguments by name; states and constants are MilProgram's."""


class MilProgram:
    """A saved package, opened. `functions` are coremltools' own, by name; `default` is the one that runs unless told."""

    def __init__(self, package: Path) -> None:
        """Raises ModelError for what coremltools cannot open."""
        quiet_coremltools()
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        try:
            model = ct.models.MLModel(str(package), skip_model_load=True)
            spec = model.get_spec()
            program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
        except Exception as error:  # whatever a damaged file makes of a parser
            raise ModelError(f"{package} is no readable Core ML package ({type(error).__name__}); export it again.") from error
        self.functions: dict[str, Any] = dict(program.functions)
        self.default: str = spec.description.defaultFunctionName or "main"
        self._constants: dict[Any, Array] = {}

    def operations(self, function: str | None = None) -> Iterator[Any]:
        """The operations of a function in their order."""
        yield from self.functions[function or self.default].operations

    def states(self, function: str | None = None) -> dict[str, Array]:
        """Fresh states, all zero."""
        from coremltools.converters.mil.mil import types

        return {
            name: np.zeros(variable.sym_type.wrapped_type().get_shape(), np.float16)
            for name, variable in self.functions[function or self.default].inputs.items()
            if types.is_state(variable.sym_type)
        }

    def run(self, inputs: Mapping[str, Array], states: Mapping[str, Array], function: str | None = None) -> dict[str, Array]:
        """One prediction: outputs by name. `states` are changed in place.

        Raises ModelError for an operation that is not known here, and for an input that is missing.
        """
        body = self.functions[function or self.default]
        known: dict[Any, Any] = {}
        for name, variable in body.inputs.items():
            if name not in states and name not in inputs:
                raise ModelError(f"The package takes an input {name}, which was not given.")
            known[variable] = states[name] if name in states else inputs[name]
        for operation in body.operations:
            if operation.op_type == "const":
                continue
            results = self._results(operation, known)
            for variable, result in zip(operation.outputs, results, strict=True):
                known[variable] = _rounded(variable, result)
        return {variable.name: known[variable] for variable in body.outputs}

    def value(self, variable: Any) -> Array:
        """A constant, or what a chain of constexpr operations makes of constants, kept from call to call."""
        if variable not in self._constants:
            operation = variable.op
            if operation is None or (operation.op_type != "const" and not operation.op_type.startswith("constexpr")):
                raise KeyError(variable.name)
            if operation.op_type == "const":
                self._constants[variable] = np.asarray(variable.val)
            else:
                arguments = {name: self.value(its) for name, its in operation.inputs.items() if its is not None}
                self._constants[variable] = _rounded(variable, _known(operation.op_type)(arguments))
        return self._constants[variable]

    def _results(self, operation: Any, known: dict[Any, Any]) -> list[Array]:
        if operation.op_type.startswith("constexpr"):
            return [self.value(operation.outputs[0])]
        arguments = {name: self._argument(its, known) for name, its in operation.inputs.items() if its is not None}
        if operation.op_type == "read_state":
            return [arguments["input"].copy()]
        if operation.op_type == "coreml_update_state":
            arguments["state"][...] = arguments["value"]
            return [arguments["value"]]
        result = _known(operation.op_type)(arguments)
        return result if isinstance(result, list) else [result]

    def _argument(self, variable: Any, known: dict[Any, Any]) -> Any:
        if isinstance(variable, list | tuple):
            return [self._argument(each, known) for each in variable]
        return known[variable] if variable in known else self.value(variable)


def _known(kind: str) -> Callable[[Arguments], Any]:
    if kind not in OPERATIONS:
        raise ModelError(f"The package uses the operation {kind}, which edgetune's evaluator does not know.")
    return OPERATIONS[kind]


def _rounded(variable: Any, result: Any) -> Array:
    """A result in the dtype that the program declares, fp32 to fp16 with overflow to inf as hardware does it."""
    from coremltools.converters.mil.mil.types import builtin_to_string

    dtype = _DTYPES.get(builtin_to_string(variable.dtype))
    with np.errstate(over="ignore"):
        return np.asarray(result) if dtype is None else np.asarray(result).astype(dtype, copy=False)


def quiet_coremltools() -> None:
    """Import coremltools without what it says about torch's version and about libraries that only macOS has."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools  # noqa: F401
