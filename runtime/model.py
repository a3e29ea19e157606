"""Define Llama: one decoder for LLaMA 1-3.2, TinyLlama, SmolLM2, Mistral, Qwen2/2.5 and Qwen3.

The shape legend of the whole engine:

    N   tokens in a packed batch (documents side by side)                D   hidden_size
    H   query heads          KV  key/value heads          hd  head_dim   F   intermediate_size
    V   vocabulary           M   keys that a query may see (N, or the cache's length)      r   LoRA rank

A batch holds one or more documents; `segments` say which tokens belong to which, and positions restart in each. All weights
but the adapters' are frozen. A block is forward(h, ctx) -> h; only runner.py loops over blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.runtime import ops, vocabulary
from edgetune.runtime.config import LINEARS, LlamaConfig, RopeConfig
from edgetune.runtime.linear import AnyLinear, Linear
from edgetune.runtime.names import ATTENTION_NORM, K_NORM, MLP_NORM, Q_NORM, hf_linear_name
from edgetune.runtime.ops_types import AttentionGradients, AttentionInputs, Segment, Weight
from edgetune.runtime.pager import Pager, Resident
from edgetune.runtime.project import Identity, Norm, ProjectPlan, SwiGlu, project
from edgetune.runtime.vocabulary import Embedding, Head, StoredRows


class KVCache:
    """The keys and values of one sequence: for each layer k, v (KV, max_length, hd), of which `length` positions are filled."""

    def __init__(self, config: LlamaConfig, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_kv_heads, max_length, config.head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.max_length, self.length = max_length, 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (N, KV, hd) after the filled positions; return all keys and values as (M, KV, hd) views.

        Runner.infer updates `length` once all layers have appended. Raises ValueError for tokens beyond `max_length`.
        """
        end = self.length + k.shape[0]
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens; {end} were to be stored")
        self.k[layer][:, self.length : end] = k.transpose(0, 1)
        self.v[layer][:, self.length : end] = v.transpose(0, 1)
        return self.k[layer][:, :end].transpose(0, 1), self.v[layer][:, :end].transpose(0, 1)


@dataclass(frozen=True)
class Context:
    """The inputs of a block beside its hidden state; cos and sin (N, hd/2) are f32."""

    cos: Tensor
    sin: Tensor
    segments: Sequence[Segment]
    plan: ProjectPlan
    cache: KVCache | None = None


