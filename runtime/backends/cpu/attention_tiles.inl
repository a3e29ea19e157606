// The arithmetic under attention.inl: squares of 32 x 32 numbers, packed so that one kernel multiplies any of them.
//
// A square is 2 x 2 blocks of 16, kept in "tiles" of 16 rows of sixteen 32-bit words. A word is one fp32 number, or two
// bf16 neighbours along the depth of the product: hence a tile is 16 deep in fp32 and 32 deep in bf16.
//     left form   (rows x depth):    tile row = row,    its words = the depth
//     right form  (depth x columns): tile row = a word of the depth, its words = 16 columns
// Reading a tile's words column by column turns X's left form into X^T's right form and back, whatever the type. AMX takes
// bf16 tiles of exactly these forms; AVX-512 broadcasts the left one's words.
// Accumulators and scores are fp32, row-major.

constexpr int64_t SIDE = 32, SQUARE = SIDE * SIDE;

template <class E>
struct Form {  // E is what a product takes: float, or Bf16 where the machine multiplies it
    static constexpr int64_t depth = 64 / sizeof(E);       // of a tile
    static constexpr int64_t tile = 16 * depth;            // numbers in a tile
    static constexpr int64_t deep = SIDE / depth;          // tiles along the depth of a square
    ET_MEMBER static E* left(E* square, int64_t row, int64_t k) {
        return square + (row / 16 * deep + k / depth) * tile + row % 16 * depth + k % depth;
    }
};

// ---- Lanes: the machine's fp32 register ----

