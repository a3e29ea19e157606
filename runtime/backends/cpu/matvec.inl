// The product behind every generated token: y (n, rows) = x (n, cols) @ W^T of a frozen linear layer, for n <= MAX_TOKENS.
//
// Each weight is read once for all tokens, so speed is bound by memory. Packed codes become values in registers and are
// multiplied at once (forms.inl), the 8-bit absmax is expanded for 16 blocks at a time, and one dequantised register serves all
// n tokens. Where the block size is not 64, or 64 does not divide cols, blocks may cross rows, and rows are expanded one by
// one.
#include "forms.inl"

// Kind: the storage of a weight. Compute: the arithmetic of an NF4 product. decode.py has the same numbers.
enum Kind : int64_t { NF4 = 0, DENSE_BF16 = 1, DENSE_F32 = 2, ROWS_INT8 = 3 };
enum Compute : int64_t { COMPUTE_F32 = 0, COMPUTE_BF16 = 1, COMPUTE_INT8 = 2 };

// Return true if forms.inl's products fit this weight.
static bool has_form(const DecodeLinear& w) {
    return w.kind == NF4 && w.block_size == QUANT_BLOCK && w.cols % QUANT_BLOCK == 0;
}

static int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
ET_INLINE float dot(const T* a, const float* b, int64_t count) {
    Floats products = {};
    each(count, [&](int64_t i, auto part) { products = fused(get(a + i, part), get(b + i, part), products); });
    return sum(products);
}

// ---- activations ----

// Return the bytes that one token of `cols` activations takes: values (fp32, the largest of the forms), scales and corrections.
static int64_t activation_bytes(int64_t cols) {
    int64_t blocks = round_up(cols / QUANT_BLOCK + 1, ABSMAX_GROUP);
    return blocks * QUANT_BLOCK * 4 + blocks * 4 * 2;
}

// Lay x (n, cols) out for Form in space (n * activation_bytes(cols) bytes, at a multiple of ALIGNMENT) -> tokens (MAX_TOKENS,).
// Those past n repeat the last, so that a kernel for 4 tokens can serve 3.
template <class Form>
void lay_out(const float* x, int n, int64_t cols, uint8_t* space, Activations* tokens) {
    int64_t blocks = round_up(cols / QUANT_BLOCK + 1, ABSMAX_GROUP);
    for (int t = 0; t < n; t++, space += activation_bytes(cols)) {
        float* scale = reinterpret_cast<float*>(space + blocks * QUANT_BLOCK * 4);
        tokens[t] = {x + t * cols, space, scale, scale + blocks};
        Form::prepare(cols, tokens[t]);
    }
    for (int t = n; t < MAX_TOKENS; t++) tokens[t] = tokens[n - 1];
}

static void lay_out(int64_t compute, const float* x, int n, int64_t cols, uint8_t* space, Activations* tokens) {
    if (compute == COMPUTE_INT8 && cols % QUANT_BLOCK == 0) lay_out<Int8Form>(x, n, cols, space, tokens);
    else if (compute == COMPUTE_BF16 && cols % QUANT_BLOCK == 0) lay_out<Bf16Form>(x, n, cols, space, tokens);
    else lay_out<FloatForm>(x, n, cols, space, tokens);
}

// ---- NF4 in whole blocks ----

#if defined(_MSC_VER)
#define ET_PREFETCH(p)
#define ET_INLINE_LAMBDA
#else
#define ET_PREFETCH(p) __builtin_prefetch(p)
#define ET_INLINE_LAMBDA __attribute__((always_inline))
#endif

// ---- the absmax of ABSMAX_GROUP blocks of each of R rows ----

#if defined(ET_USE_AVX512_BF16)

// The table of double-quantised absmax, its bytes apart: vpermi2b looks 64 codes up among 128 bytes, so a byte of 64 numbers
// takes two lookups. A gather of 16 numbers takes as long as multiplying 512 weights.
struct AbsmaxTable {
    __m512i planes[4][4];

