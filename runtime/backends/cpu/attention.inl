// Causal attention, forward and backward, in squares of 32 keys x 32 queries, so that no T x T matrix is ever stored
// (FlashAttention, Dao et al. 2022, arXiv 2205.14135, and FlashAttention-2 for the backward). runtime/attention.py has the same
// functions in plain torch.
//
// A part is a segment of the batch: the last of its queries sees the last of its keys. A column is one query of one head. The G
// query heads that share a key head stand side by side, position after position (column = query * G + head), so that a tile of
// keys is packed once for all of them, and a short note or a single token wastes little. Everything is computed transposed,
// S^T = K Q^T (keys x columns), which leaves a column's maximum, sum and log-sum-exp in lanes.
//
// Each output is written by one task alone, in an order that does not depend on threads: results have the same bits with any
// number of threads.

namespace attention {

#include "attention_tiles.inl"
#if defined(ET_USE_AMX)
#include "attention_amx.inl"
#else
ET_INLINE void products_begin() {}
ET_INLINE void products_end() {}
#endif
#include "attention_softmax.inl"

struct Part {
    int64_t query, queries, key, keys;     // the first row of its queries (keys), and their number
    int64_t squares_before, tasks_before;  // packed key squares and tasks of the parts before this one
};

// Hands out pieces of scratch, each at a multiple of ALIGNMENT. Without a base it only measures.
struct Arena {
    char* base;
    int64_t used;
    template <class X>
    ET_MEMBER X* take(int64_t count) {
        X* piece = base ? reinterpret_cast<X*>(base + used) : nullptr;
        used += (count * int64_t(sizeof(X)) + (ALIGNMENT - 1)) / ALIGNMENT * ALIGNMENT;
        return piece;
    }
};

ET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
ET_INLINE T* at(const AttentionRows& rows, int64_t row, int64_t head) {
    return static_cast<T*>(rows.data) + row * rows.row + head * rows.head;
}

// The state that forward and backward have in common: the call, its parts, packed keys and values.
template <class E>
struct Work {
    AttentionCall* call;
    Part* parts;
    int64_t count, squares, tasks;   // parts; packed squares of keys of one key head; tasks
    int64_t groups, depth;           // query heads for each key head; squares along a head (hd / 32, rounded up)
    E *keys, *values, *keys_turned;  // (KV, squares, depth, SQUARE)

    ET_MEMBER void begin(AttentionCall& attention, Arena& arena) {
        call = &attention;
        groups = attention.heads / attention.kv_heads;
        depth = ceil_div(attention.size, SIDE);
        parts = arena.take<Part>(attention.segment_count);
        count = squares = tasks = 0;
    }
    ET_MEMBER void add(const int64_t* s, int64_t key_squares, int64_t new_tasks) {
        if (parts) parts[count] = {s[0], s[1] - s[0], s[2], s[3] - s[2], squares, tasks};
        count++, squares += key_squares, tasks += new_tasks;
    }
    ET_MEMBER E* packed(E* all, int64_t kv, int64_t square) const { return all + (kv * squares + square) * depth * SQUARE; }
    ET_MEMBER const Part& part_of_task(int64_t task) const {
        int64_t low = 0, high = count;
        while (high - low > 1) (parts[(low + high) / 2].tasks_before <= task ? low : high) = (low + high) / 2;
        return parts[low];
    }
    ET_MEMBER const Part& part_of_square(int64_t square) const {
        int64_t low = 0, high = count;
        while (high - low > 1) (parts[(low + high) / 2].squares_before <= square ? low : high) = (low + high) / 2;
        return parts[low];
    }
    // Return the last key before a query's window, which it does not see; -1 if it sees all.
    ET_MEMBER int64_t limit(int64_t query_position) const {
        return call->window > 0 && query_position >= call->window ? query_position - call->window : -1;
    }
    // Write what each of the 32 columns from `first` on may see to `sight`, and the positions of the first and the last of them
    // to `near` and `far`. Columns past the end see what the last one does. width: heads side by side.
    ET_MEMBER void look(const Part& part, int64_t first, int64_t columns, int64_t width, Sight& sight, int64_t& near,
                        int64_t& far) const {
        int64_t offset = part.keys - part.queries, position = offset + first / width, head = first % width;
        near = position;
        for (int64_t x = 0; x < SIDE; x++) {
            sight.high[x] = float(position), sight.low[x] = float(limit(position));
            far = position;
            if (first + x + 1 < columns && ++head == width) head = 0, position++;
        }
    }
    // Return true if some of these columns may not see some of the 32 keys from `key` on, so that scores must be hidden.
    ET_MEMBER bool hides(int64_t key, int64_t near, int64_t far) const { return key + SIDE - 1 > near || key <= limit(far); }
};

// Write the address of the row (hd,) of each column first + x to out (SIDE,), null past the end; columns are of `width` heads
// from `head` on.
template <class T>
ET_INLINE void column_rows(const AttentionRows& rows, const Part& part, int64_t head, int64_t width, int64_t first,
                           int64_t columns, T** out) {
    for (int64_t x = 0; x < SIDE; x++) {
        int64_t column = first + x;
        out[x] = column < columns ? at<T>(rows, part.query + column / width, head + column % width) : nullptr;
    }
}

// rows: 32 addresses of (size,) -> squares (depth, SQUARE) in left form.
template <class T, class E>
ET_INLINE void pack_rows(T* const* rows, int64_t size, E* left) {
    for (int64_t x = 0; x < SIDE; x++) pack_left(left, x, static_cast<const T*>(rows[x]), size);
}

// The 32 keys (or values) of a part from `first` on -> squares (depth, SQUARE) in left form, 0 past the end.
template <class T, class E>
ET_INLINE void pack_keys(const AttentionRows& rows, const Part& part, int64_t kv, int64_t first, int64_t size, E* left) {
    for (int64_t x = 0; x < SIDE; x++)
        pack_left(left, x, first + x < part.keys ? at<const T>(rows, part.key + first + x, kv) : nullptr, size);
}

#include "attention_forward.inl"
#include "attention_backward.inl"

// Lay scratch out, and work in it; if the caller has brought none, only set scratch_bytes.
template <class W>
static void run_attention(AttentionCall& call) {
    W work;
    Arena arena = {static_cast<char*>(call.scratch), 0};
    work.plan(call, arena);
    if (call.scratch) work.run();
    else call.scratch_bytes = arena.used;
}

template <template <class, class> class W>
static void choose_attention(AttentionCall& call) {
#if defined(ET_USE_AVX512_BF16)
    if (call.bf16) return run_attention<W<Bf16, Bf16>>(call);
#endif
    if (call.bf16) return run_attention<W<Bf16, float>>(call);
    run_attention<W<float, float>>(call);
}

}  // namespace attention

// Both are called twice: without scratch they set scratch_bytes, with it they compute. Shapes: structures.h, AttentionCall.
// Forward: reads q, k, v; writes o and lse. Backward: reads q, k, v, o, dout and lse; writes dq, dk and dv. Rows outside every
// segment are not written.

static void attention_forward(AttentionCall* call) { attention::choose_attention<attention::Forward>(*call); }
static void attention_backward(AttentionCall* call) { attention::choose_attention<attention::Backward>(*call); }

#define ET_ATTENTION_KERNELS(X) X(attention_forward) X(attention_backward)