#if defined(ET_USE_AVX512)
typedef __m512 Lanes;
ET_INLINE Lanes lanes(const float* p) { return _mm512_loadu_ps(p); }
ET_INLINE Lanes lanes_of(float x) { return _mm512_set1_ps(x); }
ET_INLINE void put(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
ET_INLINE Lanes plus(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
ET_INLINE Lanes minus(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
ET_INLINE Lanes times(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
ET_INLINE Lanes madd(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
ET_INLINE Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
ET_INLINE bool any_larger(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
// x where low < key <= high, else `other`.
ET_INLINE Lanes between(Lanes x, Lanes key, Lanes low, Lanes high, Lanes other) {
    __mmask16 seen = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(key, low, _CMP_GT_OQ), key, high, _CMP_LE_OQ);
    return _mm512_mask_mov_ps(other, seen, x);
}
ET_INLINE Lanes fraction(Lanes x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); }
ET_INLINE Lanes scaled(Lanes p, Lanes, Lanes x) { return _mm512_scalef_ps(p, x); }  // p * 2^floor(x)
#elif defined(ET_USE_AVX2)
typedef __m256 Lanes;
ET_INLINE Lanes lanes(const float* p) { return _mm256_loadu_ps(p); }
ET_INLINE Lanes lanes_of(float x) { return _mm256_set1_ps(x); }
ET_INLINE void put(float* p, Lanes x) { _mm256_storeu_ps(p, x); }
ET_INLINE Lanes plus(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
ET_INLINE Lanes minus(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
ET_INLINE Lanes times(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
ET_INLINE Lanes madd(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
ET_INLINE Lanes larger(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
ET_INLINE bool any_larger(Lanes a, Lanes b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
ET_INLINE Lanes between(Lanes x, Lanes key, Lanes low, Lanes high, Lanes other) {
    Lanes seen = _mm256_and_ps(_mm256_cmp_ps(key, low, _CMP_GT_OQ), _mm256_cmp_ps(key, high, _CMP_LE_OQ));
    return _mm256_blendv_ps(other, x, seen);
}
ET_INLINE Lanes fraction(Lanes x) { return _mm256_sub_ps(x, _mm256_floor_ps(x)); }
ET_INLINE Lanes scaled(Lanes p, Lanes f, Lanes x) {
    __m256i n = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_sub_ps(x, f)), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(n, 23)));
}
#elif defined(ET_USE_NEON)
typedef float32x4_t Lanes;
ET_INLINE Lanes lanes(const float* p) { return vld1q_f32(p); }
ET_INLINE Lanes lanes_of(float x) { return vdupq_n_f32(x); }
ET_INLINE void put(float* p, Lanes x) { vst1q_f32(p, x); }
ET_INLINE Lanes plus(Lanes a, Lanes b) { return vaddq_f32(a, b); }
ET_INLINE Lanes minus(Lanes a, Lanes b) { return vsubq_f32(a, b); }
ET_INLINE Lanes times(Lanes a, Lanes b) { return vmulq_f32(a, b); }
ET_INLINE Lanes madd(Lanes a, Lanes b, Lanes c) { return vfmaq_f32(c, a, b); }
ET_INLINE Lanes larger(Lanes a, Lanes b) { return vmaxq_f32(a, b); }
ET_INLINE bool any_larger(Lanes a, Lanes b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }
ET_INLINE Lanes between(Lanes x, Lanes key, Lanes low, Lanes high, Lanes other) {
    return vbslq_f32(vandq_u32(vcgtq_f32(key, low), vcleq_f32(key, high)), x, other);
}
ET_INLINE Lanes fraction(Lanes x) { return vsubq_f32(x, vrndmq_f32(x)); }
ET_INLINE Lanes scaled(Lanes p, Lanes f, Lanes x) {
    int32x4_t n = vaddq_s32(vcvtq_s32_f32(vsubq_f32(x, f)), vdupq_n_s32(127));
    return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(n, 23)));
}
#else
typedef float Lanes;
ET_INLINE Lanes lanes(const float* p) { return *p; }
ET_INLINE Lanes lanes_of(float x) { return x; }
ET_INLINE void put(float* p, Lanes x) { *p = x; }
ET_INLINE Lanes plus(Lanes a, Lanes b) { return a + b; }
ET_INLINE Lanes minus(Lanes a, Lanes b) { return a - b; }
ET_INLINE Lanes times(Lanes a, Lanes b) { return a * b; }
ET_INLINE Lanes madd(Lanes a, Lanes b, Lanes c) { return fma(a, b, c); }
ET_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
ET_INLINE bool any_larger(Lanes a, Lanes b) { return a > b; }
ET_INLINE Lanes between(Lanes x, Lanes key, Lanes low, Lanes high, Lanes other) { return key > low && key <= high ? x : other; }
ET_INLINE Lanes fraction(Lanes x) {
    float whole = float(int32_t(x));
    return x - (whole > x ? whole - 1.0f : whole);
}
ET_INLINE Lanes scaled(Lanes p, Lanes f, Lanes x) { return p * from_bits(uint32_t(int32_t(x - f) + 127) << 23); }
#endif

constexpr int64_t WIDTH = sizeof(Lanes) / sizeof(float);

// 2^x for x <= 127, nothing (0 or 2^-126) far below; relative error 2e-7, or 3e-6 where the result becomes bf16 anyway.
template <class E>
ET_INLINE Lanes power_of_two(Lanes x) {
#if !defined(ET_USE_AVX512)
    x = larger(lanes_of(-126.0f), x);
#endif
    Lanes f = fraction(x), p;
    if (sizeof(E) == 2) {
        p = madd(lanes_of(1.35341678e-2f), f, lanes_of(5.20114601e-2f));
        p = madd(p, f, lanes_of(2.41442755e-1f));
        p = madd(p, f, lanes_of(6.93003833e-1f));
        p = madd(p, f, lanes_of(1.00000262f));
    } else {
        p = madd(lanes_of(1.87757669e-3f), f, lanes_of(8.98933969e-3f));
        p = madd(p, f, lanes_of(5.58263175e-2f));
        p = madd(p, f, lanes_of(2.40153611e-1f));
        p = madd(p, f, lanes_of(6.93153083e-1f));
        p = madd(p, f, lanes_of(9.99999940e-1f));
    }
    return scaled(p, f, x);
}

// ---- products ----

ET_INLINE Lanes multiply_word(const float* word, const float* row, Lanes sum) {
    return madd(lanes_of(*word), lanes(row), sum);
}
#if defined(ET_USE_AVX512_BF16)
ET_INLINE Lanes multiply_word(const Bf16* word, const Bf16* row, Lanes sum) {  // two neighbours along the depth at once
    int32_t pair;
    memcpy(&pair, word, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(row), (__m512bh)_mm512_set1_epi32(pair));
}
#endif

#if defined(ET_USE_AVX512)
constexpr int64_t STRIP_ROWS = 8, STRIP_BLOCKS = 2;  // 8 x 32 sums in 16 of 32 registers
#else
constexpr int64_t STRIP_ROWS = 4, STRIP_BLOCKS = 1;  // 4 x 16 sums
#endif

// c (32 x 32, rows ldc apart) = or += the sum over n squares of left x right; squares lie left_step, right_step apart.
template <class E>
static void multiply_squares(float* c, int64_t ldc, const E* left, int64_t left_step, const E* right, int64_t right_step,
                             int64_t n, bool add) {
    typedef Form<E> F;
    constexpr int64_t rows = STRIP_ROWS, each = 16 / WIDTH, columns = STRIP_BLOCKS * each, pair = F::depth / 16;
    for (int64_t block = 0; block < 2; block += STRIP_BLOCKS)
        for (int64_t row = 0; row < SIDE; row += rows) {
            Lanes sums[rows][columns];
            float* corner = c + row * ldc + block * 16;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t x = 0; x < columns; x++) sums[r][x] = add ? lanes(corner + r * ldc + x * WIDTH) : lanes_of(0.0f);
            for (int64_t s = 0; s < n; s++)
                for (int64_t t = 0; t < F::deep; t++) {
                    const E* words = left + s * left_step + (row / 16 * F::deep + t) * F::tile + row % 16 * F::depth;
                    const E* tile = right + s * right_step + (block * F::deep + t) * F::tile;
                    for (int64_t w = 0; w < 16; w++)
                        for (int64_t r = 0; r < rows; r++)
                            for (int64_t x = 0; x < columns; x++)
                                sums[r][x] = multiply_word(
                                    words + r * F::depth + w * pair,
                                    tile + x / each * F::deep * F::tile + w * F::depth + x % each * WIDTH * pair, sums[r][x]);
                }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t x = 0; x < columns; x++) put(corner + r * ldc + x * WIDTH, sums[r][x]);
        }
}

// ---- packing ----

// Up to `depth` of x -> one row of a left tile; what is missing becomes 0.
ET_INLINE void pack_row(Bf16* to, const Bf16* x, int64_t n) {
    if (n >= 32) memcpy(to, x, 64);
    else for (int64_t i = 0; i < 32; i++) to[i].bits = i < n ? x[i].bits : 0;
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

// x (size) -> row `row` of the left squares (size padded to SIDE); null becomes 0.
template <class E, class T>
ET_INLINE void pack_left(E* squares, int64_t row, const T* x, int64_t size) {
    for (int64_t k = 0; k < size || k % SIDE; k += Form<E>::depth)
        pack_row(Form<E>::left(squares + k / SIDE * SQUARE, row, k % SIDE), x ? x + k : x, x ? size - k : 0);
}

// 16 rows of 16 words of whatever type, from_step bytes apart -> transposed, `to` contiguous.
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

// `count` squares: X's left form -> X^T's right form, or X's right form -> X^T's left form.
template <class E>
static void transpose_squares(const E* from, E* to, int64_t count) {
    for (int64_t i = 0; i < count * SQUARE; i += Form<E>::tile) transpose_words(from + i, 64, to + i);
}

// `count` squares: X's left form -> X's right form.
ET_INLINE void turn_squares(const float* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t t = 0; t < 4; t++) memcpy(to + i * SQUARE + t * 256, from + i * SQUARE + (t % 2 * 2 + t / 2) * 256, 1024);
}
#if defined(ET_USE_AVX512_BF16)
// Words of two: those of `even` and of `odd` side by side, columns 0 to 15 -> first, 16 to 31 -> second.
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

// x (size rows of 32 columns) times factor[column] -> x^T: `count` rows of T, one a column.
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
                    ET_SIMD
                    for (int64_t i = 0; i < 16; i++) store(to + i, block[16 * c + i] * f);
                } else {
                    for (int64_t i = 0; i < n; i++) store(to + i, block[16 * c + i] * f);
                }
            }
        }
}
