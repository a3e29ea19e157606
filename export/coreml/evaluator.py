"""An evaluator of saved ML programs in numpy, since Core ML itself runs on Apple's systems alone.

It opens the .mlpackage that is handed out, its weight file included, and computes operation by operation: products and
reductions in fp32, every result rounded to the dtype that the program gives it, states updated in place. So it shows that
the graph and the weights of a package are right. It is not Apple's kernels, whose own rounding and bugs it cannot show.

Operations: Core ML's specification (MIL, opset iOS 18), as far as our exporter uses them; any other is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.export.coreml.package import DTYPES, Array, Package, tensor_type
from edgetune.runtime.errors import ModelError

Arguments = dict[str, Any]
_CASTS = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "int16": np.int16, "uint16": np.uint16, "bool": np.bool_}
_SMALL = 1 << 16
"""Bytes of a constant that is kept whatever the room: norms, shapes and flags."""
_PANEL = 1 << 20
"""Numbers of a weight that are fp32 at once: no more than a processor's cache holds."""


def _wide(x: Array) -> Array:
    """fp16 as fp32, in which products are summed; by torch, which has the processor's instructions for it."""
    return torch.from_numpy(np.asarray(x, order="C")).float().numpy() if x.dtype == np.float16 else x


def to_half(x: Array) -> Array:
    """fp32 rounded to fp16, to nearest even, beyond its range to inf."""
    return torch.from_numpy(np.asarray(x, order="C")).half().numpy()


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


def _update(i: Arguments, out: Array) -> Array:
    """slice_update into `out`."""
    place = out[_slices(i)]
    if place.shape != i["update"].shape:  # numpy would broadcast, Core ML would not
        raise ModelError(f"slice_update writes {i['update'].shape} where the slice is {place.shape}; export the package again.")
    place[...] = i["update"]
    return out


def _gather(i: Arguments) -> Array:
    if i.get("batch_dims") is not None and int(i["batch_dims"]):
        raise ModelError("The package gathers with batch_dims, which edgetune's evaluator does not know.")
    return np.take(i["x"], i["indices"].astype(np.int64), axis=int(i.get("axis", 0)))


def _attention(i: Arguments) -> Array:
    """softmax(Q K^T / sqrt(width) + mask) V."""
    q, k, v = (_wide(i[name]) for name in ("query", "key", "value"))
    scores, mask = q @ k.swapaxes(-1, -2) / np.sqrt(np.float32(q.shape[-1])), i.get("attn_mask")
    if mask is not None:
        scores = scores + _wide(mask)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)) @ v


def _matmul(i: Arguments) -> Array:
    x, y = _wide(i["x"]), _wide(i["y"])
    x = x.swapaxes(-1, -2) if i.get("transpose_x") else x
    y = y.swapaxes(-1, -2) if i.get("transpose_y") else y
    return x @ y