    ET_MEMBER explicit AbsmaxTable(const Absmax& absmax) {
        if (!absmax.codes) return;
        for (int byte = 0; byte < 4; byte++)
            for (int quarter = 0; quarter < 4; quarter++) {
                alignas(64) uint8_t plane[64];
                for (int i = 0; i < 64; i += 16) {
                    const __m512i bits = _mm512_loadu_si512(absmax.table + 64 * quarter + i);
                    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srlv_epi32(bits, _mm512_set1_epi32(8 * byte)));
                    _mm_store_si128(reinterpret_cast<__m128i*>(plane + i), bytes);
                }
                planes[byte][quarter] = _mm512_load_si512(plane);
            }
    }

    ET_MEMBER __m512i bytes(int byte, __m512i codes) const {
        const __m512i low = _mm512_permutex2var_epi8(planes[byte][0], codes, planes[byte][1]);
        const __m512i high = _mm512_permutex2var_epi8(planes[byte][2], codes, planes[byte][3]);
        return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(codes), high);
    }

    // codes[R] (ABSMAX_GROUP,) -> numbers[R] (ABSMAX_GROUP,)
    template <int R>
    ET_MEMBER void look_up(const __m128i* codes, __m512* numbers) const {
        // Four codes of each row to a lane of 128 bits, so that the unpacking, which stays within lanes, gives a row a register.
        __m128i a = codes[0], b = R > 1 ? codes[1 % R] : a, c = R > 2 ? codes[2 % R] : a, d = R > 3 ? codes[3 % R] : a;
        const __m512i rows = _mm512_inserti32x4(
            _mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1), c, 2), d, 3);
        const __m512i spread = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), rows);
        const __m512i first = bytes(0, spread), second = bytes(1, spread), third = bytes(2, spread), last = bytes(3, spread);
        const __m512i low_a = _mm512_unpacklo_epi8(first, second), low_b = _mm512_unpacklo_epi8(third, last);
        numbers[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low_a, low_b));
        if constexpr (R > 1) numbers[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low_a, low_b));
        if constexpr (R > 2) {
            const __m512i high_a = _mm512_unpackhi_epi8(first, second), high_b = _mm512_unpackhi_epi8(third, last);
            numbers[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high_a, high_b));
            if constexpr (R > 3) numbers[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high_a, high_b));
        }
    }
};

// Write the absmax of `count` <= ABSMAX_GROUP blocks of R rows, from block `first` and every `gap` blocks on, to
// out (R, ABSMAX_GROUP), 0 beyond count.
template <int R>
ET_INLINE void expand_absmax(const Absmax& absmax, const AbsmaxTable& table, int64_t first, int64_t gap, int64_t count,
                             float (*out)[ABSMAX_GROUP]) {
    const __mmask16 there = __mmask16((1u << count) - 1);
    __m512 numbers[R];
    if (absmax.codes && absmax.shift >= 4) {  // 16 blocks or more share a nested absmax, so at most two of those are needed
        __m128i codes[R];
        for (int j = 0; j < R; j++) codes[j] = _mm_maskz_loadu_epi8(there, absmax.codes + first + j * gap);
        table.look_up<R>(codes, numbers);
        for (int j = 0; j < R; j++) {
            const int64_t block = first + j * gap, segment = block >> absmax.shift;
            const int64_t left = ((segment + 1) << absmax.shift) - block;
            __m512 nested = _mm512_set1_ps(absmax.nested[segment]);
            if (left < count)
                nested = _mm512_mask_mov_ps(nested, __mmask16(~0u << left), _mm512_set1_ps(absmax.nested[segment + 1]));
            const __m512 product = _mm512_mul_ps(numbers[j], nested);
            _mm512_store_ps(out[j], _mm512_maskz_add_ps(there, product, _mm512_set1_ps(absmax.offset)));
        }
        return;
    }
    for (int j = 0; j < R; j++)
        for (int64_t i = 0; i < ABSMAX_GROUP; i++) out[j][i] = i < count ? absmax.at(first + j * gap + i) : 0.0f;
}

#else

struct AbsmaxTable {
    ET_MEMBER explicit AbsmaxTable(const Absmax&) {}
};

