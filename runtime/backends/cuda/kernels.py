"""The Triton kernels of the CUDA back end, and nothing else: `__init__.py`, `decode.py` check arguments and launch them.

This module imports triton at its top, so it is itself imported on first use only. With TRITON_INTERPRET=1 in the
environment before that, the same kernels run in Triton's interpreter on CPU tensors, which is how they are tested.

Pointers are to contiguous tensors unless a stride is passed beside them; elementwise work is done in fp32 and rounded
once, to nearest even. A power of two that covers a size is called its TILE.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of a kernel are pointers and numbers of Triton's own, which no annotation of Python's says.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest_bf16(x):
    """f32 x on the grid of bf16, ties to even: the interpreter cuts bf16 off where a card rounds it."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


INTERPRETED = tl.constexpr(not isinstance(_nearest_bf16, triton.JITFunction))


@triton.jit
def _as(x, pointer):
    """f32 x in the dtype that `pointer` points to, rounded to nearest even."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        x = _nearest_bf16(x)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def _absmax(blocks, inside, absmax, nested_table, nested_absmax, offset, NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr):
    """f32 scales of these blocks: nf4.py's arithmetic, to be compiled with enable_fp_fusion=False where bits count."""
    if NESTED:
        code = tl.load(absmax + blocks, inside, other=0).to(tl.int32)
        scale = tl.load(nested_table + code) * tl.load(nested_absmax + blocks // NESTED_SIZE, inside, other=0.0) + offset
    else:
        scale = tl.load(absmax + blocks, inside, other=0.0)
    return scale


@triton.jit
def dequantize(
    packed, table, absmax, nested_table, nested_absmax, offset, out, numbers, blocks_in_all,
    NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out (numbers,) = table[code] * absmax; a program takes BLOCKS blocks of HALF bytes, that is 2 HALF values, each."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = _absmax(blocks, blocks < blocks_in_all, absmax, nested_table, nested_absmax, offset, NESTED, NESTED_SIZE)
    bytes_at = blocks[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pairs = tl.load(packed + bytes_at, bytes_at < (numbers + 1) // 2, other=0).to(tl.int32)
    first = tl.load(table + (pairs >> 4)) * scale[:, None]
    second = tl.load(table + (pairs & 15)) * scale[:, None]
    at = blocks[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + at, _as(tl.interleave(first, second), out), at < numbers)


@triton.jit
def _shuffled(table, codes, index):
    """table[index] for index (a, b, c) of 0 to 15; codes (16,) is the table, loaded.

    A warp that holds the table in its registers looks it up by one shuffle a weight; a load would take a 64-bit address each.
    """
    flat = tl.gather(codes, tl.reshape(index, (index.shape[0] * index.shape[1] * index.shape[2],)), 0)
    return tl.reshape(flat, index.shape)


@triton.jit
def _loaded(table, codes, index):
    """The same where Triton, up to 3.2, has no gather."""
    return tl.load(table + index)


_looked_up = _shuffled if hasattr(tl, "gather") else _loaded


@triton.jit
def matvec(
    x, packed, table, absmax, nested_table, nested_absmax, offset, out, bias, reduced, lora_b,
    tokens, rows, width, rank, x_stride, out_stride, reduced_stride,
    BIAS: tl.constexpr, ADD: tl.constexpr, RANK_TILE: tl.constexpr, NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr,
    HALF: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out (tokens, rows) = x (tokens, width) W^T [+ bias] [+ reduced (tokens, rank) lora_b^T] [+ out itself], summed in fp32.

    Rows of W are whole blocks; lora_b (rows, rank); RANK_TILE 0: no adapter. A program makes ROWS outputs of one token,
    BLOCKS blocks of each at a time; all tokens' programs for the same rows are neighbours, so that W is read once.

    Decoding is bound by instructions before it is by memory: see _shuffled; and x is read as it lies, then split, where
    every other number of it would be a load each.
    """
    token, row = tl.program_id(0) % tokens, (tl.program_id(0) // tokens).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    whole = row < rows
    row_blocks = width // (2 * HALF)
    total = tl.zeros((ROWS, BLOCKS, HALF), tl.float32)
    byte, codes = tl.arange(0, HALF), tl.load(table + tl.arange(0, 16))
    for start in range(0, row_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = whole[:, None] & (block < row_blocks)[None, :]
        at = row[:, None] * row_blocks + block[None, :]
        scale = _absmax(at, inside, absmax, nested_table, nested_absmax, offset, NESTED, NESTED_SIZE)
        bytes_at = at[:, :, None] * HALF + byte[None, None, :]
        pairs = tl.load(packed + bytes_at, inside[:, :, None], other=0).to(tl.int32)
        x_at = x + token * x_stride + block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
        values = tl.load(x_at, (block < row_blocks)[:, None], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(values, (BLOCKS, HALF, 2)))
        first, second = _looked_up(table, codes, pairs >> 4), _looked_up(table, codes, pairs & 15)
        total += (first * even[None, :, :] + second * odd[None, :, :]) * scale[:, :, None]
    y = tl.sum(tl.sum(total, 2), 1)
    if RANK_TILE > 0:
        r = tl.arange(0, RANK_TILE)
        xa = tl.load(reduced + token * reduced_stride + r, r < rank, other=0.0).to(tl.float32)
        b = tl.load(lora_b + row[:, None] * rank + r[None, :], whole[:, None] & (r < rank)[None, :], other=0.0)
        y += tl.sum(xa[None, :] * b.to(tl.float32), 1)
    if BIAS:
        y += tl.load(bias + row, whole, other=0.0).to(tl.float32)
    out_at = out + token * out_stride + row
    if ADD:
        y += tl.load(out_at, whole, other=0.0).to(tl.float32)
    tl.store(out_at, _as(y, out), whole)


@triton.jit
def dense_matvec(x, weight, out, rows, width, ROWS: tl.constexpr, TILE: tl.constexpr):
    """out (rows,) f32 = weight (rows, width) x (width,): an adapter's A, where cuBLAS would take three launches."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < width
        values = tl.load(x + column, inside, other=0.0).to(tl.float32)
        at = row[:, None] * width + column[None, :]
        total += tl.load(weight + at, (row < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32) * values[None, :]
    tl.store(out + row, tl.sum(total, 1), row < rows)


@triton.jit
def rms_norm(h, weight, out, width, eps, h_stride, TILE: tl.constexpr):
    """out (N, width) = h over its root mean square, times weight; a program a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    inside = column < width
    x = tl.load(h + row * h_stride + column, inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
    y = x * rstd * tl.load(weight + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, _as(y, out), inside)


@triton.jit
def rms_norm_backward(dx, h, weight, out, width, eps, dx_stride, h_stride, TILE: tl.constexpr):
    """out (N, width) = gradient of rms_norm's input, the weight frozen."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    inside = column < width
    x = tl.load(h + row * h_stride + column, inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
    normed = x * rstd
    gradient = tl.load(dx + row * dx_stride + column, inside, other=0.0).to(tl.float32)
    scaled = gradient * tl.load(weight + column, inside, other=0.0).to(tl.float32)
    y = (scaled - normed * (tl.sum(scaled * normed, 0) / width)) * rstd
    tl.store(out + row * width + column, _as(y, out), inside)


@triton.jit
def swiglu(gate, up, out, width, gate_stride, up_stride, out_stride, TILE: tl.constexpr):
    """out (N, width) = silu(gate) * up."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, _as(g / (1.0 + tl.exp(-g)) * u, out), inside)


@triton.jit
def swiglu_backward(
    dact, gate, up, dgate, dup, width, dact_stride, gate_stride, up_stride, dgate_stride, dup_stride, TILE: tl.constexpr
):
    """dgate, dup (N, width) = gradients of silu(gate) * up."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    d = tl.load(dact + row * dact_stride + column, inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    gate_gradient = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dgate + row * dgate_stride + column, _as(gate_gradient, dgate), inside)
    tl.store(dup + row * dup_stride + column, _as(d * g * sigmoid, dup), inside)


@triton.jit
def rope(
    x, cos, sin, heads, half, row_stride, head_stride, INVERSE: tl.constexpr, HEADS_TILE: tl.constexpr, TILE: tl.constexpr
):
    """Rotate x (N, heads, 2 half) in place, pairing i with i + half; a program a row, so that its angles are read once."""
    row = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, HEADS_TILE), tl.arange(0, TILE)
    c = tl.load(cos + row * half + i, i < half, other=0.0)[None, :]
    s = tl.load(sin + row * half + i, i < half, other=0.0)[None, :]
    if INVERSE:
        s = -s
    at = x + row * row_stride + head[:, None] * head_stride + i[None, :]
    inside = (head < heads)[:, None] & (i < half)[None, :]
    a = tl.load(at, inside, other=0.0).to(tl.float32)
    b = tl.load(at + half, inside, other=0.0).to(tl.float32)
    tl.store(at, _as(a * c - b * s, x), inside)
    tl.store(at + half, _as(b * c + a * s, x), inside)


@triton.jit
def _hash32(x):
    """lowbias32 (Wellons 2018) on uint32, as in reference.py."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout(x, out, width, x_stride, seed, threshold, scale, TILE: tl.constexpr):
    """out (N, width) = x * scale where hash(seed ^ flat position) >= threshold, else 0. seed is hashed already."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    position = row * width + column
    keep = _hash32(position.to(tl.uint32) ^ tl.cast(seed, tl.uint32)) >= tl.cast(threshold, tl.uint32)
    values = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32) * scale
    tl.store(out + position, _as(values * keep.to(tl.float32), out), inside)


@triton.jit
def cross_entropy(logits, targets, weights, losses, width, stride, TILE: tl.constexpr):
    """losses (R,) in nats; logits (R, width) become weight * (softmax - onehot). A program a row, TILE logits at a time.

    The largest logit and the sum of exponentials are found together, online (Milakov & Gimelshein 2018, arXiv 1805.02867).
    A target outside the vocabulary gives NaN, which a run notices; a card has no cheaper way to say so.
    """
    row = tl.program_id(0).to(tl.int64)
    target, weight = tl.load(targets + row), tl.load(weights + row).to(tl.float32)
    at = logits + row * stride
    most, total, hit = float("-inf"), 0.0, 0.0
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        values = tl.load(at + column, column < width, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(values, 0))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(values - larger), 0)
        hit += tl.sum(tl.where(column == target, values, 0.0), 0)
        most = larger
    log_z = most + tl.log(total)
    known = (target >= 0) & (target < width)
    tl.store(losses + row, tl.where(known, log_z - hit, float("nan")))
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        values = tl.load(at + column, column < width, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(values - log_z) - tl.where(column == target, 1.0, 0.0)) * weight
        tl.store(at + column, _as(gradient, logits), column < width)


# ---- decoding: one token, whose position is read from the card's memory, so that a CUDA graph can be replayed ----


@triton.jit
def _rotated(x, norm, c, s, half, eps, i, NORM: tl.constexpr):
    """One head (2 half,) of x, normed where the model does that, then rotated -> its two halves, f32."""
    a = tl.load(x + i, i < half, other=0.0).to(tl.float32)
    b = tl.load(x + half + i, i < half, other=0.0).to(tl.float32)
    if NORM:
        rstd = 1.0 / tl.sqrt_rn((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * half) + eps)
        a = a * rstd * tl.load(norm + i, i < half, other=0.0).to(tl.float32)
        b = b * rstd * tl.load(norm + half + i, i < half, other=0.0).to(tl.float32)
    return a * c - b * s, b * c + a * s


@triton.jit
def rotate_and_store(
    qkv, q_norm, k_norm, cos, sin, position, keys, values, heads, kv_heads, half, max_length, eps,
    NORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A token's qkv (heads + 2 kv_heads, 2 half): q is rotated in place, k rotated into keys, v copied into values.

    keys, values (kv_heads, max_length, 2 half), at the position; cos, sin (max_length, half). A program a head.
    """
    head, at, i = tl.program_id(0), tl.load(position), tl.arange(0, TILE)
    inside = i < half
    x = qkv + head * 2 * half
    c, s = tl.load(cos + at * half + i, inside, other=0.0), tl.load(sin + at * half + i, inside, other=0.0)
    slot = ((head - heads) % kv_heads * max_length + at).to(tl.int64) * 2 * half
    if head < heads:
        first, second = _rotated(x, q_norm, c, s, half, eps, i, NORM)
        tl.store(x + i, first, inside)
        tl.store(x + half + i, second, inside)
    elif head < heads + kv_heads:
        first, second = _rotated(x, k_norm, c, s, half, eps, i, NORM)
        tl.store(keys + slot + i, _as(first, keys), inside)
        tl.store(keys + slot + half + i, _as(second, keys), inside)
    else:
        first, second = tl.load(x + i, inside, other=0.0), tl.load(x + half + i, inside, other=0.0)
        tl.store(values + slot + i, _as(first, values), inside)
        tl.store(values + slot + half + i, _as(second, values), inside)


@triton.jit
def attend_part(
    q, keys, values, position, sums, tops, parts, groups, max_length, size, window, scale, splits,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One query head over one of `splits` equal stretches of the keys up to the position (flash decoding).

    q (H, size) f32; keys, values (KV, max_length, size). Writes what attend_whole joins: parts (H, splits, size), the
    products with unnormalised probabilities; sums and tops (H, splits), their sums and the scores' largest.
    """
    head, split, length = tl.program_id(0), tl.program_id(1), tl.load(position) + 1
    first = tl.maximum(length - window, 0) if WINDOW else 0
    stretch = (length - first + splits - 1) // splits
    begin = first + split * stretch
    end = tl.minimum(begin + stretch, length)
    i = tl.arange(0, TILE)
    inside = i < size
    query = tl.load(q + head * size + i, inside, other=0.0) * scale
    cache = (head // groups).to(tl.int64) * max_length * size
    most, total, part = float("-inf"), 0.0, tl.zeros((TILE,), tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        at = cache + key[:, None] * size + i[None, :]
        mask = (key < end)[:, None] & inside[None, :]
        scores = tl.sum(tl.load(keys + at, mask, other=0.0).to(tl.float32) * query[None, :], 1)
        scores = tl.where(key < end, scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, 0))
        p, fade = tl.exp(scores - larger), tl.exp(most - larger)
        total = total * fade + tl.sum(p, 0)
        part = part * fade + tl.sum(p[:, None] * tl.load(values + at, mask, other=0.0).to(tl.float32), 0)
        most = larger
    place = head * splits + split
    tl.store(parts + place * size + i, part, inside)
    tl.store(sums + place, total)
    tl.store(tops + place, most)


@triton.jit
def attend_whole(sums, tops, parts, out, size, splits, SPLITS_TILE: tl.constexpr, TILE: tl.constexpr):
    """out (H, size): the stretches of attend_part joined; one without keys has the weight 0."""
    head, i, split = tl.program_id(0), tl.arange(0, TILE), tl.arange(0, SPLITS_TILE)
    there = split < splits
    top = tl.load(tops + head * splits + split, there, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))
    at = parts + (head * splits + split)[:, None] * size + i[None, :]
    values = tl.load(at, there[:, None] & (i < size)[None, :], other=0.0)
    total = tl.sum(weight * tl.load(sums + head * splits + split, there, other=0.0), 0)
    tl.store(out + head * size + i, tl.sum(values * weight[:, None], 0) / total, i < size)
