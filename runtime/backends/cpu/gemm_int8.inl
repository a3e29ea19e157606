// Rounding to 8 bits for gemm.inl's products: a row of the weight in steps of its largest / 127, a row of x in steps of its own
// largest / 127, and sums that are integers until the whole depth is done. Backward, where the depth is the weight's rows, dy
// times the scales of those rows is what is rounded. After "LLM.int8()" (Dettmers et al. 2022, arXiv 2208.07339), which
// multiplies outlier columns apart; here a product whose rows are too uneven is left to bf16 as a whole.

// Write the scale of rows [from, until) of a weight, and its inverse, into scales and inverses (outputs,). A row's largest
// magnitude is the largest absmax of its blocks, for the largest value in the code table is 1.
static void scale_rows(const ProjectWeight& weight, int64_t inputs, int64_t from, int64_t until, float* scales,
                       float* inverses) {
    const int64_t blocks = inputs >> weight.block_shift;
    for (int64_t row = from; row < until; row++) {
        float largest = 0.0f;
        for (int64_t i = row * blocks; i < (row + 1) * blocks; i++) {
            const float absmax = fabsf(weight.absmax.at(i));  // double quantisation may turn an absmax of almost 0 negative
            if (!(absmax <= largest)) largest = absmax;       // true for a NaN, which stays
            if (largest != largest) break;
        }
        scales[row] = largest / INT8_LARGEST, inverses[row] = largest > 0.0f ? INT8_LARGEST / largest : 0.0f;
    }
}

// c (four tiles of int32 sums) -> fp32, in place, times rows (32,) and columns (32,) (null: 1), plus more (four tiles of fp32
// sums; null: 0).
static void scale_sums(float* c, const float* rows, const float* columns, const float* more) {
    for (int64_t tile = 0; tile < 4; tile++)
        for (int64_t r = 0; r < 16; r++) {
            float* at = c + tile * 256 + r * 16;
            __m512 factor = columns ? _mm512_loadu_ps(columns + tile % 2 * 16) : _mm512_set1_ps(1.0f);
            factor = _mm512_mul_ps(_mm512_set1_ps(rows[tile / 2 * 16 + r]), factor);
            __m512 sums = _mm512_cvtepi32_ps(_mm512_loadu_si512(at));
            __m512 rest = more ? _mm512_loadu_ps(more + (at - c)) : _mm512_setzero_ps();
            _mm512_storeu_ps(at, _mm512_fmadd_ps(sums, factor, rest));
        }
}

// Write the scale of row (depth,), each number times its factor (depth,) (null: 1). Return the square of the relative error
// that rounding to steps of this scale makes, step^2 / 12 a number; NaN if a number is not finite.
static float scale_numbers(const Bf16* row, const float* factors, int64_t depth, float* scale) {
    __m512 largest = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < depth; i += 16) {
        __m512 values = widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i)));
        if (factors) values = _mm512_mul_ps(values, _mm512_loadu_ps(factors + i));
        largest = _mm512_max_ps(_mm512_abs_ps(values), largest);
        squares = _mm512_fmadd_ps(values, values, squares);
    }
    *scale = _mm512_reduce_max_ps(largest) / INT8_LARGEST;
    const float all = _mm512_reduce_add_ps(squares);
    return all == 0.0f ? 0.0f : *scale * *scale / 12.0f * float(depth) / all;
}

// Return true if rows with these squared errors (rows,) may be rounded to 8 bits; false if any is not finite. Rows of zeros
// (padding, or tokens that are not trained on) are not counted, so that they cannot hide the errors of the others.
static bool even_enough(const float* errors, int64_t rows) {
    float all = 0.0f;
    int64_t counted = 0;
    for (int64_t row = 0; row < rows; row++) all += errors[row], counted += errors[row] != 0.0f;
    return all <= INT8_ERROR_LIMIT * INT8_ERROR_LIMIT * float(counted);
}

// Round bf16 squares in left form, 32 rows x depth, to int8 squares in left form or, if `turned`, in right form.
// row_scales (32,); factors (depth,), by which numbers are multiplied first, or null.
static void round_squares(const Bf16* lines, const float* row_scales, const float* factors, int64_t depth, bool turned,
                          int8_t* to) {
    alignas(64) int8_t left[2048];
    for (int64_t deep = 0; deep < depth; deep += 64, lines += 2 * SQUARE, to += 2048) {
        int8_t* square = turned ? left : to;
        for (int64_t r = 0; r < SIDE; r++) {
            const __m512 inverse = _mm512_set1_ps(row_scales[r] > SMALLEST_PRODUCT_SCALE ? 1.0f / row_scales[r] : 0.0f);
            for (int64_t i = 0; i < 4; i++) {
                const Bf16* from = lines + i / 2 * SQUARE + r * SIDE + i % 2 * 16;
                __m512 values = widened(_mm256_load_si256(reinterpret_cast<const __m256i*>(from)));
                values = _mm512_mul_ps(values, inverse);
                if (factors) values = _mm512_mul_ps(values, _mm512_loadu_ps(factors + deep + 16 * i));
                __m128i rounded = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(values));
                _mm_store_si128(reinterpret_cast<__m128i*>(square + r * 64 + i * 16), rounded);
            }
        }
        if (turned)
            for (int64_t tile = 0; tile < 2048; tile += 1024) transpose_words(left + tile, 64, to + tile);
    }
}
