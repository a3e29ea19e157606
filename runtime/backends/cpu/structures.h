// The structs that Python fills and passes by address. Each has a ctypes.Structure with the same fields in the same order;
// layout.inl exports their sizes and offsets, and tests/test_abi.py compares the two sides.
//
// To change one: change it here, in layout.inl's list and in its ctypes.Structure, and raise ET_ABI and library.ABI.
//
// Shapes use these letters: n tokens of decoding (at most MAX_TOKENS), N queries, M keys or rows, H query heads, KV key and
// value heads, hd numbers a head, D hidden size, F feed-forward size, V vocabulary size, I inputs and O outputs of a linear.
#pragma once
#include "kernels.h"

namespace {

// ---- weights ----

// The absmax of every quantisation block of a weight. Either fp32, or double-quantised: 8-bit codes into a table, scaled by
// one fp32 for every 2^shift blocks, plus an offset.
struct Absmax {
    const float* plain;    // (blocks,), or null if double-quantised
    const uint8_t* codes;  // (blocks,), or null
    const float* table;    // (256,)
    const float* nested;   // (ceil(blocks / 2^shift),)
    float offset;
    int64_t shift;

    // Two roundings, as nf4.py has them: the sum must not be fused with the product.
    ET_MEMBER float at(int64_t block) const {
        if (!codes) return plain[block];
        float product = table[codes[block]] * nested[block >> shift];
        return product + offset;
    }
};

// ---- matvec.inl and decode.inl ----

// A frozen linear layer with its adapter.
struct DecodeLinear {
    int64_t kind, rows, cols;  // kind: a Kind of matvec.inl; rows, cols: outputs, inputs
    const void* weight;        // packed codes (ceil(rows * cols / 2),), or bf16, fp32 or int8 (rows, cols)
    const float* codes;        // NF4: its table (16,); ROWS_INT8: the scale of every row (rows,)
    Absmax absmax;             // NF4 only
    int64_t block_size;        // NF4 only: weights that share one absmax
    const float* bias;         // (rows,) or null
    int64_t rank;              // 0: no adapter
    int64_t lora_kind;         // DENSE_BF16 or DENSE_F32
    const void* lora_A;        // (rank, cols), already times alpha / rank
    const void* lora_B;  // (ceil(rows / LORA_PANEL), rank, LORA_PANEL), padded with zeros: a range of rows is whole cache lines
};

// The sizes that all blocks of a model share.
struct DecodeShape {
    int64_t hidden, ffn, heads, kv_heads, head_dim, max_length;
    int64_t cache_bf16;            // 1: the KV cache is bf16; 0: fp32
    int64_t compute;               // a Compute of matvec.inl
    int64_t rotated, gelu;         // numbers of a head that are rotated; 1: GeGLU, 0: SwiGLU
    float eps, scale;              // added to a norm's mean square; factor of attention's scores
    float residual;                // factor of what attention and MLP add to h
};

// One transformer block and its part of the KV cache.
struct DecodeBlock {
    DecodeLinear q, k, v, o, gate, up, down;
    const float *attn_norm, *mlp_norm;  // (D,)
    const float *q_norm, *k_norm;       // (hd,) or null
    const float *post_attn_norm, *post_mlp_norm;             // (D,) or null: of what is added to h
    const float *q_cosines, *q_sines, *k_cosines, *k_sines;  // (max_length, rotated / 2), or null: no rotation
    void *keys, *values;                // (KV, max_length, hd), bf16 or fp32
    int64_t window;                     // keys a query sees, itself included; 0: all before it
};

// One step of decoding: n tokens through all blocks, the final norm and the head.
struct DecodeJob {
    const DecodeShape* shape;
    const DecodeBlock* blocks;  // (block_count,)
    int64_t block_count;
    const float* norm;  // (D,)
    const DecodeLinear* head;
    float* logits;        // out: (n, V)
    float* h;             // in and out: (n, D), embedded tokens become the last block's output
    int64_t n, position;  // position: of the first new token in the cache
    uint8_t* space;       // scratch of decode_space's bytes[0], at a multiple of ALIGNMENT
    int64_t space_own;    // decode_space's bytes[1]: the part of it that one thread has for itself
};

// ---- attention.inl ----

// A tensor (rows, heads, hd) whose last dimension is contiguous.
struct AttentionRows {
    void* data;
    int64_t row, head;  // strides in numbers
};

struct AttentionCall {
    AttentionRows q, k, v, o, dout, dq, dk, dv;  // q, o, dout, dq (N, H, hd); k, v, dk, dv (M, KV, hd)
    float* lse;               // (H, N): log of the sum of exponentials, natural; the forward writes it, the backward reads it
    const int64_t* segments;  // (segment_count, 4): q_start, q_end, k_start, k_end
    int64_t segment_count, queries, heads, kv_heads, size, window, bf16, threads;  // size: hd; window 0: none
    void* scratch;  // at a multiple of ALIGNMENT; null: only set scratch_bytes and return
    int64_t scratch_bytes;
    float scale;
};

// ---- project.inl ----

// An NF4 weight (O, I), packed.
struct ProjectWeight {
    const uint8_t* packed;  // (O * I / 2,)
    const float* codes;     // (16,)
    Absmax absmax;
    int64_t block_shift;  // log2 of the block size
};

// A linear layer with its adapter and its adapter's gradients.
struct ProjectLinear {
    ProjectWeight weight;
    int64_t outputs, rank;    // rank 0: no adapter, and nothing below is read
    const float *a, *b;       // lora_A (rank, I), lora_B (O, rank)
    float *da, *db;           // the same shapes: gradients are added to them
    float scale, keep;        // scale: alpha / rank; keep: 1 / (1 - p) of dropout
    uint64_t key, threshold;  // of dropout; threshold: p * 2^32, 0: no dropout
};

// `count` linears that share their input. Their outputs lie side by side in y.
struct ProjectCall {
    const void* x;  // (rows, inputs); x_row, y_row, dx_row: strides of rows in numbers
    int64_t x_row;
    void* y;  // (rows, sum of outputs): the forward's result (null: only `reduced` is wanted), the backward's dy
    int64_t y_row;
    void* dx;  // (rows, inputs): the backward's result
    int64_t dx_row;
    void* reduced;                 // (rows, sum of ranks, each padded to SIDE): the forward writes it, the backward reads it
    const ProjectLinear* linears;  // (count,)
    int64_t count, rows, inputs, threads;
    int64_t bf16;   // 1: x, y, dx and reduced are bf16; 0: fp32
    int64_t int8;   // 1: compute the large products in int8 where the rows are even enough
    char* scratch;  // at a multiple of ALIGNMENT; null: only set scratch_bytes and return
    int64_t scratch_bytes;
};

}  // namespace
