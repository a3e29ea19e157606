"""Decoding on the CPU: fused NF4 products for a few tokens, and a `Decoder` that runs a whole step in one call.

A token of decoding reads every weight once, so it costs what memory bandwidth costs, if nothing is added: the kernels read
packed weights where they lie, and Python builds the structs that point at them once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgetune.runtime import int8
from edgetune.runtime.backends.cpu.library import kernel
from edgetune.runtime.backends.cpu.structures import Absmax, DecodeBlock, DecodeJob, DecodeLinear, DecodeShape
from edgetune.runtime.int8 import Int8Rows
from edgetune.runtime.nf4 import QuantizedTensor, code_table
from edgetune.runtime.vocabulary import StoredRows

if TYPE_CHECKING:  # what a back end runs, not what it is made of
    from edgetune.runtime.lora import AnyLinear
    from edgetune.runtime.model import Block, KVCache, Llama

MAX_TOKENS = 8
COMPUTE = {"f32": 0, "bf16": 1, "int8": 2}
"""How NF4 products are computed: exact but for fp32 sums; weights and activations in bf16 (where the machine multiplies
bf16, else f32); weights and activations in 8 bits, a scale for each 64 (error of a product about 8e-3)."""

_PANEL = 32  # matvec.inl's PANEL
_KIND = {torch.bfloat16: 1, torch.float32: 2}  # matvec.inl's Kind; 0 is NF4
_INT8 = 3


def _require(condition: bool, message: str, *values: Any) -> None:
    if not condition:
        raise ValueError(message.format(*values))


def _address(x: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Address of a contiguous CPU tensor of exactly this shape and dtype."""
    found, expected = (tuple(x.shape), x.dtype, x.device.type), (tuple(shape), dtype, "cpu")
    _require(found == expected, "{} is {} {} on {}; expected {} {} on {}", name, *found, *expected)
    _require(x.is_contiguous(), "{} is not contiguous", name)
    return x.data_ptr()


def _aligned(size: int) -> Tensor:
    """u8 (size,), not initialised, at a multiple of 64 bytes."""
    whole = torch.empty(size + 64, dtype=torch.uint8)
    return whole[-whole.data_ptr() % 64 :][:size]


# ---- structs that point into our tensors ----


def _weight(weight: Tensor | QuantizedTensor | Int8Rows, name: str) -> DecodeLinear:
    """The struct of a weight (out, in) without bias and adapter; it points into the weight's own tensors."""
    _require(len(weight.shape) == 2, "{} is {}; expected a matrix", name, tuple(weight.shape))
    rows, cols = weight.shape
    if isinstance(weight, QuantizedTensor):
        return _quantized(weight, rows, cols, name)
    if isinstance(weight, Int8Rows):
        codes = _address(weight.codes, f"{name}'s codes", (rows, cols), torch.int8)
        scale = _address(weight.scale, f"{name}'s scale", (rows, 1), torch.float32)
        return DecodeLinear(kind=_INT8, rows=rows, cols=cols, weight=codes, codes=scale)
    _require(weight.dtype in _KIND, "{} is {}; expected bf16, f32, NF4 or 8-bit rows", name, weight.dtype)
    address = _address(weight, name, (rows, cols), weight.dtype)
    return DecodeLinear(kind=_KIND[weight.dtype], rows=rows, cols=cols, weight=address)