template <int R>
ET_INLINE void expand_absmax(const Absmax& absmax, const AbsmaxTable&, int64_t first, int64_t gap, int64_t count,
                             float (*out)[ABSMAX_GROUP]) {
    for (int j = 0; j < R; j++) {
        const int64_t block = first + j * gap, segment = block >> absmax.shift;
        if (absmax.codes && count == ABSMAX_GROUP && (block + count - 1) >> absmax.shift == segment) {
            const float nested = absmax.nested[segment], offset = absmax.offset;
            float product[ABSMAX_GROUP];
            for (int64_t i = 0; i < ABSMAX_GROUP; i++) product[i] = absmax.table[absmax.codes[block + i]];
            for (int64_t i = 0; i < ABSMAX_GROUP; i++) product[i] *= nested;
            for (int64_t i = 0; i < ABSMAX_GROUP; i++) out[j][i] = product[i] + offset;
        } else {
            for (int64_t i = 0; i < ABSMAX_GROUP; i++) out[j][i] = i < count ? absmax.at(block + i) : 0.0f;
        }
    }
}

#endif

// Multiply R rows of w (row, row + gap, ...) with N tokens x (N,), and store the first n results of each row at
// y[token * stride + row]. R * N accumulators stay in registers.
template <class Form, int R, int N>
ET_INLINE void form_rows(const DecodeLinear& w, const typename Form::Table& table, const AbsmaxTable& absmax_table,
                         const Activations* x, int n, float* y, int64_t stride, int64_t row, int64_t gap) {
    constexpr int S = Form::SCALED ? N : 1;
    const int64_t blocks = w.cols / QUANT_BLOCK, row_bytes = w.cols / 2;
    const uint8_t* packed = static_cast<const uint8_t*>(w.weight) + row * row_bytes;
    alignas(64) float absmax[R][ABSMAX_GROUP], scale[R][S][ABSMAX_GROUP];
    typename Form::Sum sum[R][N];
    for (int j = 0; j < R; j++)
        for (int t = 0; t < N; t++) sum[j][t] = Form::zero();
    for (int64_t first = 0; first < blocks; first += ABSMAX_GROUP) {
        const int64_t count = blocks - first < ABSMAX_GROUP ? blocks - first : ABSMAX_GROUP;
        expand_absmax<R>(w.absmax, absmax_table, row * blocks + first, gap * blocks, count, absmax);
        for (int j = 0; j < R; j++) {
            for (int t = 0; t < N; t++) sum[j][t] = Form::group(x[t], first, absmax[j], sum[j][t]);
            for (int s = 0; s < S; s++) {
                ET_SIMD
                for (int64_t i = 0; i < ABSMAX_GROUP; i++)
                    scale[j][s][i] = Form::SCALED ? absmax[j][i] * x[s].scale[first + i] : absmax[j][i];
            }
        }
        auto step = [&](int64_t b, int64_t left) ET_INLINE_LAMBDA {
            for (int j = 0; j < R; j++) {
                const uint8_t* p = packed + j * gap * row_bytes + (first + b) * (QUANT_BLOCK / 2);
                ET_PREFETCH(p + PREFETCH_BYTES);
                typename Form::Weights weights;
                Form::load(table, p, left, weights);
                for (int t = 0; t < N; t++)
                    sum[j][t] = Form::dot(weights, x[t], first + b, scale[j][Form::SCALED ? t : 0], b, sum[j][t]);
            }
        };
        if (count == ABSMAX_GROUP) {
            for (int64_t b = 0; b < ABSMAX_GROUP; b += Form::BLOCKS) step(b, ABSMAX_GROUP - b);
        } else {
            for (int64_t b = 0; b < count; b += Form::BLOCKS) step(b, count - b);
        }
    }
    for (int j = 0; j < R; j++)
        for (int t = 0; t < N && t < n; t++) y[t * stride + row + j * gap] = Form::total(sum[j][t]);
}

// Multiply rows [begin, end). The R rows taken together come from R equal parts of the range, so that memory is read in R long
// streams, each in its own page: neighbouring rows would be short streams in one page, which the hardware's prefetcher does not
// follow (8.9 instead of 14.0 GB/s a core: LOG.md, "four rows from distant parts").
template <class Form, int R, int N>
void form_range(const DecodeLinear& w, const Activations* x, int n, float* y, int64_t stride, int64_t begin, int64_t end) {
    const typename Form::Table table(w.codes);
    const AbsmaxTable absmax(w.absmax);
    const int64_t part = (end - begin) / R;
    for (int64_t row = begin; row < begin + part; row++) form_rows<Form, R, N>(w, table, absmax, x, n, y, stride, row, part);
    for (int64_t row = begin + R * part; row < end; row++) form_rows<Form, 1, N>(w, table, absmax, x, n, y, stride, row, 1);
}

