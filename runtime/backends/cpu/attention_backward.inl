// attention.inl's backward pass. P is recomputed from the log-sum-exp. A task is some heads of one key head of one part, from
// the first query to the last. It alone writes dq of its columns, and its own share of dk and dv; shares are added up at the
// end, in order.

template <class T, class E>
struct Backward : Work<E> {
    // A thread's scratch. n = BACK_COLUMN_SQUARES, m = BACK_KEY_SQUARES: q to dout_right (n, depth, SQUARE); p to ds_right
    // (m, n, SQUARE); scores, dp (SQUARE,); dq (n, depth * 32, 32); lse, delta (n, 32); sights (n,).
    struct Own {
        E *packed, *q, *q_right, *dout, *dout_right, *p, *ds, *ds_right;
        float *scores, *dp, *dq, *lse, *delta;
        Sight* sights;
    };
    int64_t width, chunks;  // heads in a task; tasks for each key head
    float *dk, *dv;         // (chunks, KV, squares, 32, depth * 32)
    char* own_base;
    int64_t own_bytes;

    Own own(Arena arena, int64_t* bytes = nullptr) const {
        constexpr int64_t n = BACK_COLUMN_SQUARES, m = BACK_KEY_SQUARES * n * SQUARE;
        int64_t head = this->depth * SQUARE;
        Own o;
        o.packed = arena.template take<E>(head);
        o.q = arena.template take<E>(n * head), o.q_right = arena.template take<E>(n * head);
        o.dout = arena.template take<E>(n * head), o.dout_right = arena.template take<E>(n * head);
        o.p = arena.template take<E>(m), o.ds = arena.template take<E>(m), o.ds_right = arena.template take<E>(m);
        o.scores = arena.template take<float>(SQUARE), o.dp = arena.template take<float>(SQUARE);
        o.dq = arena.template take<float>(n * head);
        o.lse = arena.template take<float>(n * SIDE), o.delta = arena.template take<float>(n * SIDE);
        o.sights = arena.template take<Sight>(n);
        if (bytes) *bytes = arena.used;
        return o;
    }

    void plan(AttentionCall& call, Arena& arena) {
        this->begin(call, arena);
        int64_t total = 0, longest = 1;
        for (int64_t i = 0; i < call.segment_count; i++) {
            int64_t n = call.segments[4 * i + 1] - call.segments[4 * i];
            total += n, longest = n > longest ? n : longest;
        }
        // Depends on shapes alone, never on the number of threads, since it decides in which order dk and dv are summed.
        int64_t wanted = ceil_div(BACK_TASKS, call.kv_heads * (total / longest > 0 ? total / longest : 1));
        width = ceil_div(this->groups, wanted < this->groups ? wanted : this->groups);
        chunks = ceil_div(this->groups, width);
        for (int64_t i = 0; i < call.segment_count; i++) {
            const int64_t* s = call.segments + 4 * i;
            if (s[3] > s[2]) this->add(s, ceil_div(s[3] - s[2], SIDE), chunks * call.kv_heads);
        }
        int64_t numbers = this->squares * call.kv_heads * this->depth * SQUARE;
        this->keys = arena.take<E>(numbers), this->values = arena.take<E>(numbers), this->keys_turned = arena.take<E>(numbers);
        dk = arena.take<float>(numbers * chunks), dv = arena.take<float>(numbers * chunks);
        own({nullptr, 0}, &own_bytes);
        own_base = arena.take<char>(own_bytes * call.threads);
    }

    // Pack one square of keys in left form, of values in left form, and of K^T in left form.
    void pack(const Part& part, int64_t kv, int64_t square, const Own& o) const {
        const AttentionCall& call = *this->call;
        int64_t first = (square - part.squares_before) * SIDE;
        E* keys = this->packed(this->keys, kv, square);
        pack_keys<T>(call.v, part, kv, first, call.size, this->packed(this->values, kv, square));
        pack_keys<T>(call.k, part, kv, first, call.size, keys);
        turn_squares(keys, o.packed, this->depth);
        transpose_squares(o.packed, this->packed(this->keys_turned, kv, square), this->depth);
    }

