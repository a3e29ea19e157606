// project.inl's squares: 32 x 32 numbers, read from matrices, dropped out and rounded, 32 numbers of bf16 (64 bytes) a row.

// matrix (rows, stride) -> squares (count, SQUARE) in left form: rows [row, row + 32), numbers [column, column + 32 * count).
// Rows beyond the last become 0.
static void read_squares(const Bf16* matrix, int64_t stride, int64_t rows, int64_t row, int64_t column, int64_t count,
                         Bf16* squares) {
    for (int64_t r = 0; r < SIDE; r++) {
        const Bf16* from = matrix + (row + r) * stride + column;
        for (int64_t k = 0; k < count; k++) {
            __m512i line = row + r < rows ? _mm512_loadu_si512(from + k * SIDE) : _mm512_setzero_si512();
            _mm512_store_si512(squares + k * SQUARE + r * SIDE, line);
        }
    }
}

// matrix (rows, columns) fp32, contiguous, times `factor` -> one square in left form; 0 beyond its ends.
static void read_square(const float* matrix, int64_t rows, int64_t columns, int64_t row, int64_t column, float factor,
                        Bf16* square) {
    for (int64_t r = 0; r < SIDE; r++, square += SIDE) {
        __m512 parts[2];
        for (int64_t i = 0; i < 2; i++) {
            int64_t here = row + r < rows ? least(16, columns - column - 16 * i) : 0;
            __mmask16 mask = here > 0 ? __mmask16((1u << here) - 1) : __mmask16(0);
            const float* from = mask ? matrix + (row + r) * columns + column + 16 * i : matrix;
            parts[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from), _mm512_set1_ps(factor));
        }
        _mm512_store_si512(square, rounded(parts[0], parts[1]));
    }
}

// The dropout of one linear: the same factors as elementwise.inl's dropout, computed where they are needed.
struct DropoutMask {
    uint32_t seed, threshold;
    float keep;

    ET_MEMBER explicit DropoutMask(const ProjectLinear& linear)
        : seed(hash32(uint32_t(linear.key))), threshold(uint32_t(linear.threshold)), keep(linear.keep) {}
    // The factors (0 or 1 / (1 - p)) of 16 elements, from this flat position on.
    ET_MEMBER __m512 at(int64_t position) const {
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        Words hash = hash32((Words)_mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(position))) ^ seed);
        return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask((__m512i)hash, _mm512_set1_epi32(int32_t(threshold))),
                                   _mm512_set1_ps(keep));
    }
};

// squares (count, SQUARE) in left form, as read_squares made them from a matrix of `width` columns -> the same after dropout.
static void drop_squares(const DropoutMask& mask, const Bf16* squares, int64_t width, int64_t row, int64_t column,
                         int64_t count, Bf16* dropped) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t r = 0; r < SIDE; r++) {
            __m512i line = _mm512_load_si512(squares + k * SQUARE + r * SIDE);
            int64_t position = (row + r) * width + column + k * SIDE;
            __m512 low = _mm512_mul_ps(widened(_mm512_castsi512_si256(line)), mask.at(position));
            __m512 high = _mm512_mul_ps(widened(_mm512_extracti64x4_epi64(line, 1)), mask.at(position + 16));
            _mm512_store_si512(dropped + k * SQUARE + r * SIDE, rounded(low, high));
        }
}

// sums (32, 32) fp32, row-major, times `factor` -> one square in left form.
static void round_square(const float* sums, float factor, Bf16* square) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t r = 0; r < SIDE; r++, sums += SIDE)
        _mm512_store_si512(square + r * SIDE,
                           rounded(_mm512_mul_ps(_mm512_loadu_ps(sums), by), _mm512_mul_ps(_mm512_loadu_ps(sums + 16), by)));
}
