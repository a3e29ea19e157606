"""Build the ML program of a Llama for Core ML (iOS 18, macOS 15), with the KV cache as its state.

The program is written operation by operation with coremltools' builder, so that no dense copy of the model is traced and no
pass has to find out again which constant was which weight. One call reads a chunk of T tokens:

    input_ids   i32 (1, T)            T is 1 to `prefill`
    causal_mask f16 (1, 1, T, M)      0 where a token sees a position, else HIDDEN; M is the length of the cache after the chunk
    window_mask f16 (1, 1, T, M)      the same for layers with a sliding window; only where the model has any
    q_proj_a, q_proj_b, ...           f16 (L, r, in) and (L, out, r): the adapter, where it is an input; b includes the scale,
                                      and r is 1 to the adapter's rank
    k_cache, v_cache  f16 (L, KV, context, hd)      states; the chunk is written to slots M - T to M
    logits      f16 (1, T, V)

Everything is fp16 except what would overflow: the squares, mean and root of RMSNorm are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgetune.export.coreml.package import Array
from edgetune.export.coreml.plan import Plan, constants, linear_name
from edgetune.export.coreml.stored_weight import constexpr, nf4_table
from edgetune.export.coreml.weight_locations import EMBEDDING_NAME
from edgetune.runtime.names import EMBEDDING, HEAD, linear_weight

_LEAST_SHARED = 10
"""Numbers from which a constant is stored in weight.bin instead of in the graph, which is coremltools' own rule. Only those are
shared between functions, by name."""


def build(plans: Mapping[str, Plan]) -> Any:
    """Build a program with a function for each plan, the first being the default. They share constants of the same name."""
    from coremltools.converters.mil.mil import Program

    program = Program()
    for name, plan in plans.items():
        function, inputs = _function(plan)
        function.set_input_types(tuple(inputs))
        program.add_function(name, function)
    program.default_function_name = next(iter(plans))
    if len(plans) > 1:
        program.export_as_multifunction = True
        for function in program.functions.values():
            for operation in function.operations:
                if operation.op_type == "const" and np.size(operation.outputs[0].val) >= _LEAST_SHARED:
                    operation.weight_id = operation.name
    return program


def _function(plan: Plan) -> tuple[Any, list[Any]]:
    """Build a function; return it with coremltools' types of its inputs."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, types

    tokens, length = ct.RangeDim(1, plan.prefill, default=1), ct.RangeDim(1, plan.context, default=1)
    masks = ["causal_mask", *(["window_mask"] if plan.windowed else [])]
    typed = [ct.TensorType("input_ids", (1, tokens), dtype=np.int32)]
    typed += [ct.TensorType(name, (1, 1, tokens, length), dtype=np.float16) for name in masks]
    inputs = {"input_ids": mb.placeholder(shape=(1, tokens.symbol), dtype=types.int32)}
    inputs |= {name: mb.placeholder(shape=(1, 1, tokens.symbol, length.symbol), dtype=types.fp16) for name in masks}
    for part, rank in plan.input_ranks.items():
        # A range too, though apps can always pass the whole rank: Core ML ends a process that loads a program whose inputs are
        # partly of fixed and partly of flexible shapes, if it has states (reported as coremltools issue 2548).
        ranks = ct.RangeDim(1, max(rank, 2), default=rank)
        for name, shape in plan.adapter_shapes({part: ranks}).items():
            typed.append(ct.TensorType(name, shape, dtype=np.float16))
        for name, shape in plan.adapter_shapes({part: ranks.symbol}).items():
            inputs[name] = mb.placeholder(shape=shape, dtype=types.fp16)
    for name in ("k_cache", "v_cache"):
        inputs[name] = mb.state_tensor_placeholder(shape=plan.state_shape, dtype=types.fp16)
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        function.set_outputs([_Graph(plan, function.inputs).logits()])
    return function, typed


