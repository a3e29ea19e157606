// Kernels that work row by row or element by element: RMS norm, SwiGLU and GeGLU, rotary positions, dropout and cross-entropy, with their
// backward passes.
//
// bf16 is read as fp32, computed in fp32, and rounded once. Threads share rows, and no sum crosses a row, so results do not
// depend on the number of threads. An output may replace an input in place (same address, same strides). Strides count
// elements; the last dimension is contiguous.

// ---- RMS norm ----

// h (N, D) / sqrt(mean of h^2 + eps) * weight (D,) -> out (N, D)

template <class T, class W>
void rms_norm(const T* h, int64_t h_stride, const W* weight, float eps, int64_t rows, int64_t width, T* out, int64_t out_stride,
              int threads) {
    parallel_for(threads, rows, ROW_GRAIN, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T* x = h + row * h_stride;
            T* y = out + row * out_stride;
            Floats squares = {};
            each(width, [&](int64_t i, auto part) {
                Floats value = get(x + i, part);
                squares = fused(value, value, squares);
            });
            float scale = 1.0f / square_root(sum(squares) / float(width) + eps);
            each(width, [&](int64_t i, auto part) { put(y + i, get(x + i, part) * scale * get(weight + i, part), part); });
        }
    });
}

// dx (N, D), the gradient of rms_norm's output, -> out (N, D), that of h; the weight is frozen.
// dh = r (w dx - x mean(w dx x)), with r the row's reciprocal root mean square and x = h r.
template <class T, class W>
void rms_norm_backward(const T* dx, int64_t dx_stride, const T* h, int64_t h_stride, const W* weight, float eps, int64_t rows,
                       int64_t width, T* out, int64_t out_stride, int threads) {
    parallel_for(threads, rows, ROW_GRAIN, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T *x = h + row * h_stride, *d = dx + row * dx_stride;
            T* y = out + row * out_stride;
            Floats squares = {}, dots = {};
            each(width, [&](int64_t i, auto part) {
                Floats value = get(x + i, part);
                squares = fused(value, value, squares);
                dots = fused(get(d + i, part) * get(weight + i, part), value, dots);
            });
            float scale = 1.0f / square_root(sum(squares) / float(width) + eps);
            float pull = sum(dots) * scale * scale / float(width);
            each(width, [&](int64_t i, auto part) {
                put(y + i, (get(d + i, part) * get(weight + i, part) - get(x + i, part) * pull) * scale, part);
            });
        }
    });
}

// ---- SwiGLU and GeGLU ----

// Both multiply x by sigmoid(slope(x)): SiLU has slope x, and GELU approximated with tanh has 2 sqrt(2 / pi) (x + 0.044715 x^3),
// since (1 + tanh(y)) / 2 is sigmoid(2 y).

constexpr float GELU_LINEAR = 1.5957691216057308f, GELU_CUBIC = 0.07135481282553537f;

template <bool GELU>
ET_INLINE Floats slope(Floats x) {
    return GELU ? x * (GELU_LINEAR + GELU_CUBIC * x * x) : x;
}

// The derivative of slope.
template <bool GELU>
ET_INLINE Floats rise(Floats x) {
    return GELU ? GELU_LINEAR + 3.0f * GELU_CUBIC * x * x : all(1.0f);
}

// activation(gate) * up -> out, all (N, F)

template <bool GELU, class T>
void gated(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t rows, int64_t width, T* out,
           int64_t out_stride, int threads) {
    parallel_for(threads, rows, 1, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T *g = gate + row * gate_stride, *u = up + row * up_stride;
            T* y = out + row * out_stride;
            each(width, [&](int64_t i, auto part) {
                Floats x = get(g + i, part);
                put(y + i, x * sigmoid(slope<GELU>(x)) * get(u + i, part), part);
            });
        }
    });
}

