"""Define Llama: one decoder for every family of models. families.py says how each differs from Llama, as fields of LlamaConfig.

The shape legend of the whole engine:

    N   tokens in a packed batch (documents side by side)                D   hidden_size
    H   query heads          KV  key/value heads          hd  head_dim   F   intermediate_size
    V   vocabulary           M   keys that a query may see (N, or the cache's length)      r   LoRA rank

A batch holds one or more documents; `segments` say which tokens belong to which, and positions restart in each. All weights
but the adapters' are frozen. A block is forward(h, ctx) -> h; only runner.py loops over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.runtime import ops, vocabulary
from edgetune.runtime.config import LINEARS, LlamaConfig
from edgetune.runtime.linear import AnyLinear, Linear
from edgetune.runtime.names import (
    ATTENTION_NORM,
    K_NORM,
    MLP_NORM,
    POST_ATTENTION_NORM,
    POST_MLP_NORM,
    PRE_MLP_NORM,
    Q_NORM,
    hf_linear_name,
)
from edgetune.runtime.ops_types import AttentionGradients, AttentionInputs, Rotation, Segment, Weight
from edgetune.runtime.pager import Pager, Resident
from edgetune.runtime.project import GATED, Identity, Norm, ProjectPlan, project
from edgetune.runtime.rope import rotations
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
    """The inputs of a block beside its hidden state."""

    rotations: Sequence[Rotation | None]
    """Rotation of each layer; None for one that rotates nothing."""
    segments: Sequence[Segment]
    plan: ProjectPlan
    cache: KVCache | None = None


def norm_weight(weight: Tensor, config: LlamaConfig) -> Tensor:
    """Return a norm's weight as it is multiplied, in f32: as it is stored, plus the number that some families add."""
    return weight.float() + config.norm_offset if config.norm_offset else weight.float()


def final_norm_weight(weight: Tensor, config: LlamaConfig) -> Tensor:
    """Return the last norm's weight in f32, over the number that divides logits: a head of the quotient gives the same."""
    return norm_weight(weight, config) / config.logit_divisor


class Block(nn.Module):
    """One transformer layer: attention and a gated MLP, each after an RMSNorm and inside a residual."""

    attn_norm: Tensor
    mlp_norm: Tensor
    post_attn_norm: Tensor | None
    post_mlp_norm: Tensor | None
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
        four = config.post_norms
        self.attn_norm, self.mlp_norm = dense[ATTENTION_NORM], dense[PRE_MLP_NORM if four else MLP_NORM]
        self.post_attn_norm = dense[POST_ATTENTION_NORM] if four else None
        self.post_mlp_norm = dense[POST_MLP_NORM] if four else None
        self.q_norm, self.k_norm = dense.get(Q_NORM), dense.get(K_NORM)
        for name in LINEARS:
            path = hf_linear_name(name)
            self.add_module(name, Linear(tensors[f"{path}.weight"], dense.get(f"{path}.bias")))
        self.scale, self.gated = config.score_scale, GATED[config.activation]

    def linears(self) -> dict[str, AnyLinear]:
        """Return the seven linears by name."""
        return {name: getattr(self, name) for name in LINEARS}

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        """Run the layer on h (N, D); return (N, D)."""
        plan, eps = ctx.plan, self.config.rms_norm_eps
        # In a recomputation (values=False) the backward needs the values of every product but the last, and of that one too
        # where a norm follows it.
        inner = replace(plan, values=True)
        last = plan if self.post_mlp_norm is None else inner
        qkv = project(h, Norm(self.attn_norm, eps), (self.q_proj, self.k_proj, self.v_proj), inner)
        attended = project(self.attend(qkv, ctx), Identity(), (self.o_proj,), inner.numbered(3))
        h = self.add(h, attended, self.post_attn_norm)
        gate_up = project(h, Norm(self.mlp_norm, eps), (self.gate_proj, self.up_proj), inner.numbered(4))
        return self.add(h, project(gate_up, self.gated, (self.down_proj,), last.numbered(6)), self.post_mlp_norm)

    def add(self, h: Tensor, part: Tensor, norm: Tensor | None) -> Tensor:
        """Return the residual h plus `part`, both (N, D), which the model may norm and scale first."""
        if norm is not None:
            part = _RmsNorm.apply(part, norm, self.config.rms_norm_eps)
        scale = self.config.residual_scale
        return h + part if scale == 1.0 else h + part * scale

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
        """Apply the per-head norm where the model has one, then RoPE; without a norm q and k are changed in place.

        RoPE may rotate only the first numbers of each head, or nothing.
        """
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._head_norm(q, self.q_norm), self._head_norm(k, self.k_norm)
        self.rope_(q, k, ctx)
        return q, k

    def rope_(self, q: Tensor, k: Tensor, ctx: Context, inverse: bool = False) -> None:
        """Rotate q (N, H, hd) and k (N, KV, hd) in place; inverse: the gradients of that."""
        rotation = ctx.rotations[self.layer]
        if rotation is not None:
            size = 2 * rotation.k_cos.shape[1]
            ops.rope_(q[..., :size], rotation.q_cos, rotation.q_sin, inverse)
            ops.rope_(k[..., :size], rotation.k_cos, rotation.k_sin, inverse)

    def _head_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x.reshape(-1, x.shape[2]), weight, self.config.rms_norm_eps).view(x.shape)

    def head_norm_backward(self, dx: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the per-head norm's input x, given dx of its output; all (N, heads, hd)."""
        flat = dx.reshape(-1, x.shape[2]), x.reshape(-1, x.shape[2])
        return ops.rms_norm_backward(*flat, weight, self.config.rms_norm_eps).view(x.shape)


class _RmsNorm(torch.autograd.Function):
    """A norm that no product follows, as a node of autograd; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return ops.rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return ops.rms_norm_backward(dy, x, weight, ctx.eps), None, None


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
        block.rope_(dq, dk, context, inverse=True)
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
        """Look up input_ids (N,); return h (N, D) in the compute dtype, scaled where the model says so."""
        h, scale = vocabulary.rows(self.embedding, input_ids, self.dtype), self.config.embedding_scale
        return h if scale == 1.0 else h * torch.tensor(scale, dtype=self.dtype, device=h.device)

    def rotations(self, positions: Tensor) -> tuple[Rotation | None, ...]:
        """Return each layer's rotation of positions (N,); None for a layer that rotates nothing."""
        return rotations(self.config, positions, self.device)

    def logits(self, h: Tensor) -> Tensor:
        """Apply the final norm and the head to the last block's output h (N, D); return logits (N, V) in the compute dtype."""
        return vocabulary.logits(ops.rms_norm(h, self.norm, self.config.rms_norm_eps), self.head)
