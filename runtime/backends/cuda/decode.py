"""Decoding on a card: one token's step in few launches, recorded once as a CUDA graph and replayed for every token.

A token reads every weight once and computes next to nothing, so that launching the kernels from Python would take longer than
running them. A graph replays the same launches on the same memory. The token and its position are therefore read from the card,
and adapters are copied (in the model's dtype) as they are now: after an adapter has changed, make a new decoder.

Graphs are unverified on a card; the tests run the step itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from edgetune.runtime.backends.cuda import kernels
from edgetune.runtime.backends.cuda.elementwise import rms_norm, swiglu
from edgetune.runtime.backends.cuda.weights import multiply, takes_rows
from edgetune.runtime.nf4 import QuantizedTensor
from edgetune.runtime.ops_types import DecoderBlock, DecoderCache, DecoderLinear, DecoderModel, DecodeStep

SPLIT_KEYS = 64
"""Keys that one program attends to at the longest context; chosen by hand."""
MAX_SPLITS = 32
"""Largest number of programs among which the keys of one head are split; chosen by hand."""
KEYS_AT_ONCE = 32
"""Keys that a program of attend_part holds at a time; chosen by hand."""
A_ROWS, A_COLUMNS = 1, 4096
"""Rows of lora_A that a program multiplies and columns that it holds at a time: A is wide and has few rows."""


class _Group:
    """Linears that share an input: their weights and biases, their lora_A times the scale as one matrix, their lora_B."""

    def __init__(self, linears: Sequence[DecoderLinear], dtype: torch.dtype) -> None:
        self.weights: list[QuantizedTensor] = []
        self.biases: list[Tensor | None] = []
        self.b: list[Tensor | None] = []
        scaled_a: list[Tensor] = []
        for linear in linears:
            parts = linear.parts()
            if not isinstance(parts.weight, QuantizedTensor) or not takes_rows(parts.weight):
                raise ValueError(f"a linear is {tuple(parts.weight.shape)}; expected 4 bits in rows of whole blocks")
            self.weights.append(parts.weight)
            self.biases.append(parts.bias)
            self.b.append(None if parts.lora_B is None else parts.lora_B.to(dtype).contiguous())
            if parts.lora_A is not None:
                scaled_a.append((parts.lora_A * parts.scale).to(dtype))
        self.a = torch.cat(scaled_a).contiguous() if scaled_a else None

    def __call__(self, x: Tensor, out: Tensor, add: bool = False) -> Tensor:
        """Write the products of x (1, in) f32 into out (1, sum of outputs) f32, side by side; `add`: add them to it instead."""
        reduced = self._reduced(x)
        column = offset = 0
        for weight, bias, b in zip(self.weights, self.biases, self.b, strict=True):
            part = out[:, column : column + weight.shape[0]]
            column += weight.shape[0]
            if b is None or reduced is None:
                multiply(x, weight, part, bias, add=add)
            else:
                multiply(x, weight, part, bias, reduced[:, offset : offset + b.shape[1]], b, add)
                offset += b.shape[1]
        return out

    def _reduced(self, x: Tensor) -> Tensor | None:
        """Return x A^T (1, sum of ranks) f32 of all adapters, in one launch; None where there is no adapter."""
        if self.a is None:
            return None
        rows, width = self.a.shape
        reduced = torch.empty(1, rows, dtype=torch.float32, device=x.device)
        tile = min(triton.next_power_of_2(width), A_COLUMNS)
        kernels.dense_matvec[(triton.cdiv(rows, A_ROWS),)](x, self.a, reduced, rows, width, ROWS=A_ROWS, TILE=tile)
        return reduced


class _Layer:
    """One transformer layer: its groups of linears, norms and share of the KV cache."""

    def __init__(self, block: DecoderBlock, keys: Tensor, values: Tensor, dtype: torch.dtype) -> None:
        self.qkv = _Group((block.q_proj, block.k_proj, block.v_proj), dtype)
        self.o = _Group((block.o_proj,), dtype)
        self.gate_up = _Group((block.gate_proj, block.up_proj), dtype)
        self.down = _Group((block.down_proj,), dtype)
        self.attn_norm, self.mlp_norm = block.attn_norm, block.mlp_norm
        self.q_norm, self.k_norm = block.q_norm, block.k_norm
        self.keys, self.values = keys, values
        self.window, self.scale = block.window, block.scale


class Decoder:
    """The decoding of one sequence: `decoder(token)` returns the logits (V,) of the next token and extends the cache.

    Raises ValueError for linears that are not in 4 bits or whose rows are not whole blocks, and for layers that are not Llama's.
    """

    def __init__(self, model: DecoderModel, cache: DecoderCache) -> None:
        if not model.config.has_llama_layers:
            raise ValueError(f"layers of {model.config.model_type}; expected Llama's")
        self.model, self.cache = model, cache
        layers = zip(model.blocks, cache.k, cache.v, strict=True)
        self.layers = [_Layer(block, keys, values, model.dtype) for block, keys, values in layers]
        rotation = model.rotations(torch.arange(cache.max_length))[0]
        assert rotation is not None
        self.cos, self.sin = rotation.k_cos, rotation.k_sin
        self.token = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, dtype=torch.int32, device=model.device)
        self.splits = min(triton.cdiv(cache.max_length, SPLIT_KEYS), MAX_SPLITS)
        self._records = model.device.type == "cuda"
        self._graph: Any = None
        self._logits: Tensor | None = None

    def __call__(self, token: int) -> Tensor:
        """Run the token that follows those in the cache; return logits (V,) of the next in the model's dtype."""
        at = self.cache.length
        if at >= self.cache.max_length:
            raise ValueError(f"the KV cache holds {self.cache.max_length} tokens; {at + 1} were to be stored")
        self.token.fill_(token)
        self.position.fill_(at)
        logits = self._replayed() if self._records else self.run()
        self.cache.length += 1
        return logits

    def _replayed(self) -> Tensor:
        """Run the step by its graph, which the first call records."""
        if self._graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            # A run before the recording: while recording, Triton may not compile kernels, nor torch copy constants to the card.
            with torch.cuda.stream(side):
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
        """Run the token and position that lie on the card; return logits (V,). Running it again changes nothing."""
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
        """Store k and v of qkv (1, (H + 2 KV) hd) in the cache; return attention's output (1, H hd)."""
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
            layer.scale, self.splits, WINDOW=layer.window is not None, KEYS=KEYS_AT_ONCE, TILE=tile,
        )  # fmt: skip
        out = qkv.new_empty(1, heads * size)
        kernels.attend_whole[(heads,)](
            sums, tops, parts, out, size, self.splits, SPLITS_TILE=triton.next_power_of_2(self.splits), TILE=tile
        )
        return out


def decoder(model: DecoderModel, cache: DecoderCache) -> DecodeStep | None:
    """Return `step(token) -> logits (V,)` for this model and cache, or None where the kernels cannot run it."""
    try:
        return Decoder(model, cache)
    except ValueError:
        return None
