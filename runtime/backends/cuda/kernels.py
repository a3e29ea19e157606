"""The Triton kernels of the CUDA back end, and nothing else: weights.py, elementwise.py and decode.py launch them.

This module imports triton at its top, so it is itself imported on first use only. If TRITON_INTERPRET=1 is in the environment
by then, the same kernels run in Triton's interpreter on CPU tensors, which is how they are tested.

A program is one instance of a kernel, numbered by program_id. Pointers are to contiguous tensors unless a stride is passed
beside them. Elementwise work is done in fp32 and rounded once, to nearest even. TILE is a power of two that covers a size, as
Triton's ranges must be: lanes beyond the size are masked (`inside`).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# A kernel's arguments are Triton's own pointers and numbers, for which Python has no annotation.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest_bf16(x):
    """Round f32 x to the values of bf16, ties to even: the interpreter truncates where a card rounds."""
    # Adding just under half of the last kept bit, plus that bit, carries into it exactly when x must be rounded up.
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)  # NaN stays NaN


INTERPRETED = tl.constexpr(not isinstance(_nearest_bf16, triton.JITFunction))


@triton.jit
def _as(x, pointer):
    """Return f32 x in the dtype that `pointer` points to, rounded to nearest even."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        x = _nearest_bf16(x)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def _absmax(blocks, inside, absmax, nested_table, nested_absmax, offset, NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr):
    """Return the f32 absmax of these blocks by nf4.py's arithmetic; its bits need enable_fp_fusion=False at the launch."""
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
    """Write table[code] * absmax to out (numbers,); a program takes BLOCKS blocks of HALF bytes, 2 HALF values, each."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = _absmax(blocks, blocks < blocks_in_all, absmax, nested_table, nested_absmax, offset, NESTED, NESTED_SIZE)
    bytes_at = blocks[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pairs = tl.load(packed + bytes_at, bytes_at < (numbers + 1) // 2, other=0).to(tl.int32)
    # The high nibble comes first, as in nf4.py.
    first = tl.load(table + (pairs >> 4)) * scale[:, None]
    second = tl.load(table + (pairs & 15)) * scale[:, None]
    at = blocks[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + at, _as(tl.interleave(first, second), out), at < numbers)


@triton.jit
def _shuffled(table, codes, index):
    """Return table[index] for index (a, b, c) of 0 to 15, where codes (16,) is the loaded table.

    A warp that holds the table in registers looks a weight up by one shuffle; a load would need a 64-bit address for each.
    """
    flat = tl.gather(codes, tl.reshape(index, (index.shape[0] * index.shape[1] * index.shape[2],)), 0)
    return tl.reshape(flat, index.shape)


@triton.jit
def _loaded(table, codes, index):
    """Return table[index] by loads, for Triton up to 3.2, which has no gather."""
    return tl.load(table + index)


_looked_up = _shuffled if hasattr(tl, "gather") else _loaded


@triton.jit
def matvec(
    x, packed, table, absmax, nested_table, nested_absmax, offset, out, bias, reduced, lora_b,
    tokens, rows, width, rank, x_stride, out_stride, reduced_stride,
    BIAS: tl.constexpr, ADD: tl.constexpr, RANK_TILE: tl.constexpr, NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr,
    HALF: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write x (tokens, width) W^T [+ bias] [+ reduced (tokens, rank) lora_b^T] [+ out] to out (tokens, rows), summed in fp32.

    Rows of W are whole blocks; lora_b is (rows, rank), RANK_TILE 0 means no adapter. A program computes ROWS outputs of one
    token, from BLOCKS blocks of each row of W at a time.
    """
    # The programs of all tokens for the same rows are neighbours, so that W comes from memory once and then from cache.
    token, row = tl.program_id(0) % tokens, (tl.program_id(0) // tokens).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    whole = row < rows
    row_blocks = width // (2 * HALF)
    # One partial sum a byte of W, added up after the loop: a sum within it would be a reduction at every step.
    total = tl.zeros((ROWS, BLOCKS, HALF), tl.float32)
    byte, codes = tl.arange(0, HALF), tl.load(table + tl.arange(0, 16))
    for start in range(0, row_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = whole[:, None] & (block < row_blocks)[None, :]
        at = row[:, None] * row_blocks + block[None, :]
        scale = _absmax(at, inside, absmax, nested_table, nested_absmax, offset, NESTED, NESTED_SIZE)
        bytes_at = at[:, :, None] * HALF + byte[None, None, :]
        pairs = tl.load(packed + bytes_at, inside[:, :, None], other=0).to(tl.int32)
        # A byte holds two neighbouring weights. x is loaded in order and then split into even and odd numbers: loading every
        # other number would take an instruction each, and instructions bound decoding before memory does.
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
    """Write weight (rows, width) x (width,) to out (rows,) f32: for lora_A, where cuBLAS would take three launches."""
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
    """Write h over its root mean square, times weight, to out (N, width); one program a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    inside = column < width
    x = tl.load(h + row * h_stride + column, inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
    y = x * rstd * tl.load(weight + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, _as(y, out), inside)


@triton.jit
def rms_norm_backward(dx, h, weight, out, width, eps, dx_stride, h_stride, TILE: tl.constexpr):
    """Write the gradient of rms_norm's input to out (N, width); the weight is frozen."""
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
def _slope(x, GELU: tl.constexpr):
    """Return z such that the activation is x sigmoid(z): x for SiLU; GELU with tanh's approximation as in reference.py."""
    if GELU:
        x = x * (1.5957691216057308 + 0.07135481282553537 * x * x)
    return x


@triton.jit
def gated(gate, up, out, width, gate_stride, up_stride, out_stride, GELU: tl.constexpr, TILE: tl.constexpr):
    """Write activation(gate) * up to out (N, width)."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, _as(g / (1.0 + tl.exp(-_slope(g, GELU))) * u, out), inside)


@triton.jit
def gated_backward(
    dact, gate, up, dgate, dup, width, dact_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    GELU: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of activation(gate) * up to dgate and dup (N, width)."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    d = tl.load(dact + row * dact_stride + column, inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-_slope(g, GELU)))
    rise = g
    if GELU:  # the slope's derivative times g
        rise = g * (1.5957691216057308 + 3.0 * 0.07135481282553537 * g * g)
    tl.store(dgate + row * dgate_stride + column, _as(d * u * sigmoid * (1.0 + rise * (1.0 - sigmoid)), dgate), inside)
    tl.store(dup + row * dup_stride + column, _as(d * g * sigmoid, dup), inside)


@triton.jit
def rope(
    x, cos, sin, heads, half, row_stride, head_stride, INVERSE: tl.constexpr, HEADS_TILE: tl.constexpr, TILE: tl.constexpr
):
    """Rotate x (N, heads, 2 half) in place, pairing i with i + half; one program a row, so that its angles are read once."""
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
    """Hash uint32 x by lowbias32 (Wellons 2018), as in reference.py."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout(x, out, width, x_stride, seed, threshold, scale, TILE: tl.constexpr):
    """Write x * scale to out (N, width) where hash(seed ^ flat position) >= threshold, else 0; seed is a hashed key."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    position = row * width + column
    keep = _hash32(position.to(tl.uint32) ^ tl.cast(seed, tl.uint32)) >= tl.cast(threshold, tl.uint32)
    values = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32) * scale
    tl.store(out + position, _as(values * keep.to(tl.float32), out), inside)


@triton.jit
def cross_entropy(logits, targets, weights, losses, width, stride, TILE: tl.constexpr):
    """Write losses (R,) in nats, and turn logits (R, width) into weight * (softmax - onehot); one program a row.

    A target outside the vocabulary gives a loss of NaN, which the training loop notices: a card cannot report it more cheaply.
    """
    row = tl.program_id(0).to(tl.int64)
    target, weight = tl.load(targets + row), tl.load(weights + row).to(tl.float32)
    at = logits + row * stride
    # The largest logit and the sum of exponentials in one pass: when a larger logit appears, the sum so far is rescaled to it
    # (online softmax, Milakov & Gimelshein 2018, arXiv 1805.02867).
    largest, total, target_logit = float("-inf"), 0.0, 0.0
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        values = tl.load(at + column, column < width, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), 0)
        target_logit += tl.sum(tl.where(column == target, values, 0.0), 0)
        largest = larger
    log_z = largest + tl.log(total)
    in_vocabulary = (target >= 0) & (target < width)
    tl.store(losses + row, tl.where(in_vocabulary, log_z - target_logit, float("nan")))
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        values = tl.load(at + column, column < width, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(values - log_z) - tl.where(column == target, 1.0, 0.0)) * weight
        tl.store(at + column, _as(gradient, logits), column < width)


# ---- decoding: one token, whose position is read from the card's memory, so that a CUDA graph can be replayed for each ----


@triton.jit
def _rotated(x, norm, c, s, half, eps, i, NORM: tl.constexpr):
    """Norm one head x (2 half,) where the model has such a norm, then rotate it; return its two halves in f32."""
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
    """Rotate q of a token's qkv (heads + 2 kv_heads, 2 half) in place, rotate k into keys, and copy v into values.

    keys and values (kv_heads, max_length, 2 half) are written at the position; cos, sin (max_length, half). One program a head.
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
    """Attend with one query head to one of `splits` equal ranges of the keys up to the position (flash decoding).

    q (H, size) f32; keys, values (KV, max_length, size). Writes, for attend_whole to join: parts (H, splits, size), the
    products of values with unnormalised probabilities; sums and tops (H, splits), the sums of these and the largest scores.
    """
    # A single token has one query per head: split by heads alone, most of a card would be idle at long contexts.
    head, split, length = tl.program_id(0), tl.program_id(1), tl.load(position) + 1
    first = tl.maximum(length - window, 0) if WINDOW else 0
    keys_each = (length - first + splits - 1) // splits
    begin = first + split * keys_each
    end = tl.minimum(begin + keys_each, length)
    i = tl.arange(0, TILE)
    inside = i < size
    query = tl.load(q + head * size + i, inside, other=0.0) * scale
    cache = (head // groups).to(tl.int64) * max_length * size
    largest, total, part = float("-inf"), 0.0, tl.zeros((TILE,), tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        at = cache + key[:, None] * size + i[None, :]
        mask = (key < end)[:, None] & inside[None, :]
        scores = tl.sum(tl.load(keys + at, mask, other=0.0).to(tl.float32) * query[None, :], 1)
        scores = tl.where(key < end, scores, float("-inf"))
        # Online softmax: sums of earlier keys are rescaled to the largest score so far.
        larger = tl.maximum(largest, tl.max(scores, 0))
        p, rescale = tl.exp(scores - larger), tl.exp(largest - larger)
        total = total * rescale + tl.sum(p, 0)
        part = part * rescale + tl.sum(p[:, None] * tl.load(values + at, mask, other=0.0).to(tl.float32), 0)
        largest = larger
    index = head * splits + split
    tl.store(parts + index * size + i, part, inside)
    tl.store(sums + index, total)
    tl.store(tops + index, largest)


@triton.jit
def attend_whole(sums, tops, parts, out, size, splits, SPLITS_TILE: tl.constexpr, TILE: tl.constexpr):
    """Join the parts of attend_part into out (H, size); a part without keys has a largest score of -inf and so weight 0."""
    head, i, split = tl.program_id(0), tl.arange(0, TILE), tl.arange(0, SPLITS_TILE)
    exists = split < splits
    top = tl.load(tops + head * splits + split, exists, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))
    at = parts + (head * splits + split)[:, None] * size + i[None, :]
    values = tl.load(at, exists[:, None] & (i < size)[None, :], other=0.0)
    total = tl.sum(weight * tl.load(sums + head * splits + split, exists, other=0.0), 0)
    tl.store(out + head * size + i, tl.sum(values * weight[:, None], 0) / total, i < size)
