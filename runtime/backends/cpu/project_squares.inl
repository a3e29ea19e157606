// project.inl's squares: 32 x 32 numbers in left form, read from matrices, dropped out and rounded.

// matrix (rows, stride) -> squares (count, SQUARE): rows [row, row + 32), numbers [column, column + 32 * count). Rows beyond
// the last become 0.
template <class M>
static void read_squares(const M* matrix, int64_t stride, int64_t rows, int64_t row, int64_t column, int64_t count,
                         Real* squares) {
    for (int64_t r = 0; r < SIDE; r++)
        pack_left(squares, r, row + r < rows ? matrix + (row + r) * stride + column : nullptr, count * SIDE);
}

// Write line (32,) to row r of a square.
ET_INLINE void put_row(Real* square, int64_t r, const float* line) {
    if constexpr (sizeof(Real) == 2) return put_line(square + r * SIDE, line);
    for (int64_t i = 0; i < SIDE; i += LANES) put(Form<Real>::left(square, r, i), get(line + i));
}

// matrix (rows, columns) fp32, contiguous, times `factor` -> one square; 0 beyond its ends.
static void read_square(const float* matrix, int64_t rows, int64_t columns, int64_t row, int64_t column, float factor,
                        Real* square) {
    for (int64_t r = 0; r < SIDE; r++) {
        alignas(64) float line[SIDE] = {};
        const float* from = matrix + (row + r) * columns + column;
        const int64_t here = row + r < rows ? least(SIDE, columns - column) : 0;
        each(here, [&](int64_t i, auto part) { put(line + i, get(from + i, part) * factor, part); });
        put_row(square, r, line);
    }
}

// The dropout of one linear: the same factors as elementwise.inl's dropout, computed where they are needed.
struct DropoutMask {
    uint32_t seed, threshold;
    float keep;

    ET_MEMBER explicit DropoutMask(const ProjectLinear& linear)
        : seed(hash32(uint32_t(linear.key))), threshold(uint32_t(linear.threshold)), keep(linear.keep) {}
    // Return the factors (0 or 1 / (1 - p)) of a register of elements, from this flat position on.
    ET_MEMBER Floats at(int64_t position) const {
        static const uint32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const Words hash = hash32((read_as<Words>(lanes) + uint32_t(position)) ^ seed);
        return hash >= all(threshold) ? all(keep) : all(0.0f);
    }
};

// squares (count, SQUARE), as read_squares made them from a matrix of `width` columns -> the same after dropout.
static void drop_squares(const DropoutMask& mask, const Real* squares, int64_t width, int64_t row, int64_t column,
                         int64_t count, Real* dropped) {
    for (int64_t k = 0; k < count; k++, squares += SQUARE, dropped += SQUARE)
        for (int64_t r = 0; r < SIDE; r++)
            for (int64_t i = 0; i < SIDE; i += LANES) {
                const Floats values = get(Form<const Real>::left(squares, r, i));
                put(Form<Real>::left(dropped, r, i), values * mask.at((row + r) * width + column + k * SIDE + i));
            }
}

// sums (32, 32) fp32, row-major -> one square.
static void round_square(const float* sums, Real* square) {
    for (int64_t r = 0; r < SIDE; r++) put_row(square, r, sums + r * SIDE);
}