template <class Form>
void form_range(const DecodeLinear& w, const Activations* x, int n, float* y, int64_t stride, int64_t begin, int64_t end) {
    if (n == 1) form_range<Form, 4, 1>(w, x, n, y, stride, begin, end);
    else if (n == 2) form_range<Form, 4, 2>(w, x, n, y, stride, begin, end);
    else if (n <= 4) form_range<Form, 2, 4>(w, x, n, y, stride, begin, end);
    else form_range<Form, 2, 8>(w, x, n, y, stride, begin, end);
}

// ---- everything else: blocks that cross rows, other block sizes, dense weights ----

// Rows whose quantisation blocks cross rows: each is expanded to the stack in pieces, and multiplied in fp32.
static void crossing_range(const DecodeLinear& w, const Activations* x, int n, float* y, int64_t stride, int64_t begin,
                           int64_t end) {
    const uint8_t* packed = static_cast<const uint8_t*>(w.weight);
    float values[CROSSING_PIECE];
    for (int64_t row = begin; row < end; row++) {
        float sums[MAX_TOKENS] = {};
        for (int64_t column = 0; column < w.cols; column += CROSSING_PIECE) {
            const int64_t count = w.cols - column < CROSSING_PIECE ? w.cols - column : CROSSING_PIECE,
                          flat = row * w.cols + column;
            dequantize_range(packed, w.codes, w.absmax, w.block_size, flat, flat + count, values);
            for (int t = 0; t < n; t++) sums[t] += dot(values, x[t].x + column, count);
        }
        for (int t = 0; t < n; t++) y[t * stride + row] = sums[t];
    }
}

// weight (rows, cols) dense. Four rows at a time, so that four sums are in flight and hide the latency of an addition; from
// four equal parts of the range, as in form_range. A cache line is prefetched once, and is a whole number of registers.
template <class T>
void dense_range(const T* weight, int64_t cols, const Activations* x, int n, float* y, int64_t stride, int64_t begin,
                 int64_t end) {
    constexpr int64_t AHEAD = PREFETCH_BYTES / sizeof(T), LINE_NUMBERS = ALIGNMENT / sizeof(T);
    const int64_t part_rows = (end - begin) / 4, gap = part_rows * cols;
    for (int64_t row = begin; row < begin + part_rows; row++) {
        const T *a = weight + row * cols, *b = a + gap, *c = b + gap, *d = c + gap;
        for (int t = 0; t < n; t++) {
            const float* values = x[t].x;
            Floats sum_a = {}, sum_b = {}, sum_c = {}, sum_d = {};
            auto add = [&](int64_t i, auto part) {
                Floats value = get(values + i, part);
                sum_a = fused(get(a + i, part), value, sum_a);
                sum_b = fused(get(b + i, part), value, sum_b);
                sum_c = fused(get(c + i, part), value, sum_c);
                sum_d = fused(get(d + i, part), value, sum_d);
            };
            int64_t line = 0;
            for (; line + LINE_NUMBERS <= cols; line += LINE_NUMBERS) {
                ET_PREFETCH(a + line + AHEAD);
                ET_PREFETCH(b + line + AHEAD);
                ET_PREFETCH(c + line + AHEAD);
                ET_PREFETCH(d + line + AHEAD);
                for (int64_t i = line; i < line + LINE_NUMBERS; i += LANES) add(i, Full());
            }
            each(cols - line, [&](int64_t i, auto part) { add(line + i, part); });
            float* out = y + t * stride + row;
            out[0] = sum(sum_a), out[part_rows] = sum(sum_b), out[2 * part_rows] = sum(sum_c), out[3 * part_rows] = sum(sum_d);
        }
    }
    for (int64_t row = begin + 4 * part_rows; row < end; row++)
        for (int t = 0; t < n; t++) y[t * stride + row] = dot(weight + row * cols, x[t].x, cols);
}

static void dense_range(int64_t kind, const void* weight, int64_t cols, const Activations* x, int n, float* y, int64_t stride,
                        int64_t begin, int64_t end) {
    if (kind == DENSE_BF16) dense_range(static_cast<const Bf16*>(weight), cols, x, n, y, stride, begin, end);
    else dense_range(static_cast<const float*>(weight), cols, x, n, y, stride, begin, end);
}