// dact, the gradient of gated's output, -> dgate and dup, all (N, F)
template <bool GELU, class T>
void gated_backward(const T* dact, int64_t dact_stride, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride,
                    int64_t rows, int64_t width, T* dgate, int64_t dgate_stride, T* dup, int64_t dup_stride, int threads) {
    parallel_for(threads, rows, 1, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T *d = dact + row * dact_stride, *g = gate + row * gate_stride, *u = up + row * up_stride;
            T *dg = dgate + row * dgate_stride, *du = dup + row * dup_stride;
            each(width, [&](int64_t i, auto part) {
                Floats x = get(g + i, part), upper = get(u + i, part), grad = get(d + i, part), s = sigmoid(slope<GELU>(x));
                put(dg + i, grad * upper * s * (1.0f + x * rise<GELU>(x) * (1.0f - s)), part);
                put(du + i, grad * x * s, part);
            });
        }
    });
}

// ---- rotary positions ----

// Rotate x (N, heads, hd) in place, pairing element i with i + half; cosines, sines (N, half), half = hd / 2. inverse:
// backwards.

template <class T>
void rope(T* x, int64_t row_stride, int64_t head_stride, const float* cosines, const float* sines, int inverse, int64_t rows,
          int64_t heads, int64_t half, int threads) {
    float sign = inverse ? -1.0f : 1.0f;
    parallel_for(threads, rows, ROW_GRAIN, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const float *c = cosines + row * half, *s = sines + row * half;
            for (int64_t head = 0; head < heads; head++) {
                T *first = x + row * row_stride + head * head_stride, *second = first + half;
                each(half, [&](int64_t i, auto part) {
                    Floats a = get(first + i, part), b = get(second + i, part);
                    Floats cosine = get(c + i, part), sine = get(s + i, part) * sign;
                    put(first + i, a * cosine - b * sine, part);
                    put(second + i, b * cosine + a * sine, part);
                });
            }
        }
    });
}

// ---- dropout ----

// x (N, D) times scale -> out (N, D), contiguous, or 0 where hash32(flat position ^ seed) < threshold: reference.py's bits. A
// hash instead of a random generator: the backward computes the same mask again, and threads need no order.

template <class T>
void dropout(const T* x, int64_t x_stride, uint64_t key, uint64_t threshold, float scale, int64_t rows, int64_t width, T* out,
             int threads) {
    uint32_t seed = hash32(uint32_t(key)), least = uint32_t(threshold), indices[LANES];
    for (uint32_t i = 0; i < LANES; i++) indices[i] = i;
    Words lanes = read_as<Words>(indices);
    parallel_for(threads, rows, 1, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T* from = x + row * x_stride;
            T* to = out + row * width;
            each(width, [&](int64_t i, auto part) {
                Words hash = hash32((lanes + uint32_t(row * width + i)) ^ seed);
                put(to + i, get(from + i, part) * scale * (hash >= least ? all(1.0f) : all(0.0f)), part);
            });
        }
    });
}

// ---- cross-entropy ----

// Return the largest of x (width,).

template <class T>
ET_INLINE float largest(const T* x, int64_t width) {
    const float lowest = from_bits(MINUS_INFINITY_BITS);
    Floats most = all(lowest);
    each(width, [&](int64_t i, auto part) { most = larger(get(x + i, part, lowest), most); });
    return largest(most);
}

// logits (R, V) become their gradient in place, weight * (softmax - 1 at the target); losses (R,) in nats. targets, weights
// (R,). exponential runs twice over a row instead of storing (V,) fp32 numbers.
template <class T>
void cross_entropy(T* logits, int64_t stride, const int64_t* targets, const float* weights, int64_t rows, int64_t width,
                   float* losses, int threads) {
    parallel_for(threads, rows, 1, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            T* x = logits + row * stride;
            const float most = largest(x, width), at_target = load(x + targets[row]), weight = weights[row];
            Floats sums = {};
            each(width,
                 [&](int64_t i, auto part) { sums += exponential(get(x + i, part, from_bits(MINUS_INFINITY_BITS)) - most); });
            const float total = sum(sums), part_of = weight / total;
            each(width, [&](int64_t i, auto part) { put(x + i, exponential(get(x + i, part) - most) * part_of, part); });
            float probability = expf(at_target - most) / total;
            store(x + targets[row], (probability - 1.0f) * weight);
            losses[row] = most + logf(total) - at_target;
        }
    });
}

// ---- the kernels by name: one for each type, with the shapes above ----

