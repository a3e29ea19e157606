"""The C++ attention kernels equal plain softmax attention, forward and backward, on every instruction set of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import threads
from torch import Tensor

from edgetune.runtime.ops_types import AttentionGradients, AttentionInputs, Segment

cpu = pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError, reason="the C++ kernels were not built")

BF16, F32 = torch.bfloat16, torch.float32
# The largest error allowed, as a fraction of a tensor's norm.
TOLERANCE = {F32: 1e-5, BF16: 1e-2}

# Each case is (heads, key heads, head size, segments, window).
CASES = {
    "one token": (2, 1, 96, [(0, 1, 0, 1)], None),
    "odd length, head of six": (2, 2, 6, [(0, 31, 0, 31)], None),
    "three notes": (6, 2, 64, [(0, 20, 0, 20), (20, 121, 20, 121), (121, 122, 121, 122)], None),
    "many columns": (8, 2, 64, [(0, 301, 0, 301)], None),
    "head of 80 in a window": (8, 1, 80, [(0, 200, 0, 200)], 50),
    "window of one": (3, 1, 16, [(0, 70, 0, 70)], 1),
    "notes in a window": (2, 2, 64, [(0, 31, 0, 31), (31, 331, 31, 331)], 37),
    "prefill that continues": (4, 4, 128, [(0, 33, 0, 100)], None),
    "prefill in a window": (4, 1, 256, [(0, 70, 0, 130)], 33),
    "a token after many": (8, 4, 64, [(0, 1, 0, 300)], None),
    "a token in a window": (8, 2, 64, [(0, 1, 0, 700)], 100),
    "two sequences' tokens": (4, 2, 32, [(0, 1, 0, 40), (1, 2, 40, 105)], None),
}


@pytest.fixture(params=["amx", "avx512_bf16", "avx512", "avx_vnni", "avx2", "neon_i8mm", "neon_dot", "neon", "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in cpu.isas():
        pytest.skip(f"this machine has no {request.param}")
    with cpu.force_isa(request.param):
        yield request.param


def inputs(heads: int, kv_heads: int, size: int, segments: Sequence[Segment], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return random q (N, H, hd), k and v (M, KV, hd) and do (N, H, hd)."""
    generator = torch.Generator().manual_seed(heads * size)
    queries, keys = max(s[1] for s in segments), max(s[3] for s in segments)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
    q, k, v, do = (torch.randn(*shape, size, generator=generator).to(dtype) for shape in shapes)
    # Doubling q makes the attention probabilities far from equal.
    return 2 * q, k, v, do


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Any], window: int | None, scale: float) -> AttentionInputs:
    return AttentionInputs(q, k, v, [Segment(*segment) for segment in segments], window, scale)


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Return the kernel's o and lse; the arguments are those of `attention`."""
    found: tuple[Tensor, Tensor] = cpu.attention_forward(attention(*inputs))
    return found


def backward(inputs: AttentionInputs, o: Tensor, lse: Tensor, do: Tensor, *gradients: Tensor) -> None:
    cpu.attention_backward(inputs, o, lse, do, AttentionGradients(*gradients))


