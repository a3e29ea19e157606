// The products under attention.inl and project.inl: squares of 32 x 32 numbers, so packed that one function multiplies any.
//
// A square is kept in "tiles" of 16 rows of sixteen 32-bit words (1 KB). A word is one fp32 number, or two bf16 neighbours
// along the depth of the product (the dimension that is summed over), or four int8. So a tile is 16 deep in fp32, 32 in bf16,
// 64 in int8.
//     left form   (rows x depth):    a tile's row is a row, its words go along the depth; tiles: depth first, then rows
//     right form  (depth x columns): a tile's row is a word of the depth, its words are 16 columns; depth first, then columns
// For example the bf16 tiles of the left and the right operand, with k along the depth:
//     left    row 0:  (0,k0 0,k1) (0,k2 0,k3) ... (0,k30 0,k31)    right   word 0:  (k0,0 k1,0) (k0,1 k1,1) ... (k0,15 k1,15)
//             row 1:  (1,k0 1,k1) (1,k2 1,k3) ...                          word 1:  (k2,0 k3,0) (k2,1 k3,1) ...
// Transposing a tile's words turns X's left form into X^T's right form and back, whatever the type. AMX takes tiles of exactly
// these forms; AVX-512 broadcasts a word of the left tile and multiplies it with a row of the right one. Sums and scores are
// fp32, row-major.

constexpr int64_t SIDE = 32, SQUARE = SIDE * SIDE;

template <class E>
struct Form {  // E: the type that is multiplied: float, Bf16 on machines that multiply it, or integers in project.inl
    static constexpr int64_t depth = 64 / sizeof(E);  // numbers along the depth of a tile
    static constexpr int64_t tile = 16 * depth;       // numbers in a tile
    static constexpr int64_t deep = depth < SIDE ? SIDE / depth : 1;  // tiles along the depth of a square
    static constexpr int64_t square = 2 * deep * tile;                // numbers in a square: SQUARE, or twice that of 8 bits
    // Return the place of (row, k) in a square of left form.
    ET_MEMBER static E* left(E* square, int64_t row, int64_t k) {
        return square + (row / 16 * deep + k / depth) * tile + row % 16 * depth + k % depth;
    }
};

// ---- 2^x ----

#if defined(ET_USE_AVX512)
ET_INLINE Floats fraction(Floats x) { return (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF); }
ET_INLINE Floats scaled(Floats p, Floats, Floats x) { return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x); }
#else
ET_INLINE Floats floor_of(Floats x) {  // |x| < 2^22
    const Floats shift = all(ROUNDING_SHIFT);
    Floats n = (x + shift) - shift;
    return n > x ? n - 1.0f : n;
}
ET_INLINE Floats fraction(Floats x) { return x - floor_of(x); }
// Return p * 2^floor(x), 0 for x = -127; f: fraction(x). The shift leaves floor(x) in the low bits, which become an exponent.
ET_INLINE Floats scaled(Floats p, Floats f, Floats x) {
    return p * as_floats((as_words((x - f) + ROUNDING_SHIFT) << 23) + (127u << 23));
}
#endif

// Return 2^x for x <= 127, 0 far below 0; relative error 2e-7, or 3e-6 for E = Bf16, to which the result is rounded anyway.
// 2^fraction by a polynomial, fitted for each of the two errors.
template <class E>
ET_INLINE Floats power_of_two(Floats x) {
#if !defined(ET_USE_AVX512)
    x = larger(all(-127.0f), x);
#endif
    Floats f = fraction(x), p;
    if (sizeof(E) == 2) {
        p = fused(all(1.35341678e-2f), f, all(5.20114601e-2f));
        p = fused(p, f, all(2.41442755e-1f));
        p = fused(p, f, all(6.93003833e-1f));
        p = fused(p, f, all(1.00000262f));
    } else {
        p = fused(all(1.87757669e-3f), f, all(8.98933969e-3f));
        p = fused(p, f, all(5.58263175e-2f));
        p = fused(p, f, all(2.40153611e-1f));
        p = fused(p, f, all(6.93153083e-1f));
        p = fused(p, f, all(9.99999940e-1f));
    }
    return scaled(p, f, x);
}

// ---- products ----

