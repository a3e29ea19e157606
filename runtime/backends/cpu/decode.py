"""Decoding on the CPU: a `Decoder` runs one token through the whole model in one call of the kernels.

Each token reads every weight once, so at best it costs what memory bandwidth costs. The kernels read packed weights where they
lie, and Python builds the structures that point at them once for the whole sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from edgetune.runtime.backends.cpu.arguments import address, aligned, require
from edgetune.runtime.backends.cpu.library import kernel
from edgetune.runtime.backends.cpu.project import fuses
from edgetune.runtime.backends.cpu.structures import DecodeBlock, DecodeJob, DecodeLinear, DecodeShape
from edgetune.runtime.backends.cpu.weights import COMPUTE, DENSE_KIND, linear_structure
from edgetune.runtime.int8 import Int8Rows
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import (
    FEW_ROWS,
    DecoderBlock,
    DecoderCache,
    DecoderLinear,
    DecoderModel,
    DecodeStep,
    Rotation,
    Weight,
)

_PANEL = 32  # LORA_PANEL in constants.h


def _panels(b: Tensor) -> Tensor:
    """Lay lora_B (out, r) out as (ceil(out / 32), r, 32), padded with zeros, so that 32 rows of a column lie together."""
    out, rank = b.shape
    padded = torch.nn.functional.pad(b, (0, 0, 0, -out % _PANEL))
    return padded.view(-1, _PANEL, rank).transpose(1, 2).contiguous()


class Decoder:
    """The decoding of one sequence: all blocks, final norm and head in one call of the kernels.

    It points into the model's weights and the cache's tensors, and keeps them alive. Adapters (in the model's dtype) and
    norms are copied as they are now: after an adapter has changed, make a new decoder.
    """

    def __init__(self, model: DecoderModel, cache: DecoderCache, compute: str | None = None) -> None:
        """Point the structures at a model and a cache.

        compute: how products with 4-bit weights are computed, a key of `COMPUTE`. None takes int8, unless the model is in fp32
        on a machine that would by itself compute in bf16: then f32, since somebody asked for precision. Raises ValueError for
        a model that the kernels cannot run.
        """
        config = model.config
        self.model, self.cache = model, cache
        self._dtype = model.dtype if model.dtype in DENSE_KIND else torch.float32
        if compute is None:
            compute = "f32" if self._dtype == torch.float32 and not fuses(torch.float32) else "int8"
        self._kept: list[object] = [model, cache]
        """The objects that the structures point into: they must live as long as the decoder."""
        cache_dtype = cache.k[0].dtype
        require(cache_dtype in DENSE_KIND, "the KV cache is {}; expected bf16 or f32", cache_dtype)
        self._shape = DecodeShape(
            config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
            cache.max_length, int(cache_dtype == torch.bfloat16), COMPUTE[compute], config.rope.rotated(config.head_dim),
            int(config.activation == "gelu_tanh"), config.rms_norm_eps, config.score_scale, config.residual_scale,
        )  # fmt: skip
        self._tables: dict[int, dict[str, int]] = {}
        """The addresses of the tables of each Rotation, by its id: layers share them."""
        rotations = model.rotations(torch.arange(cache.max_length))
        self._kept.append(rotations)
        layers = zip(model.blocks, rotations, strict=True)
        blocks = [self._block(block, layer, rotation) for layer, (block, rotation) in enumerate(layers)]
        self._blocks = (DecodeBlock * config.num_layers)(*blocks)
        self._norm = self._keep(model.norm.float(), "norm", (config.hidden_size,))
        head = model.head
        if not isinstance(head, Tensor | QuantizedTensor | Int8Rows):
            raise ValueError(f"the head is a {type(head).__name__}; expected one that is in memory")
        self._head = self._frozen(head, None, "head", config.vocab_size, config.hidden_size)
        self._space, self._space_for, self._space_own = torch.empty(0), (0, 0), 0

    def _keep(self, x: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Keep a tensor alive as long as the decoder; return its address."""
        x = x.detach().contiguous()
        self._kept.append(x)
        return address(x, name, shape, dtype)

    def _frozen(self, weight: Weight, bias: Tensor | None, name: str, rows: int, cols: int) -> DecodeLinear:
        """Return the structure of a weight (rows, cols) and its bias, without an adapter."""
        found = tuple(weight.shape)
        require(found == (rows, cols), "{} is {}; expected {}", name, found, (rows, cols))
        self._kept.append(weight)
        struct = linear_structure(weight, name)
        if bias is not None:
            struct.bias = self._keep(bias.float(), f"{name}'s bias", (rows,))
        return struct

    def _linear(self, linear: DecoderLinear, name: str, rows: int, cols: int) -> DecodeLinear:
        """Return the structure of a linear (rows, cols) with its adapter, whose scale is multiplied into A."""
        parts = linear.parts()
        struct = self._frozen(parts.weight, parts.bias, name, rows, cols)
        if parts.lora_A is None or parts.lora_B is None:
            return struct
        a, b = (parts.lora_A * parts.scale).to(self._dtype), parts.lora_B.to(self._dtype)
        rank = a.shape[0]
        require(b.shape == (rows, rank), "{}'s lora_B is {}; expected {}", name, tuple(b.shape), (rows, rank))
        struct.rank, struct.lora_kind = rank, DENSE_KIND[self._dtype]
        struct.lora_A = self._keep(a, f"{name}'s lora_A", (rank, cols), self._dtype)
        struct.lora_B = self._keep(_panels(b), f"{name}'s lora_B", (-(-rows // _PANEL), rank, _PANEL), self._dtype)
        return struct

    def _rotation(self, rotation: Rotation | None) -> dict[str, int]:
        """Return the fields of a block that point to its rotation; none where it rotates nothing."""
        if rotation is None:
            return {}
        if id(rotation) not in self._tables:
            shape, names = (self.cache.max_length, self._shape.rotated // 2), ("q_cosines", "q_sines", "k_cosines", "k_sines")
            self._tables[id(rotation)] = {
                name: self._keep(table, name, shape) for name, table in zip(names, rotation, strict=True)
            }
        return self._tables[id(rotation)]

    def _block(self, block: DecoderBlock, layer: int, rotation: Rotation | None) -> DecodeBlock:
        """Return the structure of a layer and its share of the cache."""
        c = self.model.config
        d, f, name = c.hidden_size, c.intermediate_size, f"layer {layer}'s "
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        cache_shape, cache_dtype = (c.num_kv_heads, self.cache.max_length, c.head_dim), self.cache.k[0].dtype
        optional = {
            key: self._keep(weight.float(), name + key, (size,))
            for key, weight, size in (
                ("q_norm", block.q_norm, c.head_dim),
                ("k_norm", block.k_norm, c.head_dim),
                ("post_attn_norm", block.post_attn_norm, d),
                ("post_mlp_norm", block.post_mlp_norm, d),
            )
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
            keys=address(self.cache.k[layer], name + "keys", cache_shape, cache_dtype),
            values=address(self.cache.v[layer], name + "values", cache_shape, cache_dtype),
            window=block.window or 0,
            **optional,
            **self._rotation(rotation),
        )

    # ---- running ----

    def __call__(self, token: int) -> Tensor:
        """Run the token that follows those in the cache, which grows by one; return logits (V,) f32 of the next."""
        h = self.model.embed(torch.tensor([token])).float()
        logits = self.run(h, self.cache.length)
        self.cache.length += 1
        return logits[0]

    def run(self, h: Tensor, position: int) -> Tensor:
        """Run h (n <= FEW_ROWS, D) f32, embedded tokens, in place through all blocks; return logits (n, V) f32.

        Their keys and values go into the cache from `position` on. The caller updates the cache's `length`.
        """
        n, threads = h.shape[0], torch.get_num_threads()
        require(1 <= n <= FEW_ROWS, "h has {} tokens; expected 1 to {}", n, FEW_ROWS)
        require(
            position >= 0 and position + n <= self.cache.max_length,
            "{} tokens at {} do not fit a KV cache of {}", n, position, self.cache.max_length,
        )  # fmt: skip
        self._reserve(n, threads)
        logits = torch.empty(n, self._head.rows)
        job = DecodeJob(
            ctypes.addressof(self._shape), ctypes.addressof(self._blocks), len(self._blocks), self._norm,
            ctypes.addressof(self._head), logits.data_ptr(), address(h, "h", (n, self._shape.hidden), torch.float32), n,
            position, self._space.data_ptr(), self._space_own,
        )  # fmt: skip
        kernel("decode", "pi")(ctypes.addressof(job), threads)
        return logits

    def _reserve(self, n: int, threads: int) -> None:
        """Allocate working memory for n tokens and this number of threads, unless the last step's serves."""
        if self._space_for == (n, threads):
            return
        sizes, blocks = (ctypes.c_int64 * 2)(), self._blocks
        kernel("decode_space", "pplllp")(
            ctypes.addressof(self._shape), ctypes.addressof(blocks), len(blocks), n, threads, ctypes.addressof(sizes)
        )
        self._space, self._space_own, self._space_for = aligned(sizes[0]), sizes[1], (n, threads)


def decoder(model: DecoderModel, cache: DecoderCache) -> DecodeStep | None:
    """Return `step(token) -> logits (V,)` for this model and cache, or None where the kernels cannot run it (fp16 weights)."""
    try:
        return Decoder(model, cache)
    except ValueError:
        return None
