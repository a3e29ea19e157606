// One step of decoding as one call: all transformer blocks, the final norm and the head, for a few new tokens of one sequence.
//
// One team of threads goes through the phases of a block together, and meets at a barrier wherever a phase reads what other
// threads wrote. Rows of every product are shared out in the same way each time, and no sum is split between threads, so
// results do not depend on how many there are. Norms and the layout of activations are small: each thread computes them for
// itself, which is cheaper than meeting once more.
//
// Shapes: n <= MAX_TOKENS tokens, D hidden, F ffn, H query and KV key/value heads of hd; h (n, D) fp32, updated in place.

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Cuts arrays off a piece of memory, each at a multiple of ALIGNMENT. Without memory (at null), it only measures.
struct Cutter {
    uint8_t* at;
    int64_t used;
    float* floats(int64_t count) { return reinterpret_cast<float*>(bytes(count * 4)); }
    uint8_t* bytes(int64_t count) {
        uint8_t* piece = at + used;
        used += round_up(count, ALIGNMENT);
        return piece;
    }
};

// Activations that the whole team reads and writes.
struct Shared {
    float* qkv;         // (n, (H + 2 KV) * hd)
    float* attended;    // (n, H * hd)
    float* gate_up;     // (n, 2 F)
    float* active;      // (n, F): activation(gate) * up
    float* out;         // (n, D): a product before it is added to h
    float* reduced[3];  // (n, rank): x A^T of up to three linears
    int64_t used;
    Shared(const DecodeShape& s, int64_t n, int64_t rank, uint8_t* space) {
        Cutter cut = {space, 0};
        qkv = cut.floats(n * (s.heads + 2 * s.kv_heads) * s.head_dim);
        attended = cut.floats(n * s.heads * s.head_dim);
        gate_up = cut.floats(n * 2 * s.ffn);
        active = cut.floats(n * s.ffn);
        out = cut.floats(n * s.hidden);
        for (float*& part : reduced) part = cut.floats(n * rank);
        used = cut.used;
    }
};

// Scratch that each thread has for itself.
struct Own {
    float* normed;         // (n, D)
    float* scores;         // (H / KV, max_length padded to DECODE_TILE)
    float* tile;           // (DECODE_TILE, hd)
    uint8_t* activations;  // what lay_out writes, for the widest linear
    int64_t used;
    Own(const DecodeShape& s, int64_t n, uint8_t* space) {
        Cutter cut = {space, 0};
        normed = cut.floats(n * s.hidden);
        scores = cut.floats(s.heads / s.kv_heads * round_up(s.max_length, DECODE_TILE));
        tile = cut.floats(DECODE_TILE * s.head_dim);
        activations = cut.bytes(n * activation_bytes(larger(larger(s.hidden, s.ffn), s.heads * s.head_dim)));
        used = cut.used;
    }
};

static int64_t largest_rank(const DecodeBlock* blocks, int64_t count) {
    int64_t rank = 0;
    for (int64_t i = 0; i < count; i++)
        for (const DecodeLinear* w = &blocks[i].q; w <= &blocks[i].down; w++) rank = larger(rank, w->rank);
    return rank;
}

// Kernel: write the bytes of a DecodeJob's whole space to bytes[0], and of one thread's own part of it to bytes[1], for n
// tokens and this many threads.
static void decode_space(const DecodeShape* shape, const DecodeBlock* blocks, int64_t block_count, int64_t n, int64_t threads,
                         int64_t* bytes) {
    bytes[1] = Own(*shape, n, nullptr).used;
    bytes[0] = threads * bytes[1] + Shared(*shape, n, largest_rank(blocks, block_count), nullptr).used;
}

// ---- tiles: DECODE_TILE keys or values as fp32 (DECODE_TILE, hd); rows beyond `count` may hold anything ----

ET_INLINE const float* as_f32(const float* rows, int64_t count, int64_t hd, float* space) {
    if (count == DECODE_TILE) return rows;  // only a short tile is copied, so that reading a whole one stays inside memory
    memcpy(space, rows, size_t(count * hd) * 4);
    return space;
}
ET_INLINE const float* as_f32(const Bf16* rows, int64_t count, int64_t hd, float* space) {
    each(count * hd, [&](int64_t i, auto part) { put(space + i, get(rows + i, part), part); });
    return space;
}