// weight (rows, cols) int8, one scale a row (w.codes).
static void int8_range(const DecodeLinear& w, const Activations* x, int n, float* y, int64_t stride, int64_t begin,
                       int64_t end) {
    dense_range(static_cast<const int8_t*>(w.weight), w.cols, x, n, y, stride, begin, end);
    for (int t = 0; t < n; t++)
        for (int64_t row = begin; row < end; row++) y[t * stride + row] *= w.codes[row];
}

// Write rows [begin, end) of x W^T to y[token * stride + row]. x (MAX_TOKENS,): laid out by lay_out for the same `compute`.
static void product_range(const DecodeLinear& w, int64_t compute, const Activations* x, int n, float* y, int64_t stride,
                          int64_t begin, int64_t end) {
    if (w.kind == ROWS_INT8) int8_range(w, x, n, y, stride, begin, end);
    else if (w.kind != NF4) dense_range(w.kind, w.weight, w.cols, x, n, y, stride, begin, end);
    else if (!has_form(w)) crossing_range(w, x, n, y, stride, begin, end);
    else if (compute == COMPUTE_INT8) form_range<Int8Form>(w, x, n, y, stride, begin, end);
    else if (compute == COMPUTE_BF16) form_range<Bf16Form>(w, x, n, y, stride, begin, end);
    else form_range<FloatForm>(w, x, n, y, stride, begin, end);
}

// Kernel: y (n, w.rows) = x (n, w.cols) W^T + bias, all fp32, n <= MAX_TOKENS; the adapter is not used. space: n times
// matvec_space's bytes, at a multiple of ALIGNMENT.
static void matvec(const DecodeLinear* w, int64_t compute, const float* x, int64_t n, float* y, uint8_t* space, int threads) {
    Activations tokens[MAX_TOKENS];
    lay_out(compute, x, int(n), w->cols, space, tokens);
    parallel_for(threads, w->rows, LORA_PANEL, [=, &tokens](int64_t begin, int64_t end) {
        product_range(*w, compute, tokens, int(n), y, w->rows, begin, end);
        for (int64_t t = 0; t < n && w->bias; t++)
            for (int64_t row = begin; row < end; row++) y[t * w->rows + row] += w->bias[row];
    });
}

// Kernel: write the bytes of matvec's `space` for one token of `cols` activations to bytes (1,).
static void matvec_space(int64_t cols, int64_t* bytes) { *bytes = activation_bytes(cols); }

// ---- dense rows to 8 bits ----

// Kernels: weight (rows, cols) -> codes (rows, cols), scale (rows,). A row's largest magnitude becomes 127, and the others the
// nearest integers, ties to even. A row with inf or NaN gets a scale that is not finite; its codes are left unwritten.
template <class T>
void int8_rows(const T* weight, int64_t rows, int64_t cols, int8_t* codes, float* scale, int threads) {
    const float shift = ROUNDING_SHIFT;
    parallel_for(threads, rows, 1, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T* values = weight + row * cols;
            Words most = {};  // magnitudes of fp32 compare like integers, and NaN is above all others
            each(cols, [&](int64_t i, auto part) {
                Words magnitude = as_words(get(values + i, part)) & MAGNITUDE_BITS;
                most = most > magnitude ? most : magnitude;
            });
            uint32_t parts[LANES], top = 0;
            memcpy(parts, &most, sizeof parts);
            for (uint32_t bits : parts) top = bits > top ? bits : top;
            scale[row] = from_bits(top) / INT8_LARGEST;
            const float divisor = scale[row] > SMALLEST_ROW_SCALE ? scale[row] : SMALLEST_ROW_SCALE;
            if (top < INFINITY_BITS)
                each(cols, [&](int64_t i, auto part) {
                    put(codes + row * cols + i, get(values + i, part) / divisor + shift - shift, part);
                });
        }
    });
}
static void int8_rows_bf16(const Bf16* weight, int64_t rows, int64_t cols, int8_t* codes, float* scale, int threads) {
    int8_rows(weight, rows, cols, codes, scale, threads);
}
static void int8_rows_f32(const float* weight, int64_t rows, int64_t cols, int8_t* codes, float* scale, int threads) {
    int8_rows(weight, rows, cols, codes, scale, threads);
}

#define ET_MATVEC_KERNELS(X) X(matvec) X(matvec_space) X(int8_rows_bf16) X(int8_rows_f32)
