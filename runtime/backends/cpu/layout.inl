// The layout of every struct of structures.h as this compiler laid it out. dispatch.cpp exports it, and tests/test_abi.py
// compares it with the ctypes.Structures: a field that is missing here, or there, is found by its struct's size.

struct LayoutEntry {
    const char *structure, *field;  // field "": the struct as a whole
    int64_t offset, size;           // bytes
};

#define WHOLE(structure) {#structure, "", 0, int64_t(sizeof(structure))}
#define FIELD(structure, field) {#structure, #field, int64_t(offsetof(structure, field)), int64_t(sizeof(structure::field))}
// clang-format off
static const LayoutEntry layout[] = {
    WHOLE(Absmax), FIELD(Absmax, plain), FIELD(Absmax, codes), FIELD(Absmax, table), FIELD(Absmax, nested),
        FIELD(Absmax, offset), FIELD(Absmax, shift),
    WHOLE(DecodeLinear), FIELD(DecodeLinear, kind), FIELD(DecodeLinear, rows), FIELD(DecodeLinear, cols),
        FIELD(DecodeLinear, weight), FIELD(DecodeLinear, codes), FIELD(DecodeLinear, absmax), FIELD(DecodeLinear, block_size),
        FIELD(DecodeLinear, bias), FIELD(DecodeLinear, rank), FIELD(DecodeLinear, lora_kind), FIELD(DecodeLinear, lora_A),
        FIELD(DecodeLinear, lora_B),
    WHOLE(DecodeShape), FIELD(DecodeShape, hidden), FIELD(DecodeShape, ffn), FIELD(DecodeShape, heads),
        FIELD(DecodeShape, kv_heads), FIELD(DecodeShape, head_dim), FIELD(DecodeShape, max_length),
        FIELD(DecodeShape, cache_bf16), FIELD(DecodeShape, compute), FIELD(DecodeShape, rotated), FIELD(DecodeShape, gelu),
        FIELD(DecodeShape, eps), FIELD(DecodeShape, scale), FIELD(DecodeShape, residual),
    WHOLE(DecodeBlock), FIELD(DecodeBlock, q), FIELD(DecodeBlock, k), FIELD(DecodeBlock, v), FIELD(DecodeBlock, o),
        FIELD(DecodeBlock, gate), FIELD(DecodeBlock, up), FIELD(DecodeBlock, down), FIELD(DecodeBlock, attn_norm),
        FIELD(DecodeBlock, mlp_norm), FIELD(DecodeBlock, q_norm), FIELD(DecodeBlock, k_norm), FIELD(DecodeBlock, post_attn_norm),
        FIELD(DecodeBlock, post_mlp_norm), FIELD(DecodeBlock, q_cosines), FIELD(DecodeBlock, q_sines),
        FIELD(DecodeBlock, k_cosines), FIELD(DecodeBlock, k_sines), FIELD(DecodeBlock, keys), FIELD(DecodeBlock, values),
        FIELD(DecodeBlock, window),
    WHOLE(DecodeJob), FIELD(DecodeJob, shape), FIELD(DecodeJob, blocks), FIELD(DecodeJob, block_count), FIELD(DecodeJob, norm),
        FIELD(DecodeJob, head), FIELD(DecodeJob, logits), FIELD(DecodeJob, h), FIELD(DecodeJob, n), FIELD(DecodeJob, position),
        FIELD(DecodeJob, space), FIELD(DecodeJob, space_own),
    WHOLE(AttentionRows), FIELD(AttentionRows, data), FIELD(AttentionRows, row), FIELD(AttentionRows, head),
    WHOLE(AttentionCall), FIELD(AttentionCall, q), FIELD(AttentionCall, k), FIELD(AttentionCall, v), FIELD(AttentionCall, o),
        FIELD(AttentionCall, dout), FIELD(AttentionCall, dq), FIELD(AttentionCall, dk), FIELD(AttentionCall, dv),
        FIELD(AttentionCall, lse), FIELD(AttentionCall, segments), FIELD(AttentionCall, segment_count),
        FIELD(AttentionCall, queries), FIELD(AttentionCall, heads), FIELD(AttentionCall, kv_heads), FIELD(AttentionCall, size),
        FIELD(AttentionCall, window), FIELD(AttentionCall, bf16), FIELD(AttentionCall, threads), FIELD(AttentionCall, scratch),
        FIELD(AttentionCall, scratch_bytes), FIELD(AttentionCall, scale),
    WHOLE(ProjectWeight), FIELD(ProjectWeight, packed), FIELD(ProjectWeight, codes), FIELD(ProjectWeight, absmax),
        FIELD(ProjectWeight, block_shift),
    WHOLE(ProjectLinear), FIELD(ProjectLinear, weight), FIELD(ProjectLinear, outputs), FIELD(ProjectLinear, rank),
        FIELD(ProjectLinear, a), FIELD(ProjectLinear, b), FIELD(ProjectLinear, da), FIELD(ProjectLinear, db),
        FIELD(ProjectLinear, scale), FIELD(ProjectLinear, keep), FIELD(ProjectLinear, key), FIELD(ProjectLinear, threshold),
    WHOLE(ProjectCall), FIELD(ProjectCall, x), FIELD(ProjectCall, x_row), FIELD(ProjectCall, y), FIELD(ProjectCall, y_row),
        FIELD(ProjectCall, dx), FIELD(ProjectCall, dx_row), FIELD(ProjectCall, reduced), FIELD(ProjectCall, linears),
        FIELD(ProjectCall, count), FIELD(ProjectCall, rows), FIELD(ProjectCall, inputs), FIELD(ProjectCall, threads),
        FIELD(ProjectCall, bf16), FIELD(ProjectCall, int8), FIELD(ProjectCall, scratch), FIELD(ProjectCall, scratch_bytes),
};
// clang-format on
#undef WHOLE
#undef FIELD