class _Graph:
    """Writes a function's operations in the order in which they run. Shapes are those of runtime/model.py after a leading 1."""

    def __init__(self, plan: Plan, inputs: Mapping[str, Any]) -> None:
        from coremltools.converters.mil import Builder as mb

        self.mb, self.plan, self.inputs, self.config = mb, plan, inputs, plan.config
        self.constants: dict[str, Any] = {}
        self.values = constants(plan)
        self.caches = {name: mb.read_state(input=inputs[name]) for name in ("k_cache", "v_cache")}
        length = mb.shape(x=inputs["causal_mask"])
        self.end = mb.slice_by_index(x=length, begin=[3], end=[4], name="end")
        count = mb.slice_by_index(x=length, begin=[2], end=[3])
        self.begin = mb.sub(x=self.end, y=count, name="begin")
        self.cos, self.sin = self.rope()

    def logits(self) -> Any:
        """Write the whole model; return the logits (1, T, V)."""
        mb = self.mb
        shape = (self.config.vocab_size, self.config.hidden_size)
        embedding = self.weight(EMBEDDING, shape, EMBEDDING_NAME)
        h = mb.gather(x=embedding, indices=self.inputs["input_ids"], axis=0, batch_dims=0, validate_indices=False, name="h")
        for layer in range(self.config.num_layers):
            h = self.block(layer, h)
        head = embedding if self.config.tie_embeddings else self.weight(HEAD, shape, "lm_head_weight")
        return self.product(self.norm(h, "norm"), head, name="logits")

    def block(self, layer: int, h: Any) -> Any:
        """Write a layer: (1, T, D) -> (1, T, D)."""
        mb, name = self.mb, f"layers_{layer}"
        x = self.norm(h, f"{name}_attn_norm")
        q, k, v = (self.linear(layer, part, x) for part in ("q_proj", "k_proj", "v_proj"))
        h = mb.add(x=h, y=self.linear(layer, "o_proj", self.attend(layer, q, k, v)))
        x = self.norm(h, f"{name}_mlp_norm")
        gate = mb.silu(x=self.linear(layer, "gate_proj", x))
        gated = mb.mul(x=gate, y=self.linear(layer, "up_proj", x))
        return mb.add(x=h, y=self.linear(layer, "down_proj", gated), name=f"{name}_h")

    def constant(self, name: str) -> Any:
        """Add one of plan.constants to the program."""
        return self.mb.const(val=self.values[name], name=name)

    def norm(self, x: Any, name: str) -> Any:
        """Write RMSNorm over the last axis, in fp32 until the product with the weight."""
        mb = self.mb
        wide = mb.cast(x=x, dtype="fp32")
        mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
        root = mb.rsqrt(x=mb.add(x=mean, y=np.float32(self.config.rms_norm_eps)))
        narrow = mb.cast(x=mb.mul(x=wide, y=root), dtype="fp16")
        return mb.mul(x=narrow, y=self.constant(f"{name}_weight"), name=name)

    def linear(self, layer: int, part: str, x: Any) -> Any:
        """Write a linear (1, T, in) -> (1, T, out), with its bias and adapter if it has them."""
        mb, name = self.mb, linear_name(layer, part)
        full, shape = linear_weight(layer, part), self.config.linear_shapes()[part]
        weight = self.weight(full, shape, f"{name}_weight")
        bias = {"bias": self.constant(f"{name}_bias")} if f"{name}_bias" in self.values else {}
        y = self.product(x, weight, **bias, name=name)
        if part in self.plan.input_ranks:
            a, b = (self.of_layer(layer, self.inputs[f"{part}_{which}"]) for which in "ab")
            reduced = mb.matmul(x=x, y=a, transpose_y=True)
            return mb.add(x=y, y=mb.matmul(x=reduced, y=b, transpose_y=True), name=f"{name}_adapted")
        if (layer, part) in self.plan.constants:
            a, b = (self.constant(f"{name}_{which}") for which in "ab")
            return mb.add(x=y, y=self.product(self.product(x, a), b), name=f"{name}_adapted")
        return y

    def product(self, x: Any, weight: Any, **more: Any) -> Any:
        """Write x W^T. Without a bias Core ML adds zeros: they are stored once for all linears of a width."""
        if "bias" not in more:
            more["bias"] = self.shared(f"zeros_{weight.shape[0]}", lambda: np.zeros(weight.shape[0], np.float16))
        return self.mb.linear(x=x, weight=weight, **more)

    def weight(self, full: str, shape: tuple[int, int], name: str) -> Any:
        """Add the weight (out, in) with the Hugging Face name `full` to the program, under `name`."""
        stored = self.plan.weight(full, shape)
        table = self.shared("nf4_table", lambda: nf4_table().reshape(1, 1, 16, 1)) if stored.form == "nf4" else None
        return constexpr(stored, name, table)

    def shared(self, name: str, make: Callable[[], Array]) -> Any:
        """Return a constant that several operations take; make it on first use."""
        if name not in self.constants:
            self.constants[name] = self.mb.const(val=make(), name=name)
        return self.constants[name]

    def of_layer(self, layer: int, stacked: Any) -> Any:
        """Slice one layer out of a stack: (L, ...) -> (1, ...)."""
        rest = [0] * (len(stacked.shape) - 1)
        whole = [False, *(True for _ in rest)]
        return self.mb.slice_by_index(x=stacked, begin=[layer, *rest], end=[layer + 1, *rest], end_mask=whole)

    def attend(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        """Write attention through the cache: q (1, T, H hd), k and v (1, T, KV hd) -> (1, T, H hd)."""
        mb, config = self.mb, self.config
        q, k, v = (
            self.heads(x, count) for x, count in ((q, config.num_heads), (k, config.num_kv_heads), (v, config.num_kv_heads))
        )
        if config.qk_norm:
            q, k = self.norm(q, f"layers_{layer}_q_norm"), self.norm(k, f"layers_{layer}_k_norm")
        k, v = self.cached(layer, "k_cache", self.rotate(k)), self.cached(layer, "v_cache", v)
        mask = self.inputs["causal_mask" if self.plan.window(layer) is None else "window_mask"]
        seen = mb.scaled_dot_product_attention(query=self.rotate(q), key=k, value=v, attn_mask=mask)
        return mb.reshape(x=mb.transpose(x=seen, perm=[0, 2, 1, 3]), shape=[1, -1, config.num_heads * config.head_dim])

    def heads(self, x: Any, count: int) -> Any:
        """Split into heads: (1, T, count hd) -> (1, count, T, hd)."""
        split = self.mb.reshape(x=x, shape=[1, -1, count, self.config.head_dim])
        return self.mb.transpose(x=split, perm=[0, 2, 1, 3])

    def rope(self) -> tuple[Any, Any]:
        """Slice cos and sin (T, hd/2) for this chunk's positions out of the tables of all positions."""
        mb, half = self.mb, self.config.head_dim // 2
        first = mb.concat(values=[self.begin, _ints(0)], axis=0)
        last = mb.concat(values=[self.end, _ints(half)], axis=0)
        tables = (self.constant(name) for name in ("cos", "sin"))
        cos, sin = (mb.slice_by_index(x=table, begin=first, end=last, end_mask=[False, True]) for table in tables)
        return cos, sin

    def rotate(self, x: Any) -> Any:
        """Apply RoPE to (1, heads, T, hd): number i of a head pairs with i + hd/2."""
        mb = self.mb
        a, b = mb.split(x=x, num_splits=2, axis=-1)
        left = mb.sub(x=mb.mul(x=a, y=self.cos), y=mb.mul(x=b, y=self.sin))
        right = mb.add(x=mb.mul(x=b, y=self.cos), y=mb.mul(x=a, y=self.sin))
        return mb.concat(values=[left, right], axis=-1)

    def cached(self, layer: int, name: str, x: Any) -> Any:
        """Write x (1, KV, T, hd) into a state; return the layer's M positions with a head for each query head: (1, H, M, hd).

        All layers share one state, so each layer updates the state that the previous layer's update returned.
        """
        mb, (_, heads, _, width) = self.mb, self.plan.state_shape
        first = mb.concat(values=[_ints(layer, 0), self.begin, _ints(0)], axis=0)
        last = mb.concat(values=[_ints(layer + 1, heads), self.end, _ints(width)], axis=0)
        written = mb.slice_update(x=self.caches[name], update=x, begin=first, end=last)
        self.caches[name] = mb.coreml_update_state(state=self.inputs[name], value=written)
        cache = self.of_layer(layer, self.caches[name])
        last = mb.concat(values=[_ints(1, heads), self.end, _ints(width)], axis=0)
        filled = mb.slice_by_index(x=cache, begin=[0, 0, 0, 0], end=last, end_mask=[True, True, False, True])
        groups = self.config.num_heads // heads
        if groups == 1:
            return filled
        spread = mb.tile(x=mb.expand_dims(x=filled, axes=[2]), reps=[1, 1, groups, 1, 1])
        return mb.reshape(x=spread, shape=[1, self.config.num_heads, -1, width])


def _ints(*values: int) -> Array:
    """Return an i32 array, which coremltools turns into a constant."""
    return np.array(values, np.int32)
