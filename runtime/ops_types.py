"""The types that ops.py and its back ends share, and the protocol that every back end satisfies.

Back ends import this module, the number formats (nf4.py, int8.py) and attention.py, and nothing above them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.int8 import Int8Rows
from edgetune.runtime.nf4 import QuantizedTensor

COMPUTE_DTYPES = (torch.float32, torch.bfloat16)
"""The dtypes in which every back end computes."""
FEW_ROWS = 8
"""Up to this number of rows, a product with a packed weight goes to `matvec` or `int8_matvec`, and new tokens of a prompt go
one by one to the decoder; for more rows, dequantising the weight is faster. The kernels are built for this number: MAX_TOKENS
in constants.h is the same 8, and metal/library.py compiles nf4.metal with it."""

Weight = Tensor | QuantizedTensor | Int8Rows
"""The weight of a linear, (out, in): dense, in 4 bits, or in rows of 8 bits."""
DecodeStep = Callable[[int], Tensor]
"""Runs one token and returns the logits (V,) of the next."""


class Segment(NamedTuple):
    """One document's range of queries and of keys in packed tensors; its last query sees its last key.

    Queries of a segment see keys of the same segment alone. A packed training batch has equal ranges (`packed`); a prefill
    that continues a KV cache has more keys than queries.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int

    @classmethod
    def packed(cls, start: int, end: int) -> Segment:
        """Return the segment whose queries and keys are both tokens `start` to `end` of a packed batch."""
        return cls(start, end, start, end)


class Rotation(NamedTuple):
    """The cosines and sines (N, rotated/2) f32 by which RoPE rotates queries and keys.

    Factors of cosines and sines are multiplied in, also those that only queries have. `rotated` is hd, or less where a part of
    each head is left as it is.
    """

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """The inputs of causal attention over packed documents.

    q (N, H, hd); k and v (M, KV, hd), where H is a multiple of KV. Attention stays within each of `segments`. A query sees
    the last `window` keys up to its own; all of them where window is None. Scores are multiplied by `scale`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    segments: Sequence[Segment]
    window: int | None
    scale: float


@dataclass(frozen=True, eq=False)
class AttentionGradients:
    """The tensors that attention's backward writes: dq (N, H, hd), dk and dv (M, KV, hd)."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


@dataclass(frozen=True, eq=False)
class Adapted:
    """A 4-bit weight W (O, I) with its adapter, as the fused products take it: A (r, I) and B (O, r) in f32, or None.

    The input of A is dropped with probability `dropout` by a hash of `key` (32 bits); key None: no dropout.
    """

    weight: QuantizedTensor
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    key: int | None = None


@dataclass(frozen=True, eq=False)
class LinearParts:
    """The tensors of a linear, as a decoder reads them: weight (out, in), bias (out,), lora_A (r, in), lora_B (out, r)."""

    weight: Weight
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scale: float = 1.0


class DecoderLinear(Protocol):
    """A linear of a model to be decoded, with or without an adapter."""

    def parts(self) -> LinearParts:
        """Return the linear's tensors."""


class DecoderBlock(Protocol):
    """One transformer layer of a model to be decoded. Norms are (D,) or, for q and k, (hd,)."""

    @property
    def attn_norm(self) -> Tensor: ...
    @property
    def mlp_norm(self) -> Tensor: ...
    @property
    def q_norm(self) -> Tensor | None: ...
    @property
    def k_norm(self) -> Tensor | None: ...
    @property
    def post_attn_norm(self) -> Tensor | None: ...
    @property
    def post_mlp_norm(self) -> Tensor | None: ...
    @property
    def q_proj(self) -> DecoderLinear: ...
    @property
    def k_proj(self) -> DecoderLinear: ...
    @property
    def v_proj(self) -> DecoderLinear: ...
    @property
    def o_proj(self) -> DecoderLinear: ...
    @property
    def gate_proj(self) -> DecoderLinear: ...
    @property
    def up_proj(self) -> DecoderLinear: ...
    @property
    def down_proj(self) -> DecoderLinear: ...
    @property
    def window(self) -> int | None: ...
    @property
    def scale(self) -> float: ...


class DecoderModel(Protocol):
    """The part of a model that a decoder needs: model.py's Llama, whose layer is above the back ends."""

    @property
    def config(self) -> LlamaConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def blocks(self) -> Sequence[DecoderBlock]: ...
    @property
    def norm(self) -> Tensor: ...
    @property
    def head(self) -> object: ...

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up input_ids (N,); return (N, D) in the compute dtype."""

    def rotations(self, positions: Tensor) -> Sequence[Rotation | None]:
        """Return each layer's rotation of positions (N,); None for a layer that rotates nothing."""

    def logits(self, h: Tensor) -> Tensor:
        """Apply the final norm and the head to h (N, D); return (N, V)."""


class DecoderCache(Protocol):
    """A KV cache: for each layer k and v (KV, max_length, hd), of which the first `length` positions are filled."""

    length: int

    @property
    def max_length(self) -> int: ...
    @property
    def k(self) -> Sequence[Tensor]: ...
    @property
    def v(self) -> Sequence[Tensor]: ...


class Backend(Protocol):
    """The functions that a back end offers; every back end is a module that has all of them.

    ops.py checks shapes and dtypes first. A function that a back end cannot serve returns None where its type says so, with
    nothing written, and the caller takes another way. reference.py documents what each function computes.
    """

    NAME: str

    def load(self) -> None:
        """Make the kernels ready. Raises ImportError where they cannot serve on this machine."""

    def selected_isa(self) -> str | None:
        """Return the instruction set in use, or None for a back end that has no choice of them."""

    def multiplies_int8(self) -> bool:
        """Return True if `int8_matvec` has a kernel and the decoder takes a head in 8 bits."""

    def fuses(self, dtype: torch.dtype, int8: bool = False) -> bool:
        """Return True if `project` has a kernel for this dtype and, if `int8`, is faster in 8 bits."""

    def dequantize(self, quantized: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor: ...
    def matvec(self, x: Tensor, quantized: QuantizedTensor) -> Tensor: ...
    def int8_rows(self, weight: Tensor) -> Int8Rows: ...
    def int8_matvec(self, x: Tensor, weight: Int8Rows) -> Tensor | None: ...

    def project(self, x: Tensor, linears: Sequence[Adapted], y: Tensor | None, int8: bool = False) -> Tensor | None: ...
    def project_backward(
        self,
        dy: Tensor,
        x: Tensor,
        reduced: Tensor,
        linears: Sequence[Adapted],
        gradients: Sequence[tuple[Tensor, Tensor]],
        int8: bool = False,
    ) -> Tensor | None: ...

    def rms_norm(self, h: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def rms_norm_backward(self, dx: Tensor, h: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor: ...
    def swiglu_backward(self, dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None: ...
    def geglu(self, gate: Tensor, up: Tensor) -> Tensor: ...
    def geglu_backward(self, dact: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None: ...
    def rope_(self, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor: ...
    def dropout(self, x: Tensor, p: float, key: int) -> Tensor: ...
    def cross_entropy_(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor: ...

    def attention_forward(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]: ...
    def attention_backward(
        self, inputs: AttentionInputs, o: Tensor, lse: Tensor, do: Tensor, gradients: AttentionGradients
    ) -> None: ...

    def decoder(self, model: DecoderModel, cache: DecoderCache) -> DecodeStep | None:
        """Return a step that runs one token of this model and cache, or None where the kernels cannot run it."""