// In lanes l whose index lacks the bit STEP: a[l] + a[l + STEP]; in the others: b[l - STEP] + b[l].
template <int STEP>
ET_INLINE Floats fold_pair(Floats a, Floats b) {
#if defined(__clang__)
    Floats straight = a, crossed = b;
    for (int l = 0; l < LANES; l++) straight[l] = l & STEP ? b[l] : a[l], crossed[l] = l & STEP ? b[l - STEP] : a[l + STEP];
    return straight + crossed;
#elif defined(__GNUC__)
    Words straight, crossed;
    for (int l = 0; l < LANES; l++) {
        straight[l] = uint32_t(l & STEP ? LANES + l : l);
        crossed[l] = uint32_t(l & STEP ? LANES + l - STEP : l + STEP);
    }
    return __builtin_shuffle(a, b, straight) + __builtin_shuffle(a, b, crossed);
#else
    return a + b;  // never called: these compilers have one lane
#endif
}

// Put the sum of x[i]'s lanes into lane i of x[0], for LANES registers x: neighbours are folded into one register, then pairs
// of those, and so on. That is fewer steps than summing each register by itself.
template <int STEP>
ET_INLINE void fold(Floats* x) {
    if constexpr (STEP < LANES) {
        for (int i = 0; i < LANES; i += 2 * STEP) x[i] = fold_pair<STEP>(x[i], x[i + STEP]);
        fold<2 * STEP>(x);
    }
}

// scores (DECODE_TILE,) = q (hd,) . keys (DECODE_TILE, hd)
static void score_tile(const float* q, const float* keys, int64_t hd, float* scores) {
    for (int64_t j = 0; j < DECODE_TILE; j += LANES) {
        Floats sums[LANES];
        for (Floats& sum : sums) sum = Floats{};
        each(hd, [&](int64_t i, auto part) {
            const Floats x = get(q + i, part);
            for (int64_t k = 0; k < LANES; k++) sums[k] = fused(get(keys + (j + k) * hd + i, part), x, sums[k]);
        });
        fold<1>(sums);
        put(scores + j, sums[0]);
    }
}

// out (hd,) += weights (count,) . values (count, hd)
static void add_tile(const float* weights, const float* values, int64_t count, int64_t hd, float* out) {
    int64_t i = 0;
    for (; i + 4 * LANES <= hd; i += 4 * LANES) {  // four sums in flight
        Floats a = get(out + i), b = get(out + i + LANES), c = get(out + i + 2 * LANES), d = get(out + i + 3 * LANES);
        for (int64_t j = 0; j < count; j++) {
            const float* v = values + j * hd + i;
            Floats weight = all(weights[j]);
            a = fused(get(v), weight, a), b = fused(get(v + LANES), weight, b);
            c = fused(get(v + 2 * LANES), weight, c), d = fused(get(v + 3 * LANES), weight, d);
        }
        put(out + i, a), put(out + i + LANES, b), put(out + i + 2 * LANES, c), put(out + i + 3 * LANES, d);
    }
    each(hd - i, [&](int64_t k, auto part) {
        Floats total = get(out + i + k, part);
        for (int64_t j = 0; j < count; j++) total = fused(get(values + j * hd + i + k, part), all(weights[j]), total);
        put(out + i + k, total, part);
    });
}

// One thread's part of a step.
struct Worker {
    const DecodeJob& job;
    const DecodeShape& s;
    Meeting* meeting;
    int index, count;
    Shared shared;
    Own own;
    Activations tokens[MAX_TOKENS];

    Worker(const DecodeJob& job, int64_t rank, Meeting* meeting, int index, int count, int threads)
        : job(job), s(*job.shape), meeting(meeting), index(index), count(count),
          shared(s, job.n, rank, job.space + threads * job.space_own), own(s, job.n, job.space + index * job.space_own) {}

    int n() const { return int(job.n); }
    void meet() const { edgetune::meet(meeting, count); }
    Range mine(int64_t items, int64_t grain) const { return share(items, grain, index, count); }

    // Compute y[i] (n, stride) = x W_i^T + bias + x A_i^T B_i^T, this thread's rows of each of `linears` linears. They share x,
    // which is laid out in `tokens`. The team meets once, between x A^T and its use.
    void project(const DecodeLinear* const* w, int linears, float* const* y, int64_t stride) {
        bool adapted = false;
        for (int i = 0; i < linears; i++) {
            if (!w[i]->rank) continue;
            adapted = true;
            Range rows = mine(w[i]->rank, RANK_GRAIN);
            dense_range(w[i]->lora_kind, w[i]->lora_A, w[i]->cols, tokens, n(), shared.reduced[i], w[i]->rank, rows.begin,
                        rows.end);
        }
        if (adapted) meet();
        for (int i = 0; i < linears; i++) {
            Range rows = mine(w[i]->rows, LORA_PANEL);
            product_range(*w[i], s.compute, tokens, n(), y[i], stride, rows.begin, rows.end);
            for (int64_t t = 0; t < n(); t++) {
                const float* xa = shared.reduced[i] + t * w[i]->rank;
                if (w[i]->bias) add(w[i]->bias, y[i] + t * stride, rows);
                if (w[i]->lora_kind == DENSE_BF16) add_adapter<Bf16>(*w[i], xa, y[i] + t * stride, rows);
                else add_adapter<float>(*w[i], xa, y[i] + t * stride, rows);
            }
        }
    }

