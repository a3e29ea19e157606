// The element-wise part of attention.inl: scores to probabilities and their gradients, 32 columns (queries) at a time.
// Scores are S^T (keys x queries), so that a query's maximum, sum and log-sum-exp are lanes, and need no sums across a
// register.

// Return log x for a positive normal x, to about one unit in the last place; NaN for NaN.
// x = 2^exponent m with m around 1, and log m = 2 atanh((m - 1) / (m + 1)), by its series.
ET_INLINE float natural_log(float x) {
    uint32_t bits = to_bits(x) - 0x3f3504f3;  // sqrt(1/2)
    float m = from_bits((bits & 0x7fffff) + 0x3f3504f3), exponent = float(int32_t(bits) >> 23);
    float s = (m - 1.0f) / (m + 1.0f), t = s * s;
    float series = fma(fma(fma(t, 1.0f / 9, 1.0f / 7), t, 1.0f / 5), t, 1.0f / 3);
    return x == x ? fma(exponent, LN_2, fma(2.0f * s * t, series, 2.0f * s)) : x;
}

// The keys that each of 32 queries may see: those in (low, high]. As floats, which are exact up to 2^24 keys.
struct Sight {
    float low[SIDE], high[SIDE];
};

// Set the scores (32 keys, 32 queries) that queries may not see to HIDDEN_SCORE. key: of the first row.
ET_INLINE void hide(float* scores, const Sight& sight, int64_t key) {
    for (int64_t x = 0; x < SIDE; x += LANES) {
        Floats low = get(sight.low + x), high = get(sight.high + x);
        for (int64_t k = 0; k < SIDE; k++) {
            float* score = scores + k * SIDE + x;
            Floats here = all(float(key + k));
            put(score, (here > low) & (here <= high) ? get(score) : all(HIDDEN_SCORE));
        }
    }
}

// The running softmax of 32 queries in base 2: probabilities are 2^(score * factor - top), and sum is their sum so far. top is
// the largest score so far, or up to MAXIMUM_SLACK below it.
struct Softmax {
    float top[SIDE], sum[SIDE];
};

ET_INLINE bool any_positive(Floats x) {
#if defined(ET_USE_AVX512)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ) != 0;
#else
    return largest(x) > 0.0f;
#endif
}

// Raise state.top where new scores (squares * 32 keys, 32 queries) rise more than MAXIMUM_SLACK above it. Return true if any
// does; then state.sum has been rescaled, and alpha (32,) is the factor by which earlier outputs must be multiplied.
ET_INLINE bool raise_top(const float* scores, int64_t squares, float factor, Softmax& state, float* alpha) {
    float seen[SIDE];
    bool outgrown = false;
    for (int64_t x = 0; x < SIDE; x += LANES) {
        Floats most[4];
        for (int64_t i = 0; i < 4; i++) most[i] = get(scores + i * SIDE + x);
        for (int64_t k = 4; k < squares * SIDE; k += 4)
            for (int64_t i = 0; i < 4; i++) most[i] = larger(most[i], get(scores + (k + i) * SIDE + x));
        Floats peak = larger(larger(most[0], most[1]), larger(most[2], most[3])) * factor;
        put(seen + x, peak);
        outgrown |= any_positive(peak - get(state.top + x) - MAXIMUM_SLACK);
    }
    if (!outgrown) return false;
    for (int64_t x = 0; x < SIDE; x += LANES) {
        Floats before = get(state.top + x), now = larger(before, get(seen + x));
        Floats change = power_of_two<float>(before - now);
        put(state.top + x, now);
        put(alpha + x, change);
        put(state.sum + x, get(state.sum + x) * change);
    }
    return true;
}

// scores (squares * 32 keys, 32 queries) -> p, probabilities as `squares` squares in right form (depth = keys); state.sum grows
// by them.
template <class E>
static void probabilities(const float* scores, int64_t squares, float factor, Softmax& state, E* p);

template <>
void probabilities<float>(const float* scores, int64_t squares, float factor, Softmax& state, float* p) {
    for (int64_t x = 0; x < SIDE; x += LANES) {
        Floats sum = get(state.sum + x), top = -get(state.top + x), scale = all(factor);
        for (int64_t k = 0; k < squares * SIDE; k++) {
            Floats e = power_of_two<float>(fused(get(scores + k * SIDE + x), scale, top));
            sum += e;
            put(p + k / SIDE * SQUARE + (x / 16 * 2 + k % SIDE / 16) * 256 + k % 16 * 16 + x % 16, e);
        }
        put(state.sum + x, sum);
    }
}

