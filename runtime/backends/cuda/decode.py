"""Decoding on a card: one token's step as few launches, recorded once as a CUDA graph and replayed for every token.

A token reads every weight once and computes next to nothing, so that launches from Python would take longer than the work.
A graph replays the same launches on the same memory: the token and its position are therefore read from the card, and the
adapters are copied (in the model's dtype) as they are now: after one has changed, make a new decoder.

Graphs are unverified on a card; the step itself runs in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from edgetune.runtime.backends.cuda import kernels
from edgetune.runtime.backends.cuda.elementwise import rms_norm, swiglu
from edgetune.runtime.backends.cuda.weights import multiply, takes_rows
from edgetune.runtime.nf4 import QuantizedTensor

if TYPE_CHECKING:  # what a back end runs, not what it is made of
    from edgetune.runtime.lora import AnyLinear
    from edgetune.runtime.model import Block, KVCache, Llama

SPLIT_KEYS, MOST_SPLITS = 64, 32
"""Keys of the longest context that one program attends to, and programs a head at most."""
_KEYS = 32  # keys that a program holds at a time
_A_ROWS, _A_COLUMNS = 1, 4096  # what a program makes of A x, and how much of x it holds at a time: A is wide, of few rows


class _Group:
    """Linears that share an input: weights and biases as they lie, their A's (times the scale) as one matrix, their B's."""

    def __init__(self, linears: Sequence[AnyLinear], dtype: torch.dtype) -> None:
        bases: list[Any] = [getattr(linear, "base", linear) for linear in linears]
        for base in bases:
            if not isinstance(base.weight, QuantizedTensor) or not takes_rows(base.weight):
                raise ValueError(f"a linear is {tuple(base.weight.shape)}; expected 4 bits in rows of whole blocks")
        self.weights = [base.weight for base in bases]
        self.biases = [base.bias for base in bases]
        self.a: Tensor | None = None
        self.b: list[Tensor | None] = []
        parts = []
        for linear, base in zip(linears, bases, strict=True):
            adapted: Any = None if linear is base else linear
            self.b.append(None if adapted is None else adapted.lora_B.detach().to(dtype).contiguous())
            if adapted is not None:
                parts.append((adapted.lora_A.detach() * adapted.scale).to(dtype))
        if parts:
            self.a = torch.cat(parts).contiguous()

    def __call__(self, x: Tensor, out: Tensor, add: bool = False) -> Tensor:
        """out (1, sum of outputs) f32 = the products of x (1, in) f32, side by side; `add`: added to what it holds."""
        reduced = self._reduced(x)
        column = place = 0
        for weight, bias, b in zip(self.weights, self.biases, self.b, strict=True):
            part = out[:, column : column + weight.shape[0]]
            column += weight.shape[0]
            if b is None or reduced is None:
                multiply(x, weight, part, bias, add=add)
            else:
                multiply(x, weight, part, bias, reduced[:, place : place + b.shape[1]], b, add)
                place += b.shape[1]
        return out

    def _reduced(self, x: Tensor) -> Tensor | None:
        """x A^T (1, sum of ranks) f32 of all adapters in one launch."""
        if self.a is None:
            return None
        rows, width = self.a.shape
        reduced = torch.empty(1, rows, dtype=torch.float32, device=x.device)
        tile = min(triton.next_power_of_2(width), _A_COLUMNS)
        kernels.dense_matvec[(triton.cdiv(rows, _A_ROWS),)](x, self.a, reduced, rows, width, ROWS=_A_ROWS, TILE=tile)
        return reduced


class _Layer:
    """A block's groups and what else its step reads."""

    def __init__(self, block: Block, cache: KVCache, dtype: torch.dtype) -> None:
        self.qkv = _Group((block.q_proj, block.k_proj, block.v_proj), dtype)
        self.o = _Group((block.o_proj,), dtype)
        self.gate_up = _Group((block.gate_proj, block.up_proj), dtype)
        self.down = _Group((block.down_proj,), dtype)
        self.attn_norm, self.mlp_norm = block.attn_norm, block.mlp_norm
        self.q_norm, self.k_norm = block.q_norm, block.k_norm
        self.keys, self.values = cache.k[block.layer], cache.v[block.layer]
        self.window, self.scale = block.window, block.scale