    // y[rows] += scale * x[rows]
    static void add(const float* x, float* y, Range rows, float scale = 1.0f) {
        each(rows.end - rows.begin, [&](int64_t i, auto part) {
            put(y + rows.begin + i, get(y + rows.begin + i, part) + get(x + rows.begin + i, part) * scale, part);
        });
    }

    // y[rows] += B xa, with xa (rank,), a panel of LORA_PANEL rows of B at a time.
    template <class T>
    static void add_adapter(const DecodeLinear& w, const float* xa, float* y, Range rows) {
        for (int64_t row = rows.begin; row < rows.end && w.rank; row += LORA_PANEL) {
            const int64_t there = rows.end - row < LORA_PANEL ? rows.end - row : LORA_PANEL;
            const T* b = static_cast<const T*>(w.lora_B) + row * w.rank;
            each(there, [&](int64_t i, auto part) {
                Floats total = get(y + row + i, part);
                for (int64_t k = 0; k < w.rank; k++) total = fused(get(b + k * LORA_PANEL + i), all(xa[k]), total);
                put(y + row + i, total, part);
            });
        }
    }

    // h += residual * x W^T for this thread's rows; norm (D,): of the product first, if not null. x (n, w.cols): written by the
    // whole team before the last meeting.
    void add_product(const DecodeLinear& w, const float* x, const float* norm) {
        lay_out(s.compute, x, n(), w.cols, own.activations, tokens);
        const DecodeLinear* linear = &w;
        project(&linear, 1, &shared.out, s.hidden);
        const float* out = shared.out;
        if (norm) {
            meet();
            rms_norm(shared.out, s.hidden, norm, s.eps, job.n, s.hidden, own.normed, s.hidden, 1);
            out = own.normed;
        }
        Range rows = mine(s.hidden, LORA_PANEL);
        for (int64_t t = 0; t < n(); t++) add(out + t * s.hidden, job.h + t * s.hidden, rows, s.residual);
        meet();
    }

    // The norm of h (n, cols) times weight (cols,), laid out in `tokens`; every thread does the whole of it.
    void normalise(const float* weight, int64_t cols) {
        rms_norm(job.h, cols, weight, s.eps, job.n, cols, own.normed, cols, 1);
        lay_out(s.compute, own.normed, n(), cols, own.activations, tokens);
    }

    // ---- attention ----

    template <class T>
    T* cached(void* cache, int64_t kv_head, int64_t position) const {
        return static_cast<T*>(cache) + (kv_head * s.max_length + position) * s.head_dim;
    }

    // Norm and rotate q and k in place, and store k and v in the cache.
    template <class T>
    void rotate_and_store(const DecodeBlock& block) {
        const int64_t heads = s.heads + 2 * s.kv_heads, hd = s.head_dim, half = s.rotated / 2;
        Range items = mine(job.n * heads, 1);
        for (int64_t item = items.begin; item < items.end; item++) {
            const int64_t head = item % heads, position = job.position + item / heads;
            float* x = shared.qkv + item * hd;
            const bool query = head < s.heads, key = !query && head < s.heads + s.kv_heads;
            if (query || key) {
                const float* weight = query ? block.q_norm : block.k_norm;
                if (weight) rms_norm(x, hd, weight, s.eps, 1, hd, x, hd, 1);
                const float *c = query ? block.q_cosines : block.k_cosines, *sines = query ? block.q_sines : block.k_sines;
                if (c) rope(x, hd, hd, c + position * half, sines + position * half, 0, 1, 1, half, 1);
            }
            if (query) continue;
            T* cache = key ? cached<T>(block.keys, head - s.heads, position)
                           : cached<T>(block.values, head - s.heads - s.kv_heads, position);
            each(hd, [&](int64_t i, auto part) { put(cache + i, get(x + i, part), part); });
        }
        meet();
    }