// Return sum + (one word of a left tile) * (a register of a right tile's row). Sums of integers are 32-bit integers.
ET_INLINE Floats multiply_word(const float* word, const float* row, Floats sum) { return fused(all(*word), get(row), sum); }
#if defined(ET_USE_AVX512_BF16)
ET_INLINE Floats multiply_word(const Bf16* word, const Bf16* row, Floats sum) {  // two neighbours along the depth at once
    int32_t pair;
    memcpy(&pair, word, 4);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(row), (__m512bh)_mm512_set1_epi32(pair));
}
// Four neighbours in 8 bits. The instruction takes one operand without sign: the weights, whichever side they stand on.
ET_INLINE Ints multiply_word(const uint8_t* word, const int8_t* row, Ints sum) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(read_as<int32_t>(word)), _mm512_loadu_si512(row));
}
ET_INLINE Ints multiply_word(const int8_t* word, const uint8_t* row, Ints sum) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(row), _mm512_set1_epi32(read_as<int32_t>(word)));
}
#elif defined(ET_USE_AVX512)
ET_INLINE Ints multiply_word(const int16_t* word, const int16_t* row, Ints sum) {  // two neighbours in 16 bits
    const __m512i pair = _mm512_set1_epi32(read_as<int32_t>(word));
    return sum + (Ints)_mm512_madd_epi16(pair, _mm512_loadu_si512(row));
}
#elif defined(ET_USE_AVX_VNNI)
ET_INLINE Ints multiply_word(const uint8_t* word, const int8_t* row, Ints sum) {
    const __m256i four = _mm256_set1_epi32(read_as<int32_t>(word));
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, four, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
}
ET_INLINE Ints multiply_word(const int8_t* word, const uint8_t* row, Ints sum) {
    const __m256i four = _mm256_set1_epi32(read_as<int32_t>(word));
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)), four);
}
#elif defined(ET_USE_AVX2) && defined(__GNUC__)
ET_INLINE Ints multiply_word(const int16_t* word, const int16_t* row, Ints sum) {
    const __m256i pair = _mm256_set1_epi32(read_as<int32_t>(word));
    return sum + (Ints)_mm256_madd_epi16(pair, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
}
#elif defined(ET_USE_NEON_I8MM)
ET_INLINE Ints multiply_word(const uint8_t* word, const int8_t* row, Ints sum) {
    const uint8x16_t four = vreinterpretq_u8_u32(vdupq_n_u32(read_as<uint32_t>(word)));
    return (Ints)vusdotq_s32((int32x4_t)sum, four, vld1q_s8(row));
}
ET_INLINE Ints multiply_word(const int8_t* word, const uint8_t* row, Ints sum) {
    const int8x16_t four = vreinterpretq_s8_u32(vdupq_n_u32(read_as<uint32_t>(word)));
    return (Ints)vusdotq_s32((int32x4_t)sum, vld1q_u8(row), four);
}
#elif defined(ET_USE_NEON_DOT)
ET_INLINE Ints multiply_word(const int8_t* word, const int8_t* row, Ints sum) {
    const int8x16_t four = vreinterpretq_s8_u32(vdupq_n_u32(read_as<uint32_t>(word)));
    return (Ints)vdotq_s32((int32x4_t)sum, four, vld1q_s8(row));
}
#elif defined(ET_USE_NEON)
ET_INLINE Ints multiply_word(const int16_t* word, const int16_t* row, Ints sum) {
    const int16x8_t pair = vreinterpretq_s16_u32(vdupq_n_u32(read_as<uint32_t>(word))), columns = vld1q_s16(row);
    const int32x4_t low = vmull_s16(vget_low_s16(pair), vget_low_s16(columns)), high = vmull_high_s16(pair, columns);
    return sum + (Ints)vpaddq_s32(low, high);
}
#endif

// The type of sums of products of E: of floats, or of integers.
template <class E>
struct SumOf {
    typedef Ints type;
};
template <>
struct SumOf<float> {
    typedef Floats type;
};
template <>
struct SumOf<Bf16> {
    typedef Floats type;
};

#if defined(ET_USE_AVX512)
constexpr int64_t STRIP_ROWS = 8, STRIP_BLOCKS = 2;  // 8 x 32 sums in 16 of 32 registers
#else
constexpr int64_t STRIP_ROWS = 4, STRIP_BLOCKS = 1;  // 4 x 16 sums
#endif

// c (32, 32), rows ldc apart, = or, if `add`, += the sum over n squares of left (left form) x right (right form); squares lie
// left_step and right_step apart. Sums of a strip of rows and blocks stay in registers over the whole depth. L and R have the
// same size; for integers c holds 32-bit integers.
template <class L, class R>
static void multiply_squares(float* c, int64_t ldc, const L* left, int64_t left_step, const R* right, int64_t right_step,
                             int64_t n, bool add) {
    typedef Form<L> F;
    typedef typename SumOf<L>::type Sum;
    constexpr int64_t rows = STRIP_ROWS, each = 16 / LANES, columns = STRIP_BLOCKS * each, pair = F::depth / 16;
    for (int64_t block = 0; block < 2; block += STRIP_BLOCKS)
        for (int64_t row = 0; row < SIDE; row += rows) {
            Sum sums[rows][columns];
            float* corner = c + row * ldc + block * 16;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t x = 0; x < columns; x++)
                    sums[r][x] = add ? read_as<Sum>(corner + r * ldc + x * LANES) : Sum{};
            for (int64_t s = 0; s < n; s++)
                for (int64_t t = 0; t < F::deep; t++) {
                    const L* words = left + s * left_step + (row / 16 * F::deep + t) * F::tile + row % 16 * F::depth;
                    const R* tile = right + s * right_step + (block * F::deep + t) * F::tile;
                    for (int64_t w = 0; w < 16; w++)
                        for (int64_t r = 0; r < rows; r++)
                            for (int64_t x = 0; x < columns; x++)
                                sums[r][x] = multiply_word(
                                    words + r * F::depth + w * pair,
                                    tile + x / each * F::deep * F::tile + w * F::depth + x % each * LANES * pair, sums[r][x]);
                }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t x = 0; x < columns; x++) memcpy(corner + r * ldc + x * LANES, &sums[r][x], sizeof(Sum));
        }
}