    // Prepare 32 columns as column square c: q and do packed for both products they stand in (Q^T in right form for scores, Q
    // in right form for dk), their log-sum-exp in base 2, and delta = sum(do * o).
    void prepare(const Part& part, int64_t head, int64_t heads, int64_t first, int64_t columns, int64_t c, const Own& o) const {
        const AttentionCall& call = *this->call;
        const int64_t depth = this->depth, place = c * depth * SQUARE;
        T *q[SIDE], *dout[SIDE], *out[SIDE];
        column_rows<T>(call.q, part, head, heads, first, columns, q);
        column_rows<T>(call.dout, part, head, heads, first, columns, dout);
        column_rows<T>(call.o, part, head, heads, first, columns, out);
        pack_rows(q, call.size, o.packed);
        transpose_squares(o.packed, o.q + place, depth);
        turn_squares(o.packed, o.q_right + place, depth);
        pack_rows(dout, call.size, o.packed);
        transpose_squares(o.packed, o.dout + place, depth);
        turn_squares(o.packed, o.dout_right + place, depth);
        for (int64_t x = 0; x < SIDE; x++) {
            float sum = 0, lse = NO_PROBABILITY;  // kept past the end
            if (q[x]) {
                const T *a = dout[x], *b = out[x];
                int64_t size = call.size, column = first + x;
                ET_SIMD_SUM(sum)
                for (int64_t d = 0; d < size; d++) sum += load(a + d) * load(b + d);
                lse = LOG2_E * call.lse[(head + column % heads) * call.queries + part.query + column / heads];
            }
            o.delta[c * SIDE + x] = sum, o.lse[c * SIDE + x] = lse;
        }
    }

    // Compute dq of all columns of `chunk` (some heads of key head kv), and their share of dk and dv.
    void task(const Part& part, int64_t kv, int64_t chunk, const Own& o) const {
        const AttentionCall& call = *this->call;
        const int64_t numbers = this->depth * SQUARE;
        const int64_t share = ((chunk * call.kv_heads + kv) * this->squares + part.squares_before) * numbers;
        const int64_t left = this->groups - chunk * width, heads = left < width ? left : width;
        const int64_t head = kv * this->groups + chunk * width, columns = part.queries * heads;
        memset(dk + share, 0, ceil_div(part.keys, SIDE) * numbers * 4);
        memset(dv + share, 0, ceil_div(part.keys, SIDE) * numbers * 4);
        for (int64_t first = 0; first < columns; first += BACK_COLUMN_SQUARES * SIDE) {
            int64_t n = ceil_div(columns - first, SIDE), near[BACK_COLUMN_SQUARES], far[BACK_COLUMN_SQUARES];
            if (n > BACK_COLUMN_SQUARES) n = BACK_COLUMN_SQUARES;
            for (int64_t c = 0; c < n; c++) {
                this->look(part, first + c * SIDE, columns, heads, o.sights[c], near[c], far[c]);
                prepare(part, head, heads, first + c * SIDE, columns, c, o);
            }
            memset(o.dq, 0, n * numbers * 4);
            int64_t end = far[n - 1] / SIDE + 1;
            for (int64_t square = (this->limit(near[0]) + 1) / SIDE; square < end; square += BACK_KEY_SQUARES) {
                int64_t m = end - square < BACK_KEY_SQUARES ? end - square : BACK_KEY_SQUARES;
                meet(part, kv, square, m, n, near, far, share, o);
            }
            float factor[SIDE];
            for (int64_t x = 0; x < SIDE; x++) factor[x] = call.scale;
            for (int64_t c = 0; c < n; c++) {
                T* rows[SIDE];
                int64_t here = first + c * SIDE;
                column_rows<T>(call.dq, part, head, heads, here, columns, rows);
                unpack_columns(o.dq + c * numbers, factor, rows, columns - here < SIDE ? columns - here : SIDE, call.size);
            }
        }
    }