class Decoder:
    """One sequence's decoding: `decoder(token)` -> logits (V,) of the next, the cache growing by one.

    Raises ValueError for linears that are not in 4 bits or whose rows are not whole blocks.
    """

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        blocks: Any = model.blocks
        self.layers = [_Layer(block, cache, model.dtype) for block in blocks]
        self.cos, self.sin = model.rope(torch.arange(cache.max_length))
        self.token = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, dtype=torch.int32, device=model.device)
        self.splits = min(triton.cdiv(cache.max_length, SPLIT_KEYS), MOST_SPLITS)
        self._records = model.device.type == "cuda"
        self._graph: Any = None
        self._logits: Tensor | None = None

    def __call__(self, token: int) -> Tensor:
        """The token after those in the cache -> logits (V,) in the model's dtype."""
        at = self.cache.length
        if at >= self.cache.max_length:
            raise ValueError(f"the KV cache holds {self.cache.max_length} tokens; {at + 1} were to be stored")
        self.token.fill_(token)
        self.position.fill_(at)
        logits = self._replayed() if self._records else self.run()
        self.cache.length += 1
        return logits

    def _replayed(self) -> Tensor:
        """The step by its graph, which the first call records."""
        if self._graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # a recording may neither compile kernels nor copy constants to the card
                self.run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads may allocate meanwhile
                self._logits = self.run()
        self._graph.replay()
        assert self._logits is not None
        return self._logits.clone()  # the next replay writes over it

    @torch.no_grad()
    def run(self) -> Tensor:
        """The step of the token and position that lie on the card -> logits (V,); running it twice changes nothing."""
        model, config = self.model, self.model.config
        h = model.embed(self.token).float()
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        for layer in self.layers:
            qkv = layer.qkv(rms_norm(h, layer.attn_norm, config.rms_norm_eps), h.new_empty(1, width))
            layer.o(self._attend(layer, qkv), h, add=True)
            x = rms_norm(h, layer.mlp_norm, config.rms_norm_eps)
            gate, up = layer.gate_up(x, h.new_empty(1, 2 * config.intermediate_size)).chunk(2, dim=1)
            layer.down(swiglu(gate, up), h, add=True)
        return model.logits(h.to(model.dtype))[0]

    def _attend(self, layer: _Layer, qkv: Tensor) -> Tensor:
        """qkv (1, (H + 2 KV) hd) -> attention's output (1, H hd); k and v go into the cache."""
        config = self.model.config
        heads, kv, size, longest = config.num_heads, config.num_kv_heads, config.head_dim, self.cache.max_length
        kernels.rotate_and_store[(heads + 2 * kv,)](
            qkv, layer.q_norm, layer.k_norm, self.cos, self.sin, self.position, layer.keys, layer.values, heads, kv,
            size // 2, longest, config.rms_norm_eps, NORM=layer.q_norm is not None, TILE=triton.next_power_of_2(size // 2),
        )  # fmt: skip
        parts = qkv.new_empty(heads, self.splits, size)
        sums, tops = qkv.new_empty(heads, self.splits), qkv.new_empty(heads, self.splits)
        tile = triton.next_power_of_2(size)
        kernels.attend_part[(heads, self.splits)](
            qkv, layer.keys, layer.values, self.position, sums, tops, parts, heads // kv, longest, size, layer.window or 0,
            layer.scale, self.splits, WINDOW=layer.window is not None, KEYS=_KEYS, TILE=tile,
        )  # fmt: skip
        out = qkv.new_empty(1, heads * size)
        kernels.attend_whole[(heads,)](
            sums, tops, parts, out, size, self.splits, SPLITS_TILE=triton.next_power_of_2(self.splits), TILE=tile
        )
        return out


def decoder(model: Llama, cache: KVCache) -> Decoder | None:
    """`step(token) -> logits (V,)` for this model and cache; None where the kernels cannot run it."""
    try:
        return Decoder(model, cache)
    except ValueError:
        return None