def plain(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention with whole T x T score matrices; return o (N, H, hd) and lse (H, N) in the dtype of q."""
    groups, outs, sums = q.shape[1] // k.shape[1], [], []
    for q_start, q_end, k_start, k_end in segments:
        keys, values = (x[k_start:k_end].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_end], keys) * scale
        position = torch.arange(q_end - q_start).unsqueeze(1) + (k_end - k_start) - (q_end - q_start)
        key = torch.arange(k_end - k_start)
        hidden = (key > position) | (key <= position - (window or k_end))
        scores = scores.masked_fill(hidden, -math.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, 1)


def distance(found: Tensor, expected: Tensor, least: float = 1.0) -> float:
    """Return the norm of the error over the expected norm, or over `least` if that is larger (some gradients are exactly 0)."""
    expected = expected.detach()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(least))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_plain_attention(case: str, dtype: torch.dtype, isa: str) -> None:
    heads, kv_heads, size, segments, window = CASES[case]
    q, k, v, do = inputs(heads, kv_heads, size, segments, dtype)
    scale = size**-0.5
    o, lse = forward(q, k, v, segments, window, scale)
    gradients = [torch.full_like(x, 7.0) for x in (q, k, v)]
    backward(attention(q, k, v, segments, window, scale), o, lse, do, *gradients)

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = plain(*exact, segments, window, scale)
    expected_gradients = torch.autograd.grad(expected, exact, do.double())
    assert distance(o, expected) < TOLERANCE[dtype]
    assert (lse - expected_lse).abs().max() < 1e-5
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert distance(found, wanted, least=0.1 * float(do.norm())) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_slices_of_one_packed_tensor_give_what_torch_gives(dtype: torch.dtype, isa: str) -> None:
    tokens, heads, kv_heads, size = 150, 4, 2, 64
    generator = torch.Generator().manual_seed(1)
    split = (heads, kv_heads, kv_heads)
    packed = torch.randn(tokens, sum(split), size, generator=generator).to(dtype)
    q, k, v = packed.split(split, 1)
    do = torch.randn(tokens, heads, size, generator=generator).to(dtype)
    segments = [Segment.packed(0, tokens)]
    o, lse = forward(q, k, v, segments, None, size**-0.5)
    # NaN shows any element that the kernel does not write.
    gradient = torch.full_like(packed, math.nan)
    backward(attention(q, k, v, segments, None, size**-0.5), o, lse, do, *gradient.split(split, 1))

    leaf = packed.float().requires_grad_()
    tq, tk, tv = (x.transpose(0, 1) for x in leaf.split(split, 1))
    expected = F.scaled_dot_product_attention(tq, tk, tv, is_causal=True, enable_gqa=True).transpose(0, 1)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, do.float())
    assert distance(o, expected.double()) < TOLERANCE[dtype]
    assert distance(gradient, expected_gradient.double()) < TOLERANCE[dtype]


def test_a_cache_is_read_up_to_its_length_and_no_further(isa: str) -> None:
    """Uses views (length, KV, hd) of caches (KV, max_length, hd) that hold NaN beyond the length."""
    length, new = 75, 3
    q, k, v, _ = inputs(4, 2, 64, [(0, new, 0, length)], BF16)
    caches = torch.full((2, 2, 128, 64), math.nan, dtype=BF16)
    caches[0, :, :length], caches[1, :, :length] = k.transpose(0, 1), v.transpose(0, 1)
    views = [cache.transpose(0, 1)[:length] for cache in caches]
    o, lse = forward(q, *views, [(0, new, 0, length)], None, 0.125)
    same, same_lse = forward(q, k, v, [(0, new, 0, length)], None, 0.125)
    assert torch.equal(o, same)
    assert torch.equal(lse, same_lse)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_the_bits_are_the_same_each_time_and_at_any_number_of_threads(dtype: torch.dtype, isa: str) -> None:
    segments = [Segment.packed(0, 170), Segment.packed(170, 190), Segment.packed(190, 300)]
    q, k, v, do = inputs(8, 2, 64, segments, dtype)

    def run() -> list[Tensor]:
        o, lse = forward(q, k, v, segments, None, 0.125)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        backward(attention(q, k, v, segments, None, 0.125), o, lse, do, *gradients)
        return [o, lse, *gradients]

    with threads(1):
        first = run()
    for count in (1, 2, 3):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_no_note_sees_another(isa: str) -> None:
    segments = [Segment.packed(0, 45), Segment.packed(45, 90)]
    q, k, v, do = inputs(4, 2, 32, segments, BF16)
    poisoned = [x.clone() for x in (q, k, v, do)]
    for x in poisoned:
        x[:45] = math.nan
    results = []
    for a, b, c, d in ((q, k, v, do), poisoned):
        o, lse = forward(a, b, c, segments, None, 0.2)
        gradients = [torch.empty_like(x) for x in (a, b, c)]
        backward(attention(a, b, c, segments, None, 0.2), o, lse, d, *gradients)
        results.append([o, lse.T, *gradients])
    for clean, beside in zip(*results, strict=True):
        assert beside[:45].isnan().all()
        assert torch.equal(clean[45:], beside[45:])


@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_scores_of_any_size_neither_overflow_nor_vanish(direction: int, isa: str) -> None:
    """Scores rise or fall by thousands along the keys, so the running maximum has to follow."""
    tokens, size = 400, 32
    q, k, v, _ = inputs(1, 1, size, [(0, tokens, 0, tokens)], F32)
    q[:], k[:] = 1.0, direction * torch.arange(tokens).view(-1, 1, 1) * 0.5
    o, lse = forward(q, k, v, [(0, tokens, 0, tokens)], None, 1.0)
    expected, expected_lse = plain(q.double(), k.double(), v.double(), [(0, tokens, 0, tokens)], None, 1.0)
    assert distance(o, expected) < 1e-5
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)


def test_rows_of_no_segment_get_no_gradient(isa: str) -> None:
    q, k, v, do = inputs(2, 2, 32, [(0, 50, 0, 60)], F32)
    segments = [(10, 30, 20, 60)]
    o, lse = forward(q, k, v, segments, None, 0.2)
    dq, dk, dv = (torch.full_like(x, 7.0) for x in (q, k, v))
    backward(attention(q, k, v, segments, None, 0.2), o, lse, do, dq, dk, dv)
    assert not dq[:10].any()
    assert not dq[30:].any()
    assert not dk[:20].any()
    assert not dv[:20].any()
    assert dq[10:30].any()
    assert dv[20:].any()


def test_nothing_to_do_is_fine(isa: str) -> None:
    q, k = torch.zeros(0, 4, 64), torch.zeros(0, 2, 64)
    o, lse = forward(q, k, k, [], None, 0.125)
    assert o.shape == q.shape
    assert lse.shape == (4, 0)
    backward(attention(q, k, k, [], None, 0.125), o, lse, q, q.clone(), k.clone(), k.clone())


def _q(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forward(_q(5, 3, 8), _q(5, 2, 8), _q(5, 2, 8), [(0, 5, 0, 5)], None, 1.0), "divide"),
        (lambda: forward(_q(5, 2, 300), _q(5, 2, 300), _q(5, 2, 300), [], None, 1.0), "up to 256"),
        (lambda: forward(_q(5, 2, 8), _q(5, 2, 8), _q(4, 2, 8), [], None, 1.0), "v is"),
        (lambda: forward(_q(5, 2, 8), _q(5, 2, 8), _q(5, 2, 8, dtype=BF16), [], None, 1.0), "v is"),
        (lambda: forward(*[_q(5, 2, 8, dtype=torch.float16)] * 3, [], None, 1.0), "float16"),
        (lambda: forward(*[_q(5, 2, 16)[..., ::2]] * 3, [], None, 1.0), "not contiguous"),
        (lambda: forward(*[_q(5, 2, 8)] * 3, [(0, 6, 0, 6)], None, 1.0), "does not fit"),
        (lambda: forward(*[_q(5, 2, 8)] * 3, [(0, 5, 1, 5)], None, 1.0), "a key for every query"),
        (lambda: forward(*[_q(5, 2, 8)] * 3, [(0, 5, 0, 5)], 0, 1.0), "window"),
        (lambda: forward(*[_q(5, 2, 8)] * 3, [(0, 5, 0, 5)], None, -1.0), "scale"),
        (lambda: backward(attention(*[_q(5, 2, 8)] * 3, [], None, 1.0), _q(5, 2, 8), _q(2, 4), *[_q(5, 2, 8)] * 4), "lse"),
        (
            lambda: backward(
                attention(*[_q(5, 2, 8)] * 3, [(0, 3, 0, 3), (3, 5, 2, 5)], None, 1.0),
                _q(5, 2, 8),
                _q(2, 5),
                *[_q(5, 2, 8)] * 4,
            ),
            "share rows",
        ),
    ],
)
def test_arguments_that_do_not_fit_never_reach_a_pointer(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