def _linear(i: Arguments) -> Array:
    """x W^T + b, the weight widened a few rows at a time."""
    x, weight = torch.from_numpy(_wide(i["x"])), torch.from_numpy(i["weight"])
    rows = max(1, _PANEL // weight.shape[1])
    y = torch.cat([x @ weight[at : at + rows].float().T for at in range(0, len(weight), rows)], dim=-1).numpy()
    return y if i.get("bias") is None else y + _wide(i["bias"])


def _reduce_mean(i: Arguments) -> Array:
    return np.mean(_wide(i["x"]), axis=tuple(int(axis) for axis in i["axes"]), keepdims=bool(i.get("keep_dims", False)))


def _rsqrt(i: Arguments) -> Array:
    epsilon = 1e-12 if i.get("epsilon") is None else float(i["epsilon"])
    return 1 / np.sqrt(_wide(i["x"]) + np.float32(epsilon))


def _silu(i: Arguments) -> Array:
    """x / (1 + exp(-x)); beyond 88 fp32's exp would overflow where the quotient is zero anyway."""
    x = _wide(i["x"])
    return x / (1 + np.exp(-np.clip(x, -88, 88)))


def _reshape(i: Arguments) -> Array:
    """A 0 keeps the axis, a -1 takes what is left."""
    return i["x"].reshape([i["x"].shape[n] if size == 0 else int(size) for n, size in enumerate(i["shape"])])


def _split(i: Arguments) -> list[Array]:
    sizes, axis = i.get("split_sizes"), int(i["axis"])
    return np.split(i["x"], int(i["num_splits"]) if sizes is None else np.cumsum(sizes)[:-1], axis=axis)


def _table(i: Arguments) -> Array:
    """constexpr_lut_to_dense with one table of scalars for all: indices u8 of any shape, lut (1, ..., entries, 1)."""
    if i.get("vector_axis") is not None or i["lut"].size != i["lut"].shape[-2]:
        raise ModelError("The package holds tables of vectors or by block, which edgetune's evaluator does not know.")
    return i["lut"].reshape(-1)[i["indices"]]


def _scaled(i: Arguments) -> Array:
    """constexpr_blockwise_shift_scale: data * scale, a scale for each block of each axis.

    In fp32, which holds the product of two fp16 numbers whole: rounded after that, it is what fp16 makes of it.
    """
    if i.get("offset") is not None:
        raise ModelError("The package shifts its weights by offsets, which edgetune's evaluator does not know.")
    data, scale = _wide(i["data"]).astype(np.float32, copy=i["data"].dtype == np.float32), _wide(i["scale"])
    blocks = [part for size, count in zip(data.shape, scale.shape, strict=True) for part in (count, size // count)]
    each = [part for count in scale.shape for part in (count, 1)]
    spread = data.reshape(blocks)
    spread *= scale.reshape(each)
    return data


OPERATIONS: dict[str, Callable[[Arguments], Any]] = {
    "add": _elementwise(np.add), "sub": _elementwise(np.subtract), "mul": _elementwise(np.multiply),
    "greater_equal": _elementwise(np.greater_equal), "select": lambda i: np.where(i["cond"], i["a"], i["b"]),
    "cast": lambda i: i["x"].astype(_CASTS[str(i["dtype"])]), "shape": lambda i: np.array(i["x"].shape, np.int32),
    "reshape": _reshape, "transpose": lambda i: np.transpose(i["x"], [int(axis) for axis in i["perm"]]),
    "expand_dims": lambda i: np.expand_dims(i["x"], tuple(int(axis) for axis in i["axes"])),
    "tile": lambda i: np.tile(i["x"], [int(count) for count in i["reps"]]), "split": _split,
    "concat": lambda i: np.concatenate(i["values"], axis=int(i["axis"])), "gather": _gather,
    "slice_by_index": lambda i: i["x"][_slices(i)].copy(), "slice_update": lambda i: _update(i, i["x"].copy()),
    "reduce_mean": _reduce_mean, "rsqrt": _rsqrt, "silu": _silu, "scaled_dot_product_attention": _attention,
    "linear": _linear, "matmul": _matmul,
    "constexpr_lut_to_dense": _table, "constexpr_blockwise_shift_scale": _scaled,
}  # fmt: skip
"""What each operation makes of its arguments by name; states and constants are MilProgram's."""


class MilProgram:
    """A saved package, opened. `functions` by name; `default` is the one that runs unless told."""

    def __init__(self, path: Path, room: int | None = None) -> None:
        """room: bytes of weights that may be kept from call to call, None for all; the others are read again for each.

        Raises ModelError for what is no package.
        """
        quiet_coremltools()
        self.package = Package(path)
        self.default = self.package.default
        self.functions = {name: _Function(block.operations) for name, block in self.package.functions.items()}
        self._room = room
        self._kept: dict[tuple[str, str], Array] = {}

    def states(self, function: str | None = None) -> dict[str, Array]:
        """Fresh states, all zero; what is never written takes no memory."""
        inputs = self.package.inputs[function or self.default]
        return {
            value.name: np.zeros(tensor_type(value.type)[1], np.float16)
            for value in inputs
            if value.type.WhichOneof("type") == "stateType"
        }

    def run(self, inputs: Mapping[str, Array], states: dict[str, Array], function: str | None = None) -> dict[str, Array]:
        """One prediction: outputs by name. `states` are changed.

        Raises ModelError for an operation that is not known here, and for an input that is missing.
        """
        name = function or self.default
        body, outputs = self.functions[name], self.package.functions[name].outputs
        known: dict[str, Array] = {}
        for value in self.package.inputs[name]:
            if value.name not in states and value.name not in inputs:
                raise ModelError(f"The package takes an input {value.name}, which was not given.")
            known[value.name] = states[value.name] if value.name in states else inputs[value.name]
        for index, operation in enumerate(body.operations):
            arguments = {
                part: [self._argument(name, binding, known) for binding in argument.arguments]
                for part, argument in operation.inputs.items()
            }
            if operation.type == "write_state":
                state, (data,) = operation.inputs["input"].arguments[0].name, arguments["data"]
                states[state] = known[state] = data if data is known[state] else data.copy()
            for output, result in zip(operation.outputs, _results(operation, arguments, index in body.in_place), strict=True):
                known[output.name] = _as_declared(output, result)
            for used in _used(operation):
                if body.last[used] == index and used not in outputs:
                    known.pop(used, None)
        return {output: known[output] for output in outputs}

    def weight(self, name: str, function: str | None = None) -> Array:
        """A constant, or what a chain of constexpr operations makes of constants, by its name."""
        return self._made(function or self.default, name)

    def _argument(self, function: str, binding: Any, known: Mapping[str, Array]) -> Array:
        """What an operation is given: a value of this call, or a constant, which is kept where there is room."""
        if binding.WhichOneof("binding") == "value":
            return self.package.constant(binding.value)
        if binding.name in known:
            return known[binding.name]
        key = (function, binding.name)
        if key in self._kept:
            return self._kept[key]
        made = self._made(*key)
        if made.nbytes > _SMALL and self._room is not None:
            if made.nbytes > self._room:
                return made
            self._room -= made.nbytes
        self._kept[key] = made
        return made

    def _made(self, function: str, name: str) -> Array:
        maker = self.functions[function].makers.get(name)
        if maker is None:
            raise ModelError(f"The package uses {name} before it is made; export it again.")
        if maker.type == "const":
            return self.package.constant(maker.attributes["val"])
        arguments = {}
        for part, argument in maker.inputs.items():
            (binding,) = argument.arguments
            named = binding.WhichOneof("binding") == "name"
            arguments[part] = self._made(function, binding.name) if named else self.package.constant(binding.value)
        return _as_declared(maker.outputs[0], _known(maker.type)(arguments))


class _Function:
    """A function's operations apart from what makes its constants, and what can be known of them before they run.

    makers: what makes each constant, by its name. last: where each value is used for the last time. in_place: the places of
    updates that may write into the state itself, since it is what they make next, and nothing later uses what was in it.
    """

    def __init__(self, operations: Sequence[Any]) -> None:
        self.makers = {each.outputs[0].name: each for each in operations if each.type.startswith("const")}
        self.operations = [each for each in operations if not each.type.startswith("const")]
        self.last = {used: index for index, each in enumerate(self.operations) for used in _used(each)}
        self.in_place: set[int] = set()
        states: dict[str, str] = {}  # by the name under which one was read
        viewed = set()  # other operations than slices, which copy, may keep looking at what they were given
        for index, each in enumerate(self.operations):
            if each.type == "read_state":
                states[each.outputs[0].name] = _used(each)[0]
            elif each.type not in ("slice_by_index", "slice_update", "write_state"):
                viewed |= {states[used] for used in _used(each) if used in states}
            following = self.operations[index + 1] if index + 1 < len(self.operations) else None
            if each.type == "slice_update" and following is not None and following.type == "write_state":
                state = states.get(each.inputs["x"].arguments[0].name)
                done = all(self.last.get(name, 0) <= index for name, its in states.items() if its == state)
                made = each.outputs[0].name
                own = set(_used(following)) == {state, made} and self.last[made] == index + 1
                if own and done and state not in viewed:
                    self.in_place.add(index)


def _results(operation: Any, arguments: Mapping[str, list[Array]], in_place: bool) -> list[Array]:
    """What an operation makes of its arguments, of which only concat takes several under a name; a state is read as it lies."""
    if operation.type == "write_state":
        return []
    if operation.type == "read_state":
        return arguments["input"]
    single: Arguments = {part: values if part == "values" else values[0] for part, values in arguments.items()}
    if in_place:
        return [_update(single, single["x"])]
    made = _known(operation.type)(single)
    return made if isinstance(made, list) else [made]


def _used(operation: Any) -> list[str]:
    """The names of the values that an operation takes."""
    return [
        binding.name
        for argument in operation.inputs.values()
        for binding in argument.arguments
        if binding.WhichOneof("binding") == "name"
    ]


def _known(kind: str) -> Callable[[Arguments], Any]:
    if kind not in OPERATIONS:
        raise ModelError(f"The package uses the operation {kind}, which edgetune's evaluator does not know.")
    return OPERATIONS[kind]


def _as_declared(output: Any, result: Any) -> Array:
    """A result in the dtype that the program declares. Raises ModelError where it has another shape."""
    name, shape = tensor_type(output.type)
    result = np.asarray(result)
    if len(shape) != result.ndim or any(size not in (-1, found) for size, found in zip(shape, result.shape, strict=True)):
        raise ModelError(f"The package says that {output.name} is {list(shape)}, not {list(result.shape)}; export it again.")
    if name == "FLOAT16" and result.dtype == np.float32:
        return to_half(result)
    return result.astype(DTYPES[name], copy=False)


def quiet_coremltools() -> None:
    """Import coremltools without what it says about torch's version and about libraries that only macOS has."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools  # noqa: F401