#define ET_FOR_TYPE(suffix, T)                                                                                                 \
    void swiglu_##suffix(const T* g, int64_t gs, const T* u, int64_t us, int64_t n, int64_t f, T* o, int64_t os, int t) {      \
        gated<false>(g, gs, u, us, n, f, o, os, t);                                                                            \
    }                                                                                                                          \
    void swiglu_backward_##suffix(const T* d, int64_t ds, const T* g, int64_t gs, const T* u, int64_t us, int64_t n,           \
                                  int64_t f, T* dg, int64_t dgs, T* du, int64_t dus, int t) {                                  \
        gated_backward<false>(d, ds, g, gs, u, us, n, f, dg, dgs, du, dus, t);                                                 \
    }                                                                                                                          \
    void geglu_##suffix(const T* g, int64_t gs, const T* u, int64_t us, int64_t n, int64_t f, T* o, int64_t os, int t) {       \
        gated<true>(g, gs, u, us, n, f, o, os, t);                                                                             \
    }                                                                                                                          \
    void geglu_backward_##suffix(const T* d, int64_t ds, const T* g, int64_t gs, const T* u, int64_t us, int64_t n,            \
                                 int64_t f, T* dg, int64_t dgs, T* du, int64_t dus, int t) {                                   \
        gated_backward<true>(d, ds, g, gs, u, us, n, f, dg, dgs, du, dus, t);                                                  \
    }                                                                                                                          \
    void rope_##suffix(T* x, int64_t rs, int64_t hs, const float* c, const float* s, int inverse, int64_t n, int64_t heads,    \
                       int64_t half, int t) {                                                                                  \
        rope(x, rs, hs, c, s, inverse, n, heads, half, t);                                                                     \
    }                                                                                                                          \
    void dropout_##suffix(const T* x, int64_t xs, uint64_t key, uint64_t least, float scale, int64_t n, int64_t d, T* o,       \
                          int t) {                                                                                             \
        dropout(x, xs, key, least, scale, n, d, o, t);                                                                         \
    }                                                                                                                          \
    void cross_entropy_##suffix(T* x, int64_t xs, const int64_t* targets, const float* w, int64_t r, int64_t v, float* losses, \
                                int t) {                                                                                       \
        cross_entropy(x, xs, targets, w, r, v, losses, t);                                                                     \
    }
#define ET_FOR_TYPES(suffix, T, W)                                                                                         \
    void rms_norm_##suffix(const T* h, int64_t hs, const W* w, float eps, int64_t n, int64_t d, T* o, int64_t os, int t) { \
        rms_norm(h, hs, w, eps, n, d, o, os, t);                                                                           \
    }                                                                                                                      \
    void rms_norm_backward_##suffix(const T* dx, int64_t ds, const T* h, int64_t hs, const W* w, float eps, int64_t n,     \
                                    int64_t d, T* o, int64_t os, int t) {                                                  \
        rms_norm_backward(dx, ds, h, hs, w, eps, n, d, o, os, t);                                                          \
    }
ET_FOR_TYPE(bf16, Bf16)
ET_FOR_TYPE(f32, float)
ET_FOR_TYPES(bf16_bf16, Bf16, Bf16)
ET_FOR_TYPES(bf16_f32, Bf16, float)
ET_FOR_TYPES(f32_bf16, float, Bf16)
ET_FOR_TYPES(f32_f32, float, float)

// clang-format off
#define ET_ELEMENTWISE_KERNELS(X)                                                                                              \
    X(swiglu_bf16) X(swiglu_f32) X(swiglu_backward_bf16) X(swiglu_backward_f32) X(geglu_bf16) X(geglu_f32)                     \
    X(geglu_backward_bf16) X(geglu_backward_f32) X(rope_bf16) X(rope_f32) X(dropout_bf16)       \
    X(dropout_f32) X(cross_entropy_bf16) X(cross_entropy_f32) X(rms_norm_bf16_bf16) X(rms_norm_bf16_f32) X(rms_norm_f32_bf16)  \
    X(rms_norm_f32_f32) X(rms_norm_backward_bf16_bf16) X(rms_norm_backward_bf16_f32) X(rms_norm_backward_f32_bf16)             \
    X(rms_norm_backward_f32_f32)
// clang-format on