// ---- packing ----

// x (n,), at most a tile's depth of it -> one row of a left tile; missing numbers become 0.
ET_INLINE void pack_row(Bf16* to, const Bf16* x, int64_t n) {
    if (n >= 32) memcpy(to, x, 64);
    else
        for (int64_t i = 0; i < 32; i++) to[i].bits = i < n ? x[i].bits : 0;
}
template <class T>
ET_INLINE void pack_row(float* to, const T* x, int64_t n) {
    if (n >= 16) {
        ET_SIMD
        for (int64_t i = 0; i < 16; i++) to[i] = load(x + i);
    } else {
        for (int64_t i = 0; i < 16; i++) to[i] = i < n ? load(x + i) : 0.0f;
    }
}

// x (size,), or null for zeros -> row `row` of squares in left form (size padded to SIDE).
template <class E, class T>
ET_INLINE void pack_left(E* squares, int64_t row, const T* x, int64_t size) {
    for (int64_t k = 0; k < size || k % SIDE; k += Form<E>::depth)
        pack_row(Form<E>::left(squares + k / SIDE * SQUARE, row, k % SIDE), x ? x + k : x, x ? size - k : 0);
}

// words: 16 rows of sixteen 32-bit words, from_step bytes apart -> transposed, contiguous.
// With AVX-512 in four passes: pairs of words, pairs of those, then 128-bit lanes twice.
ET_INLINE void transpose_words(const void* words, int64_t from_step, void* transposed) {
    const char* from = static_cast<const char*>(words);
    char* to = static_cast<char*>(transposed);
#if defined(ET_USE_AVX512)
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * from_step);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], 0x88);
            b[i + 4 + j] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        _mm512_storeu_si512(to + 64 * j, _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88));
        _mm512_storeu_si512(to + 64 * (8 + j), _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd));
    }
#else
    for (int64_t i = 0; i < 16; i++)
        for (int64_t j = 0; j < 16; j++) memcpy(to + 64 * j + 4 * i, from + i * from_step + 4 * j, 4);
#endif
}

// from, to (count, SQUARE): X's left form -> X^T's right form, or X's right form -> X^T's left form.
template <class E>
static void transpose_squares(const E* from, E* to, int64_t count) {
    for (int64_t i = 0; i < count * SQUARE; i += Form<E>::tile) transpose_words(from + i, 64, to + i);
}

// from, to (count, SQUARE): X's left form -> X's right form. In fp32 only tiles change places; in bf16 words pair other
// numbers.
ET_INLINE void turn_squares(const float* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t t = 0; t < 4; t++) memcpy(to + i * SQUARE + t * 256, from + i * SQUARE + (t % 2 * 2 + t / 2) * 256, 1024);
}
#if defined(ET_USE_AVX512_BF16)
// Interleave two rows of 32 bf16, so that each word holds `even` and `odd` of one column: columns 0 to 15 -> first (32
// numbers), 16 to 31 -> second.
ET_INLINE void zip(__m512i even, __m512i odd, Bf16* first, Bf16* second) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                         4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(first, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_storeu_si512(second, _mm512_permutex2var_epi16(even, high, odd));
}

ET_INLINE void turn_squares(const Bf16* from, Bf16* to, int64_t count) {
    for (int64_t i = 0; i < count; i++, from += SQUARE, to += SQUARE)
        for (int64_t w = 0; w < 16; w++)
            zip(_mm512_loadu_si512(from + 64 * w), _mm512_loadu_si512(from + 64 * w + 32), to + 32 * w, to + 512 + 32 * w);
}
#endif

// x (size, 32) times factor (32,) of its columns -> x^T: rows (count,) of (size,) T, one for each column.
template <class T>
static void unpack_columns(const float* x, const float* factor, T* const* rows, int64_t count, int64_t size) {
    float block[256];
    for (int64_t d = 0; d < size; d += 16)
        for (int64_t column = 0; column < count; column += 16) {
            transpose_words(x + d * SIDE + column, SIDE * 4, block);
            int64_t n = size - d < 16 ? size - d : 16;
            for (int64_t c = 0; c < 16 && column + c < count; c++) {
                T* to = rows[column + c] + d;
                float f = factor[column + c];
                if (n == 16) {
                    for (int64_t i = 0; i < 16; i += LANES) put(to + i, get(block + 16 * c + i) * f);
                } else {
                    for (int64_t i = 0; i < n; i++) store(to + i, block[16 * c + i] * f);
                }
            }
        }
}