def _quantized(weight: QuantizedTensor, rows: int, cols: int, name: str) -> DecodeLinear:
    state, nested = weight.state, weight.state.nested
    size = state.block_size
    _require(size >= 2 and size % 2 == 0, "{} has blocks of {}; expected an even number", name, size)
    packed = _address(weight.packed, f"{name}'s codes", ((rows * cols + 1) // 2, 1), torch.uint8)
    count = -(-rows * cols // size)
    if nested is None:
        absmax = Absmax(plain=_address(state.absmax, f"{name}'s absmax", (count,), torch.float32))
    else:
        shift, many = nested.block_size.bit_length() - 1, nested.block_size
        _require(many == 1 << shift, "{} has nested blocks of {}; expected a power of two", name, many)
        absmax = Absmax(
            codes=_address(state.absmax, f"{name}'s absmax", (count,), torch.uint8),
            table=_address(nested.table, f"{name}'s nested table", (256,), torch.float32),
            nested=_address(nested.absmax, f"{name}'s nested absmax", (-(-count // many),), torch.float32),
            offset=nested.offset,
            shift=shift,
        )
    codes = code_table(state.quant_type).data_ptr()  # cached: it lives as long as the process
    return DecodeLinear(kind=0, rows=rows, cols=cols, weight=packed, codes=codes, absmax=absmax, block_size=size)


def _panels(b: Tensor) -> Tensor:
    """lora_B (out, r) -> (ceil(out / 32), r, 32), so that 32 rows' parts of a column lie together; zeros beyond out."""
    out, rank = b.shape
    padded = torch.nn.functional.pad(b, (0, 0, 0, -out % _PANEL))
    return padded.view(-1, _PANEL, rank).transpose(1, 2).contiguous()


class Decoder:
    """One sequence's decoding: all blocks, final norm and head in one call of the kernels.

    It points into the model's weights and the cache's tensors, which it keeps alive, and holds copies of the adapters (in
    the model's dtype) and norms as they are now: after an adapter has changed, make a new one.
    """

    def __init__(self, model: Llama, cache: KVCache) -> None:
        """Products are computed in f32 for an f32 model and in int8 otherwise.

        Raises ValueError for what the kernels cannot run.
        """
        config = model.config
        self.model, self.cache = model, cache
        self._dtype = model.dtype if model.dtype in _KIND else torch.float32
        compute = COMPUTE["f32" if self._dtype == torch.float32 else "int8"]
        self._kept: list[Any] = [model, cache]
        cos, sin = model.rope(torch.arange(cache.max_length))
        half = (cache.max_length, config.head_dim // 2)
        kind = cache.k[0].dtype
        _require(kind in _KIND, "the KV cache is {}; expected bf16 or f32", kind)
        self._shape = DecodeShape(
            config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
            cache.max_length, int(kind == torch.bfloat16), compute, config.rms_norm_eps,
            config.head_dim**-0.5, self._keep(cos, "cos", half), self._keep(sin, "sin", half),
        )  # fmt: skip
        blocks: Any = model.blocks
        self._blocks = (DecodeBlock * config.num_layers)(*(self._block(block, layer) for layer, block in enumerate(blocks)))
        self._norm = self._keep(model.norm.float(), "norm", (config.hidden_size,))
        assert not isinstance(model.head, StoredRows)  # such a model is not `whole`
        self._head = self._frozen(model.head, None, "head", config.vocab_size, config.hidden_size)
        self._space, self._space_for = torch.empty(0), (0, 0)
        self._own = 0

    def _keep(self, x: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Address of a tensor that lives as long as the decoder."""
        x = x.detach().contiguous()
        self._kept.append(x)
        return _address(x, name, shape, dtype)

    def _frozen(
        self, weight: Tensor | QuantizedTensor | Int8Rows, bias: Tensor | None, name: str, rows: int, cols: int
    ) -> DecodeLinear:
        found = tuple(weight.shape)
        _require(found == (rows, cols), "{} is {}; expected {}", name, found, (rows, cols))
        self._kept.append(weight)
        struct = _weight(weight, name)
        if bias is not None:
            struct.bias = self._keep(bias.float(), f"{name}'s bias", (rows,))
        return struct

    def _linear(self, linear: AnyLinear, name: str, rows: int, cols: int) -> DecodeLinear:
        base: Any = getattr(linear, "base", linear)
        struct = self._frozen(base.weight, base.bias, name, rows, cols)
        if base is linear:
            return struct
        adapted: Any = linear
        a, b = (adapted.lora_A.detach() * adapted.scale).to(self._dtype), adapted.lora_B.detach().to(self._dtype)
        rank = a.shape[0]
        _require(b.shape == (rows, rank), "{}'s lora_B is {}; expected {}", name, tuple(b.shape), (rows, rank))
        struct.rank, struct.lora_kind = rank, _KIND[self._dtype]
        struct.lora_A = self._keep(a, f"{name}'s lora_A", (rank, cols), self._dtype)
        struct.lora_B = self._keep(_panels(b), f"{name}'s lora_B", (-(-rows // _PANEL), rank, _PANEL), self._dtype)
        return struct

    def _block(self, block: Block, layer: int) -> DecodeBlock:
        c = self.model.config
        d, f, name = c.hidden_size, c.intermediate_size, f"layer {layer}'s "
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        cache_shape, cache_dtype = (c.num_kv_heads, self.cache.max_length, c.head_dim), self.cache.k[0].dtype
        head_norms = {
            key: self._keep(weight.float(), name + key, (c.head_dim,))
            for key, weight in (("q_norm", block.q_norm), ("k_norm", block.k_norm))
            if weight is not None
        }
        return DecodeBlock(
            self._linear(block.q_proj, name + "q_proj", q, d),
            self._linear(block.k_proj, name + "k_proj", kv, d),
            self._linear(block.v_proj, name + "v_proj", kv, d),
            self._linear(block.o_proj, name + "o_proj", d, q),
            self._linear(block.gate_proj, name + "gate_proj", f, d),
            self._linear(block.up_proj, name + "up_proj", f, d),
            self._linear(block.down_proj, name + "down_proj", d, f),
            attn_norm=self._keep(block.attn_norm.float(), name + "attn_norm", (d,)),
            mlp_norm=self._keep(block.mlp_norm.float(), name + "mlp_norm", (d,)),
            keys=_address(self.cache.k[layer], name + "keys", cache_shape, cache_dtype),
            values=_address(self.cache.v[layer], name + "values", cache_shape, cache_dtype),
            window=block.window or 0,
            **head_norms,
        )

    # ---- running ----

    def __call__(self, token: int) -> Tensor:
        """The token after those in the cache -> logits (V,) f32; the cache grows by one."""
        h = self.model.embed(torch.tensor([token])).float()
        logits = self.run(h, self.cache.length)
        self.cache.length += 1
        return logits[0]

    def run(self, h: Tensor, position: int) -> Tensor:
        """h (n <= 8, D) f32, embedded tokens, becomes the last block's output in place -> logits (n, V) f32.

        Their keys and values go into the cache from `position` on; the cache's `length` is the caller's.
        """
        n, threads = h.shape[0], torch.get_num_threads()
        _require(1 <= n <= MAX_TOKENS, "h has {} tokens; expected 1 to {}", n, MAX_TOKENS)
        _require(
            position >= 0 and position + n <= self.cache.max_length,
            "{} tokens at {} do not fit a KV cache of {}", n, position, self.cache.max_length,
        )  # fmt: skip
        self._reserve(n, threads)
        logits = torch.empty(n, self._head.rows)
        job = DecodeJob(
            ctypes.addressof(self._shape), ctypes.addressof(self._blocks), len(self._blocks), self._norm,
            ctypes.addressof(self._head), logits.data_ptr(), _address(h, "h", (n, self._shape.hidden), torch.float32), n,
            position, self._space.data_ptr(), self._own,
        )  # fmt: skip
        kernel("decode", "pi")(ctypes.addressof(job), threads)
        return logits

    def _reserve(self, n: int, threads: int) -> None:
        """Working memory for n tokens and that many threads, kept from step to step."""
        if self._space_for == (n, threads):
            return
        sizes, blocks = (ctypes.c_int64 * 2)(), self._blocks
        kernel("decode_space", "pplllp")(
            ctypes.addressof(self._shape), ctypes.addressof(blocks), len(blocks), n, threads, ctypes.addressof(sizes)
        )
        self._space, self._own, self._space_for = _aligned(sizes[0]), sizes[1], (n, threads)


def decoder(model: Llama, cache: KVCache) -> Decoder | None:
    """`step(token) -> logits (V,)` for this model and cache; None where the kernels cannot run it (fp16 weights)."""
    try:
        return Decoder(model, cache)
    except ValueError:
        return None


def int8_rows(weight: Tensor) -> Int8Rows:
    """A dense (V, D) in 8 bits: int8.quantize's bits."""
    if weight.dtype not in _KIND or not weight.is_contiguous():
        return int8.quantize(weight)
    rows, cols = weight.shape
    small = Int8Rows(torch.empty(rows, cols, dtype=torch.int8), torch.empty(rows, 1))
    kernel(f"int8_rows_{'bf16' if weight.dtype == torch.bfloat16 else 'f32'}", "pllppi")(
        weight.data_ptr(), rows, cols, small.codes.data_ptr(), small.scale.data_ptr(), torch.get_num_threads()
    )
    return small


def int8_matvec(x: Tensor, weight: Int8Rows) -> Tensor:
    """x (n, in) bf16 or f32 -> x W^T (n, out) in x's dtype, computed in fp32."""
    return matvec(x, weight)


def matvec(x: Tensor, quantized: QuantizedTensor | Int8Rows, compute: str | None = None) -> Tensor:
    """x (n, in) bf16 or f32 -> x W^T (n, out) in x's dtype, 8 rows at a time.

    compute: of `COMPUTE`, for NF4; None takes f32 for f32 and bf16 for bf16. 8-bit rows are computed in fp32.
    """
    found = (tuple(x.shape), x.dtype, x.device.type)
    fits = x.dim() == 2 and x.dtype in _KIND and x.device.type == "cpu"
    _require(fits, "x is {} {} on {}; expected (n, in) bf16 or f32 on cpu", *found)
    _require(x.shape[1] == quantized.shape[1], "x has {} features; the weight takes {}", x.shape[1], quantized.shape[1])
    how = COMPUTE["f32" if isinstance(quantized, Int8Rows) else compute or ("f32" if x.dtype == torch.float32 else "bf16")]
    weight = _weight(quantized, "the weight")
    activations = x.detach().float().contiguous()
    y = torch.empty(x.shape[0], weight.rows)
    size = ctypes.c_int64()
    kernel("matvec_space", "lp")(weight.cols, ctypes.addressof(size))
    space = _aligned(min(len(x), MAX_TOKENS) * size.value)
    for start in range(0, len(x), MAX_TOKENS):
        rows = activations[start : start + MAX_TOKENS]
        kernel("matvec", "plplppi")(
            ctypes.addressof(weight), how, rows.data_ptr(), len(rows), y[start:].data_ptr(), space.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    return y.to(x.dtype)