// The results of score_gradients for one square (32 keys, 32 queries), in the forms that later products take: P and
// dS = P (dP - delta).
template <class E>
struct Gradients {
    E* p;         // left form, rows = keys
    E* ds;        // left form, rows = keys
    E* ds_right;  // right form, depth = keys
};

// scores, dp (32 keys, 32 queries); lse (32,), log-sum-exp in base 2; delta (32,) -> out. factor: of scores, times log2 e.
ET_INLINE void score_gradients(const float* scores, const float* dp, float factor, const float* lse, const float* delta,
                               const Gradients<float>& out) {
    for (int64_t x = 0; x < SIDE; x += LANES) {
        Floats log_sum = -get(lse + x), mean = get(delta + x), scale = all(factor);
        for (int64_t k = 0; k < SIDE; k++) {
            Floats p = power_of_two<float>(fused(get(scores + k * SIDE + x), scale, log_sum));
            Floats ds = p * (get(dp + k * SIDE + x) - mean);
            int64_t left = (k / 16 * 2 + x / 16) * 256 + k % 16 * 16 + x % 16;
            put(out.p + left, p);
            put(out.ds + left, ds);
            put(out.ds_right + (x / 16 * 2 + k / 16) * 256 + k % 16 * 16 + x % 16, ds);
        }
    }
}

// The bf16 versions of the two functions above. A word of a right form holds two keys of one query, so rows are made in pairs
// and zipped. Sums are of the unrounded probabilities, in two accumulators for each register, so that additions need not wait
// for each other.
#if defined(ET_USE_AVX512_BF16)
ET_INLINE __m512i narrow(Floats first, Floats second) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }

template <>
void probabilities<Bf16>(const float* scores, int64_t squares, float factor, Softmax& state, Bf16* p) {
    Floats scale = all(factor), top0 = -get(state.top), top1 = -get(state.top + 16);
    Floats sum0 = get(state.sum), sum1 = get(state.sum + 16), more0 = all(0.0f), more1 = more0;
    for (int64_t k = 0; k < squares * SIDE; k += 2) {
        const float* row = scores + k * SIDE;
        Floats even0 = power_of_two<Bf16>(fused(get(row), scale, top0));
        Floats even1 = power_of_two<Bf16>(fused(get(row + 16), scale, top1));
        Floats odd0 = power_of_two<Bf16>(fused(get(row + 32), scale, top0));
        Floats odd1 = power_of_two<Bf16>(fused(get(row + 48), scale, top1));
        sum0 += even0, sum1 += even1, more0 += odd0, more1 += odd1;
        Bf16* to = p + k / SIDE * SQUARE + k % SIDE * 16;
        zip(narrow(even0, even1), narrow(odd0, odd1), to, to + 512);
    }
    put(state.sum, sum0 + more0);
    put(state.sum + 16, sum1 + more1);
}

ET_INLINE void score_gradients(const float* scores, const float* dp, float factor, const float* lse, const float* delta,
                               const Gradients<Bf16>& out) {
    Floats scale = all(factor), mean0 = get(delta), mean1 = get(delta + 16), log0 = -get(lse), log1 = -get(lse + 16);
    for (int64_t k = 0; k < SIDE; k += 2) {
        __m512i ds[2];
        for (int64_t i = 0; i < 2; i++) {
            const float *row = scores + (k + i) * SIDE, *gradient = dp + (k + i) * SIDE;
            Floats p0 = power_of_two<Bf16>(fused(get(row), scale, log0));
            Floats p1 = power_of_two<Bf16>(fused(get(row + 16), scale, log1));
            ds[i] = narrow(p0 * (get(gradient) - mean0), p1 * (get(gradient + 16) - mean1));
            _mm512_storeu_si512(out.p + (k + i) * 32, narrow(p0, p1));
            _mm512_storeu_si512(out.ds + (k + i) * 32, ds[i]);
        }
        zip(ds[0], ds[1], out.ds_right + k * 16, out.ds_right + 512 + k * 16);
    }
}
#endif
