// Causal attention, forward and backward, in squares of 32 keys x 32 queries: never a T x T matrix (FlashAttention, Dao et al.
// 2022, arXiv 2205.14135, and its second part for the backward). The same face as attention.py, which is the reference.
//
// A part is a segment: the last of its queries sees the last of its keys. A column is one query of one head: the G heads that
// share a key head stand side by side, position after position (column = query * G + head), so that a key tile is packed once
// for all of them and a short note or a single token wastes little. Everything is computed transposed, S^T = K Q^T (keys x
// columns), which leaves a column's maximum, sum and log-sum-exp in lanes.
//
// Each output is written by one task alone, in an order that does not depend on threads: the same bits at any thread count.

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
    int64_t query, queries, key, keys;
    int64_t squares_before, tasks_before;  // packed key squares and tasks of the parts before this one
};

struct Arena {  // hands out pieces of scratch; without a base it only counts
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

ET_INLINE int64_t take_task(int64_t* counter) {
#if defined(_MSC_VER)
    return _InterlockedExchangeAdd64(reinterpret_cast<volatile long long*>(counter), 1);
#else
    return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
#endif
}

template <class T>
ET_INLINE T* at(const AttentionRows& rows, int64_t row, int64_t head) {
    return static_cast<T*>(rows.data) + row * rows.row + head * rows.head;
}

// What both directions share: the call, its parts, packed keys, counters of tasks.
template <class E>
struct Work {
    AttentionCall* call;
    Part* parts;
    int64_t* counters;
    int64_t count, squares, tasks, groups, depth;  // depth: squares along a head
    E *keys, *values, *keys_turned;

    ET_MEMBER void begin(AttentionCall& attention, Arena& arena) {
        call = &attention;
        groups = attention.heads / attention.kv_heads;
        depth = ceil_div(attention.size, SIDE);
        counters = arena.take<int64_t>(8);
        parts = arena.take<Part>(attention.segment_count);
        count = squares = tasks = 0;
        if (counters) memset(counters, 0, 64);
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
    ET_MEMBER int64_t limit(int64_t query_position) const {  // the last key before a query's window; -1: sees all
        return call->window > 0 && query_position >= call->window ? query_position - call->window : -1;
    }
    // The first 32 columns from `first` on: what they see. Those past the end see what the last one does.
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
    ET_MEMBER bool hides(int64_t key, int64_t near, int64_t far) const { return key + SIDE - 1 > near || key <= limit(far); }
};

// `width` heads from `head` on of one key head: the rows of column first + x. What lies past the end is null.
template <class T>
ET_INLINE void column_rows(const AttentionRows& rows, const Part& part, int64_t head, int64_t width, int64_t first, int64_t columns,
                           T** out) {
    for (int64_t x = 0; x < SIDE; x++) {
        int64_t column = first + x;
        out[x] = column < columns ? at<T>(rows, part.query + column / width, head + column % width) : nullptr;
    }
}

// 32 rows -> left squares.
template <class T, class E>
ET_INLINE void pack_rows(T* const* rows, int64_t size, E* left) {
    for (int64_t x = 0; x < SIDE; x++) pack_left(left, x, static_cast<const T*>(rows[x]), size);
}

// The 32 keys (or values) of a part from `first` on -> left squares.
template <class T, class E>
ET_INLINE void pack_keys(const AttentionRows& rows, const Part& part, int64_t kv, int64_t first, int64_t size, E* left) {
    for (int64_t x = 0; x < SIDE; x++)
        pack_left(left, x, first + x < part.keys ? at<const T>(rows, part.key + first + x, kv) : nullptr, size);
}

#include "attention_forward.inl"
#include "attention_backward.inl"

// Lays scratch out, and runs `work` in it where the caller has brought some.
template <class W>
static void run_attention(AttentionCall& call) {
    W work;
    Arena arena = {static_cast<char*>(call.scratch), 0};
    work.plan(call, arena);
    if (call.scratch) edgetune::parallel(int(call.threads), W::member, &work);
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

static void attention_forward(AttentionCall* call) { attention::choose_attention<attention::Forward>(*call); }
static void attention_backward(AttentionCall* call) { attention::choose_attention<attention::Backward>(*call); }

#define ET_ATTENTION_KERNELS(X) X(attention_forward) X(attention_backward)
