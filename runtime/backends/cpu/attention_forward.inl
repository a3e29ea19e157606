// attention.inl's forward pass. A task is 32 columns; their output (O^T = V^T P^T, hd x columns) stays in the first cache.

template <class T, class E>
struct Forward : Work<E> {
    // A thread's scratch.
    struct Own {
        E *packed, *turned;   // (depth, SQUARE) each
        E* q;                 // (depth, SQUARE), right form
        E* p;                 // (KEY_SQUARES, SQUARE): probabilities, right form
        E *keys, *values;     // (KEY_SQUARES, depth, SQUARE), for parts with one block of columns
        float *scores, *out;  // (KEY_SQUARES, SQUARE); (depth * 32, 32)
    };
    char* own_base;
    int64_t own_bytes;

    Own own(Arena arena) const {
        int64_t head = this->depth * SQUARE;
        Own o;
        o.packed = arena.template take<E>(head), o.turned = arena.template take<E>(head), o.q = arena.template take<E>(head);
        o.p = arena.template take<E>(KEY_SQUARES * SQUARE);
        o.keys = arena.template take<E>(KEY_SQUARES * head), o.values = arena.template take<E>(KEY_SQUARES * head);
        o.scores = arena.template take<float>(KEY_SQUARES * SQUARE), o.out = arena.template take<float>(head);
        return o;
    }

    void plan(AttentionCall& call, Arena& arena) {
        this->begin(call, arena);
        for (int64_t i = 0; i < call.segment_count; i++) {
            const int64_t* s = call.segments + 4 * i;
            int64_t blocks = ceil_div((s[1] - s[0]) * this->groups, SIDE);
            // Keys that meet only one block of columns (a generated token) are packed by its task, the others once for all.
            if (blocks > 0) this->add(s, blocks > 1 ? ceil_div(s[3] - s[2], SIDE) : 0, blocks * call.kv_heads);
        }
        int64_t numbers = this->squares * call.kv_heads * this->depth * SQUARE;
        this->keys = arena.take<E>(numbers), this->values = arena.take<E>(numbers);
        int64_t head = this->depth * SQUARE;
        own_bytes = (3 + 2 * KEY_SQUARES) * head * sizeof(E) + KEY_SQUARES * SQUARE * (sizeof(E) + 4) + head * 4;
        own_base = arena.take<char>(own_bytes * call.threads);
    }

    // Pack one square of keys in left form, and of values as V^T in left form.
    void pack(const Part& part, int64_t kv, int64_t square, const Own& o, E* keys, E* values) const {
        const AttentionCall& call = *this->call;
        pack_keys<T>(call.k, part, kv, square * SIDE, call.size, keys);
        pack_keys<T>(call.v, part, kv, square * SIDE, call.size, o.packed);
        turn_squares(o.packed, o.turned, this->depth);
        transpose_squares(o.turned, values, this->depth);
    }

    // Compute 32 columns from `first` on, `columns` in all. shared: keys and values have been packed for all blocks.
    // Online softmax: sums and output are relative to a running maximum, and are rescaled when a score rises far above it.
    void block(const Part& part, int64_t kv, int64_t first, int64_t columns, bool shared, const Own& o) const {
        const AttentionCall& call = *this->call;
        const int64_t depth = this->depth, head = kv * this->groups;
        Sight sight;
        int64_t near, far;
        this->look(part, first, columns, this->groups, sight, near, far);
        T* rows[SIDE];
        column_rows<T>(call.q, part, head, this->groups, first, columns, rows);
        pack_rows(rows, call.size, o.packed);
        transpose_squares(o.packed, o.q, depth);
        Softmax state;
        for (int64_t x = 0; x < SIDE; x++) state.top[x] = NO_MAXIMUM, state.sum[x] = 0;
        const float factor = call.scale * LOG2_E;
        const int64_t begin = (this->limit(near) + 1) / SIDE, end = far / SIDE + 1;
        for (int64_t square = begin; square < end; square += KEY_SQUARES) {
            int64_t n = end - square < KEY_SQUARES ? end - square : KEY_SQUARES;
            const E *keys = o.keys, *values = o.values;
            if (shared) {
                keys = this->packed(this->keys, kv, part.squares_before + square);
                values = this->packed(this->values, kv, part.squares_before + square);
            } else {
                for (int64_t i = 0, place = 0; i < n; i++, place += depth * SQUARE)
                    pack(part, kv, square + i, o, o.keys + place, o.values + place);
            }
            for (int64_t i = 0; i < n; i++) {
                float* scores = o.scores + i * SQUARE;
                multiply_squares(scores, SIDE, keys + i * depth * SQUARE, SQUARE, o.q, SQUARE, depth, false);
                if (this->hides((square + i) * SIDE, near, far)) hide(scores, sight, (square + i) * SIDE);
            }
            float alpha[SIDE];
            if (raise_top(o.scores, n, factor, state, alpha) && square > begin)
                for (int64_t d = 0; d < depth * SIDE; d++)
                    for (int64_t x = 0; x < SIDE; x += LANES)
                        put(o.out + d * SIDE + x, get(o.out + d * SIDE + x) * get(alpha + x));
            probabilities<E>(o.scores, n, factor, state, o.p);
            for (int64_t d = 0; d < depth; d++)
                multiply_squares(o.out + d * SQUARE, SIDE, values + d * SQUARE, depth * SQUARE, o.p, SQUARE, n, square > begin);
        }
        finish(part, head, first, columns, state, o);
    }

    // Divide the output by its sums, and write it and the log-sum-exp.
    void finish(const Part& part, int64_t head, int64_t first, int64_t columns, const Softmax& state, const Own& o) const {
        const AttentionCall& call = *this->call;
        float factor[SIDE];
        T* rows[SIDE];
        for (int64_t x = 0; x < SIDE; x++) factor[x] = 1.0f / state.sum[x];
        column_rows<T>(call.o, part, head, this->groups, first, columns, rows);
        int64_t n = columns - first < SIDE ? columns - first : SIDE;
        unpack_columns(o.out, factor, rows, n, call.size);
        for (int64_t x = 0; x < n; x++) {
            int64_t column = first + x;
            float* lse = call.lse + (head + column % this->groups) * call.queries + part.query + column / this->groups;
            *lse = LN_2 * state.top[x] + natural_log(state.sum[x]);
        }
    }

    // Pack all keys, then compute all blocks. Pieces use the scratch of the thread that takes them.
    void run() const {
        const int threads = int(this->call->threads);
        const int64_t heads = this->call->kv_heads;
        for_pieces(threads, this->squares * heads, [&](int64_t i, int slot) {
            const int64_t square = i / heads, kv = i % heads;
            const Part& part = this->part_of_square(square);
            pack(part, kv, square - part.squares_before, own({own_base + slot * own_bytes, 0}),
                 this->packed(this->keys, kv, square), this->packed(this->values, kv, square));
        });
        for_pieces(threads, this->tasks, [&](int64_t i, int slot) {
            const Part& part = this->part_of_task(i);
            const int64_t columns = part.queries * this->groups, blocks = ceil_div(columns, SIDE), task = i - part.tasks_before;
            const int64_t number = blocks - 1 - task % blocks;  // the longest first
            products_begin();
            block(part, task / blocks, number * SIDE, columns, blocks > 1, own({own_base + slot * own_bytes, 0}));
            products_end();
        });
    }
};
