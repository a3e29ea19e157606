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
        float most = 0.0f;
        for (int64_t i = row * blocks; i < (row + 1) * blocks; i++) {
            const float absmax = fabsf(weight.absmax.at(i));  // double quantisation may turn an absmax of almost 0 negative
            if (!(absmax <= most)) most = absmax;             // true for a NaN, which stays
            if (most != most) break;
        }
        scales[row] = most / INT8_LARGEST, inverses[row] = most > 0.0f ? INT8_LARGEST / most : 0.0f;
    }
}

// Write the scale of row (depth,), each number times its factor (depth,) (null: 1). Return the square of the relative error
// that rounding to steps of this scale makes, step^2 / 12 a number; NaN if a number is not finite.
template <class M>
static float scale_numbers(const M* row, const float* factors, int64_t depth, float* scale) {
    Floats most = all(0.0f), squares = all(0.0f);
    for (int64_t i = 0; i < depth; i += LANES) {
        Floats values = get(row + i);
        if (factors) values = values * get(factors + i);
        most = larger(as_floats(as_words(values) & all(MAGNITUDE_BITS)), most);
        squares = fused(values, values, squares);
    }
    *scale = largest(most) / INT8_LARGEST;
    const float total = sum(squares);
    return total == 0.0f ? 0.0f : *scale * *scale / 12.0f * float(depth) / total;
}

// Return true if rows with these squared errors (rows,) may be rounded to 8 bits; false if any is not finite. Rows of zeros
// (padding, or tokens that are not trained on) are not counted, so that they cannot hide the errors of the others.
static bool even_enough(const float* errors, int64_t rows) {
    float all = 0.0f;
    int64_t counted = 0;
    for (int64_t row = 0; row < rows; row++) all += errors[row], counted += errors[row] != 0.0f;
    return all <= INT8_ERROR_LIMIT * INT8_ERROR_LIMIT * float(counted);
}

// Round squares in left form, 32 rows x depth, to squares of codes in left form or, if `turned`, in right form.
// row_scales (32,); factors (depth,), by which numbers are multiplied first, or null. excess (32,) += CODE_ZERO times the sum
// of each row's codes: what weights that stand CODE_ZERO too high add to the row's sums.
static void round_squares(const Real* lines, const float* row_scales, const float* factors, int64_t depth, bool turned,
                          Code* to, int32_t* excess) {
    constexpr int64_t deep = DEPTH<Code>;
    const Floats shift = all(ROUNDING_SHIFT);
    alignas(64) Code left[Form<Code>::square];
    for (int64_t k = 0; k < depth; k += deep, lines += deep / SIDE * SQUARE, to += Form<Code>::square) {
        Code* square = turned ? left : to;
        for (int64_t r = 0; r < SIDE; r++) {
            const Floats inverse = all(row_scales[r] > SMALLEST_PRODUCT_SCALE ? 1.0f / row_scales[r] : 0.0f);
            for (int64_t i = 0; i < deep; i += LANES) {
                Floats values = get(Form<const Real>::left(lines + i / SIDE * SQUARE, r, i % SIDE)) * inverse;
                if (factors) values = values * get(factors + k + i);
                put(Form<Code>::left(square, r, i), (values + shift) - shift);
            }
            int32_t total = 0;
            for (int64_t i = 0; CODE_ZERO != 0 && i < deep; i++) total += *Form<Code>::left(square, r, i);
            excess[r] += CODE_ZERO * total;
        }
        if (turned)
            for (int64_t i = 0; i < Form<Code>::square; i += Form<Code>::tile) transpose_words(left + i, 64, to + i);
    }
}

// c (32, 32), sums of products of codes -> fp32, in place, times rows (32,) and columns (32,) (null: 1), plus more (32, 32)
// (null: 0). excess (32,), as round_squares made it, is taken off first: of columns or, where columns is null, of rows.
static void scale_sums(float* c, const float* rows, const float* columns, const int32_t* excess, const float* more) {
    for (int64_t r = 0; r < SIDE; r++)
        for (int64_t i = 0; i < SIDE; i += LANES) {
            float* at = c + r * SIDE + i;
            Ints sums = read_as<Ints>(at) - (columns ? read_as<Ints>(excess + i) : excess[r] + Ints{});
            const Floats factor = columns ? rows[r] * get(columns + i) : all(rows[r]);
            put(at, fused(to_floats(sums), factor, more ? get(more + r * SIDE + i) : all(0.0f)));
        }
}