    // Attention of query heads [first, first + group) of one token. They share a key/value head, so each tile of keys and of
    // values is brought to fp32 once for all of them.
    template <class T>
    void attend(const DecodeBlock& block, int64_t token, int64_t first, int64_t group) {
        const int64_t hd = s.head_dim, end = job.position + token + 1, kv_head = first / (s.heads / s.kv_heads);
        const int64_t begin = block.window && end > block.window ? end - block.window : 0, seen = end - begin;
        const float* q = shared.qkv + (token * (s.heads + 2 * s.kv_heads) + first) * hd;
        float* out = shared.attended + (token * s.heads + first) * hd;
        const T *keys = cached<T>(block.keys, kv_head, begin), *values = cached<T>(block.values, kv_head, begin);
        const int64_t stride = round_up(seen, DECODE_TILE);
        for (int64_t j = 0; j < seen; j += DECODE_TILE) {
            const int64_t count = seen - j < DECODE_TILE ? seen - j : DECODE_TILE;
            const float* tile = as_f32(keys + j * hd, count, hd, own.tile);
            for (int64_t g = 0; g < group; g++) score_tile(q + g * hd, tile, hd, own.scores + g * stride + j);
        }
        for (int64_t g = 0; g < group; g++) softmax(own.scores + g * stride, seen);
        memset(out, 0, size_t(group * hd) * 4);
        for (int64_t j = 0; j < seen; j += DECODE_TILE) {
            const int64_t count = seen - j < DECODE_TILE ? seen - j : DECODE_TILE;
            const float* tile = as_f32(values + j * hd, count, hd, own.tile);
            for (int64_t g = 0; g < group; g++) add_tile(own.scores + g * stride + j, tile, count, hd, out + g * hd);
        }
    }

    // scores (seen,) become softmax(scores * scale) in place.
    void softmax(float* scores, int64_t seen) const {
        const float lowest = from_bits(MINUS_INFINITY_BITS);
        Floats most = all(lowest), total = {};
        each(seen, [&](int64_t i, auto part) { most = larger(most, get(scores + i, part, lowest)); });
        const float top = largest(most);
        each(seen, [&](int64_t i, auto part) {
            Floats weight = exponential((get(scores + i, part, lowest) - top) * s.scale);
            total = total + weight;
            put(scores + i, weight, part);
        });
        const float inverse = 1.0f / sum(total);
        each(seen, [&](int64_t i, auto part) { put(scores + i, get(scores + i, part) * inverse, part); });
    }

    // Heads that share keys go to one thread, unless there are more threads than groups of such heads.
    template <class T>
    void attend_all(const DecodeBlock& block) {
        const int64_t group = job.n * s.kv_heads >= count ? s.heads / s.kv_heads : 1, groups = s.heads / group;
        Range items = mine(job.n * groups, 1);
        for (int64_t item = items.begin; item < items.end; item++)
            attend<T>(block, item / groups, item % groups * group, group);
        meet();
    }

    // ---- the block ----

    void run(const DecodeBlock& block) {
        normalise(block.attn_norm, s.hidden);
        const int64_t hd = s.head_dim, stride = (s.heads + 2 * s.kv_heads) * hd;
        const DecodeLinear* qkv[3] = {&block.q, &block.k, &block.v};
        float* to[3] = {shared.qkv, shared.qkv + s.heads * hd, shared.qkv + (s.heads + s.kv_heads) * hd};
        project(qkv, 3, to, stride);
        meet();
        if (s.cache_bf16) {
            rotate_and_store<Bf16>(block);
            attend_all<Bf16>(block);
        } else {
            rotate_and_store<float>(block);
            attend_all<float>(block);
        }
        add_product(block.o, shared.attended, block.post_attn_norm);
        normalise(block.mlp_norm, s.hidden);
        const DecodeLinear* gate_up[2] = {&block.gate, &block.up};
        float* halves[2] = {shared.gate_up, shared.gate_up + s.ffn};
        project(gate_up, 2, halves, 2 * s.ffn);
        Range mine_of_ffn = mine(s.ffn, LORA_PANEL);
        auto activate = s.gelu ? gated<true, float> : gated<false, float>;
        activate(shared.gate_up + mine_of_ffn.begin, 2 * s.ffn, shared.gate_up + s.ffn + mine_of_ffn.begin, 2 * s.ffn, job.n,
                 mine_of_ffn.end - mine_of_ffn.begin, shared.active + mine_of_ffn.begin, s.ffn, 1);
        meet();
        add_product(block.down, shared.active, block.post_mlp_norm);
    }

    void run_head() {
        normalise(job.norm, s.hidden);
        project(&job.head, 1, const_cast<float* const*>(&job.logits), job.head->rows);
    }
};

struct Team {
    const DecodeJob* job;
    int64_t rank;
    int threads;
    Meeting meeting;
};

static void run_worker(void* argument, int index, int count) {
    Team& team = *static_cast<Team*>(argument);
    Worker worker(*team.job, team.rank, &team.meeting, index, count, team.threads);
    for (int64_t i = 0; i < team.job->block_count; i++) worker.run(team.job->blocks[i]);
    worker.run_head();
}

// Kernel: run one step; see structures.h, DecodeJob.
static void decode(const DecodeJob* job, int threads) {
    Team team = {job, largest_rank(job->blocks, job->block_count), threads, {0, 0}};
    edgetune::parallel(threads, run_worker, &team);
}

#define ET_DECODE_KERNELS(X) X(decode) X(decode_space)