    // Multiply m squares of keys from `square` on with n squares of columns: P and dS of each pair that is not hidden
    // altogether, then dv += P dO, dk += dS Q and, at the end, dq += K^T dS. `share`: where this task's share of dk and dv
    // begins.
    void meet(const Part& part, int64_t kv, int64_t square, int64_t m, int64_t n, const int64_t* near, const int64_t* far,
              int64_t share, const Own& o) const {
        const int64_t depth = this->depth, numbers = depth * SQUARE, line = depth * SIDE;
        const E* values = this->packed(this->values, kv, part.squares_before + square);
        const E* keys = this->packed(this->keys, kv, part.squares_before + square);
        const E* turned = this->packed(this->keys_turned, kv, part.squares_before + square);
        const float factor = this->call->scale * LOG2_E;
        Range seen[BACK_COLUMN_SQUARES];  // of key squares, for each column square
        for (int64_t c = 0; c < n; c++) seen[c] = {m, 0};
        for (int64_t i = 0; i < m; i++) {
            int64_t key = (square + i) * SIDE, from = n, to = 0;
            for (int64_t c = 0; c < n; c++) {
                if (key > far[c] || key + SIDE - 1 <= this->limit(near[c])) continue;
                if (c < from) from = c;
                if (i < seen[c].begin) seen[c].begin = i;
                to = c + 1, seen[c].end = i + 1;
                multiply_squares(o.scores, SIDE, keys + i * numbers, SQUARE, o.q + c * numbers, SQUARE, depth, false);
                multiply_squares(o.dp, SIDE, values + i * numbers, SQUARE, o.dout + c * numbers, SQUARE, depth, false);
                if (this->hides(key, near[c], far[c])) hide(o.scores, o.sights[c], key);
                int64_t place = (i * BACK_COLUMN_SQUARES + c) * SQUARE;
                Gradients<E> out = {o.p + place, o.ds + place, o.ds_right + place};
                score_gradients(o.scores, o.dp, factor, o.lse + c * SIDE, o.delta + c * SIDE, out);
            }
            if (from >= to) continue;
            const int64_t row = share + (square + i) * numbers, place = (i * BACK_COLUMN_SQUARES + from) * SQUARE;
            for (int64_t d = 0; d < depth; d++) {
                const int64_t right = from * numbers + d * SQUARE;
                float *dv_here = dv + row + d * SIDE, *dk_here = dk + row + d * SIDE;
                multiply_squares(dv_here, line, o.p + place, SQUARE, o.dout_right + right, numbers, to - from, true);
                multiply_squares(dk_here, line, o.ds + place, SQUARE, o.q_right + right, numbers, to - from, true);
            }
        }
        for (int64_t c = 0; c < n; c++)
            for (int64_t d = 0; d < depth && seen[c].begin < seen[c].end; d++)
                multiply_squares(o.dq + c * numbers + d * SQUARE, SIDE, turned + seen[c].begin * numbers + d * SQUARE, numbers,
                                 o.ds_right + (seen[c].begin * BACK_COLUMN_SQUARES + c) * SQUARE, BACK_COLUMN_SQUARES * SQUARE,
                                 seen[c].end - seen[c].begin, true);
    }

    // Add up the shares of one square of keys in order, times factor, and write them.
    void add_up(const float* shares, const AttentionRows& rows, const Part& part, int64_t kv, int64_t square,
                float factor) const {
        const AttentionCall& call = *this->call;
        const int64_t line = this->depth * SIDE, step = call.kv_heads * this->squares * this->depth * SQUARE;
        const int64_t first = (square - part.squares_before) * SIDE;
        const float* from = shares + (kv * this->squares + square) * this->depth * SQUARE;
        for (int64_t x = 0; x < SIDE && first + x < part.keys; x++, from += line) {
            T* to = at<T>(rows, part.key + first + x, kv);
            for (int64_t d = 0; d < call.size; d += 16) {
                float sums[16];
                memcpy(sums, from + d, 64);
                for (int64_t chunk = 1; chunk < chunks; chunk++) {
                    const float* more = from + chunk * step + d;
                    ET_SIMD
                    for (int64_t i = 0; i < 16; i++) sums[i] += more[i];
                }
                int64_t n = call.size - d < 16 ? call.size - d : 16;
                for (int64_t i = 0; i < n; i++) store(to + d + i, sums[i] * factor);
            }
        }
    }

    // Pack all keys, compute all tasks, then add up their shares of dk and dv. Pieces use the scratch of the thread that takes
    // them.
    void run() const {
        const int threads = int(this->call->threads);
        const int64_t heads = this->call->kv_heads;
        for_pieces(threads, this->squares * heads, [&](int64_t i, int slot) {
            pack(this->part_of_square(i / heads), i % heads, i / heads, own({own_base + slot * own_bytes, 0}));
        });
        for_pieces(threads, this->tasks, [&](int64_t i, int slot) {
            const Part& part = this->part_of_task(i);
            const int64_t number = i - part.tasks_before;
            products_begin();
            task(part, number / chunks, number % chunks, own({own_base + slot * own_bytes, 0}));
            products_end();
        });
        for_pieces(threads, this->squares * heads, [&](int64_t i, int) {
            const Part& part = this->part_of_square(i / heads);
            add_up(dk, this->call->dk, part, i % heads, i / heads, this->call->scale);
            add_up(dv, this->call->dv, part, i % heads, i / heads, 1.0f);
        });
    }
};