def rope_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return RoPE's angle per position, f64 (hd/2,). RoFormer (arXiv 2104.09864); llama3 scaling as released with Llama 3.1."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = 1.0 / (torch.tensor(config.theta, dtype=torch.float64) ** exponents)
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = config.low_freq_factor, config.high_freq_factor
        smooth = ((config.original_max_positions / wavelengths - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * frequencies / config.factor + smooth * frequencies
    return frequencies


class Block(nn.Module):
    """One transformer layer: attention and SwiGLU, each after an RMSNorm and inside a residual."""

    attn_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    q_proj: AnyLinear
    k_proj: AnyLinear
    v_proj: AnyLinear
    o_proj: AnyLinear
    gate_proj: AnyLinear
    up_proj: AnyLinear
    down_proj: AnyLinear

    def __init__(self, config: LlamaConfig, layer: int, tensors: dict[str, Weight]) -> None:
        """Take the layer's tensors by Hugging Face's names inside a layer, such as "self_attn.q_proj.weight"."""
        super().__init__()
        self.config, self.layer = config, layer
        dense = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        self.attn_norm, self.mlp_norm = dense[ATTENTION_NORM], dense[MLP_NORM]
        self.q_norm, self.k_norm = dense.get(Q_NORM), dense.get(K_NORM)
        for name in LINEARS:
            path = hf_linear_name(name)
            self.add_module(name, Linear(tensors[f"{path}.weight"], dense.get(f"{path}.bias")))
        self.scale = 1.0 / math.sqrt(config.head_dim)

    def linears(self) -> dict[str, AnyLinear]:
        """Return the seven linears by name."""
        return {name: getattr(self, name) for name in LINEARS}

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """Run the layer on h (N, D); return (N, D)."""
        plan, eps = ctx.plan, self.config.rms_norm_eps
        # In a recomputation (values=False) the backward needs the values of every product but the last.
        inner = replace(plan, values=True)
        qkv = project(h, Norm(self.attn_norm, eps), (self.q_proj, self.k_proj, self.v_proj), inner)
        h = h + project(self.attend(qkv, ctx), Identity(), (self.o_proj,), inner.numbered(3))
        gate_up = project(h, Norm(self.mlp_norm, eps), (self.gate_proj, self.up_proj), inner.numbered(4))
        return h + project(gate_up, SwiGlu(), (self.down_proj,), plan.numbered(6))

    def attend(self, qkv: Tensor, ctx: Context) -> Tensor:
        """Run attention on qkv (N, (H + 2 KV) hd), which is rotated in place; return (N, H hd)."""
        if torch.is_grad_enabled():
            return _Attend.apply(qkv, self, ctx)
        q, k, v = self.split_heads(qkv)
        q, k = self.rotate(q, k, ctx)
        if ctx.cache is not None:
            k, v = ctx.cache.append(self.layer, k, v)
        return ops.attention_forward(AttentionInputs(q, k, v, ctx.segments, self.window, self.scale))[0].flatten(1)

    @property
    def window(self) -> int | None:
        """Return the number of keys that a query of this layer sees, its own included; None for all."""
        return self.config.windows[self.layer]

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views q (N, H, hd), k and v (N, KV, hd) of qkv (N, (H + 2 KV) hd)."""
        heads, kv = self.config.num_heads, self.config.num_kv_heads
        return qkv.view(qkv.shape[0], heads + 2 * kv, self.config.head_dim).split((heads, kv, kv), dim=1)

    def rotate(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Apply the per-head norm where the model has one, then RoPE; without a norm q and k are changed in place."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._head_norm(q, self.q_norm), self._head_norm(k, self.k_norm)
        return ops.rope_(q, ctx.cos, ctx.sin), ops.rope_(k, ctx.cos, ctx.sin)

    def _head_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x.reshape(-1, x.shape[2]), weight, self.config.rms_norm_eps).view(x.shape)

    def head_norm_backward(self, dx: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the per-head norm's input x, given dx of its output; all (N, heads, hd)."""
        flat = dx.reshape(-1, x.shape[2]), x.reshape(-1, x.shape[2])
        return ops.rms_norm_backward(*flat, weight, self.config.rms_norm_eps).view(x.shape)


class _Attend(torch.autograd.Function):
    """Per-head norm, RoPE and attention as one node of autograd; it rotates the qkv buffer in place and saves it."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, block: Block, context: Context) -> Tensor:
        q, k, v = block.split_heads(qkv.detach())
        raw = (q, k) if block.q_norm is not None else ()
        q, k = block.rotate(q, k, context)
        o, lse = ops.attention_forward(AttentionInputs(q, k, v, context.segments, block.window, block.scale))
        ctx.block, ctx.context = block, context
        ctx.save_for_backward(q, k, v, o, lse, *raw)
        return o.flatten(1)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        block, context = ctx.block, ctx.context
        q, k, v, o, lse, *raw = ctx.saved_tensors
        # The three gradients are views of one buffer, so that the projection's backward reads them as one matrix.
        gradient = do.new_empty(do.shape[0], (q.shape[1] + 2 * k.shape[1]) * q.shape[2])
        dq, dk, dv = block.split_heads(gradient)
        inputs = AttentionInputs(q, k, v, context.segments, block.window, block.scale)
        ops.attention_backward(inputs, o, lse, do.view(q.shape), AttentionGradients(dq, dk, dv))
        ops.rope_(dq, context.cos, context.sin, inverse=True)
        ops.rope_(dk, context.cos, context.sin, inverse=True)
        if raw:
            dq.copy_(block.head_norm_backward(dq, raw[0], block.q_norm))
            dk.copy_(block.head_norm_backward(dk, raw[1], block.k_norm))
        return gradient, None, None


class Llama(nn.Module):
    """A whole model: embedding (V, D), blocks, final norm and head (V, D); tied models share one tensor for both ends."""

    blocks: Sequence[Block]

    def __init__(
        self,
        config: LlamaConfig,
        embedding: Embedding,
        blocks: list[Block],
        norm: Tensor,
        head: Head,
        dtype: torch.dtype,
        pager: Pager | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding, self.norm, self.head = embedding, norm, head
        self.pager = pager or Resident()
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.frequencies = rope_frequencies(config.rope, config.head_dim)

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def whole(self) -> bool:
        """Return True if every weight stays in memory: none is read from its file while the model runs."""
        return not (self.pager.streaming or any(isinstance(weight, StoredRows) for weight in (self.embedding, self.head)))

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute in another dtype from now on; quantised weights are not changed."""
        self.dtype = dtype
        if isinstance(self.head, Tensor):
            self.head = self.head.to(dtype)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up input_ids (N,); return h (N, D) in the compute dtype."""
        return vocabulary.rows(self.embedding, input_ids, self.dtype)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin (N, hd/2) f32 of positions (N,)."""
        # In f64, since the angles of far positions are large, and on the CPU, since MPS has no f64.
        angles = positions.cpu().double().unsqueeze(1) * self.frequencies
        return angles.cos().float().to(self.device), angles.sin().float().to(self.device)

    def logits(self, h: Tensor) -> Tensor:
        """Apply the final norm and the head to the last block's output h (N, D); return logits (N, V) in the compute dtype."""
        return vocabulary.logits(ops.rms_norm(h, self.norm, self.config.rms_norm_eps), self.head)
