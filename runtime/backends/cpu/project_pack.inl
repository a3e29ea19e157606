// project.inl's packing: adapters, int8 scales, and panels of rows with the thin products that are made of them on the way.

// ---- adapters ----

// Return the place of a square of a linear's A: number `square` along the rank, `deep` along the inputs. squares_before: rank
// squares of the linears before. The order is the one in which products read them: forward along the rank of one linear;
// backward along all ranks.
template <bool BACKWARD, class M, class E>
Real* Project<BACKWARD, M, E>::square_a(int64_t linear, int64_t squares_before, int64_t square, int64_t deep) const {
    const int64_t all = call->inputs / SIDE, here = squares_of(call->linears[linear]);
    return packed_a +
           (BACKWARD ? deep * rank_squares + squares_before + square : squares_before * all + deep * here + square) * SQUARE;
}

// Pack this thread's share of A and s B into squares: forward A^T in right form and s B in left form, backward A and s B in
// right form. B's squares lie in the order (linear, square of outputs, rank square).
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::pack_adapters(int index, int count) const {
    alignas(64) Real lines[SQUARE];
    Real* b = packed_b;
    int64_t before = 0;
    for (int64_t p = 0; p < call->count; p++) {
        const ProjectLinear& linear = call->linears[p];
        const int64_t here = squares_of(linear);
        Range mine = share(call->inputs / SIDE, 1, index, count);
        for (int64_t deep = mine.begin; deep < mine.end; deep++)
            for (int64_t s = 0; s < here; s++) {
                read_square(linear.a, linear.rank, call->inputs, s * SIDE, deep * SIDE, 1.0f, lines);
                if (BACKWARD) turn_squares(lines, square_a(p, before, s, deep), 1);
                else transpose_squares(lines, square_a(p, before, s, deep), 1);
            }
        mine = share(linear.outputs / SIDE, 1, index, count);
        for (int64_t o = mine.begin; o < mine.end; o++)
            for (int64_t s = 0; s < here; s++) {
                read_square(linear.b, linear.outputs, linear.rank, o * SIDE, s * SIDE, linear.scale, lines);
                Real* to = b + (o * here + s) * SQUARE;
                if (BACKWARD) turn_squares(lines, to, 1);
                else memcpy(static_cast<void*>(to), lines, sizeof lines);
            }
        b += linear.outputs * here * SIDE, before += here;
    }
}

// ---- int8: scales of the weights' rows, then of x's or dy's ----

template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::scale_weights(int index, int count) const {
    int64_t before = 0;
    for (int64_t p = 0; p < call->count; p++) {
        const ProjectLinear& linear = call->linears[p];
        const Range mine = share(linear.outputs, 1, index, count);
        scale_rows(linear.weight, call->inputs, mine.begin, mine.end, weight_scales + before, weight_inverses + before);
        before += linear.outputs;
    }
}

// Backward needs the weights' scales first: their rows are its depth, so dy is multiplied by them before it is rounded.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::scale_matrix(int index, int count) const {
    const Range mine = share(round_up(call->rows, SIDE), 1, index, count);
    const M* matrix = BACKWARD ? y : x;
    const float* factors = BACKWARD ? weight_scales : nullptr;
    for (int64_t row = mine.begin; row < mine.end; row++) {
        row_scales[row] = 0.0f, row_excess[row] = 0;
        if (row >= call->rows) continue;
        const M* from = matrix + row * (BACKWARD ? call->y_row : call->x_row);
        row_errors[row] = scale_numbers(from, factors, depth, &row_scales[row]);
    }
}

// ---- a panel of rows, and the thin products of it ----

// lines (a piece of 32 rows from `top` on, as squares in left form) -> the form of a panel. Forward, x^T stands on the right;
// backward, dy stands on the left, and lines already are the panel.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::pack_panel(Real* panel, const Real* lines, int64_t, const Piece& piece) const {
    if (!BACKWARD) transpose_squares(lines, panel, (piece.end - piece.begin) / SIDE);
}
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::pack_panel(Code* panel, const Real* lines, int64_t top, const Piece& piece) const {
    const float* factors = BACKWARD ? weight_scales + piece.offset : nullptr;
    round_squares(lines, row_scales + top, factors, piece.end - piece.begin, !BACKWARD, panel, row_excess + top);
}

// Pack panel `number` of the rows from `row` on, and compute these rows' `reduced`: into call->reduced for the backward, and in
// right form into thin.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::pack_forward(int64_t row, int64_t number, const ThinScratch& scratch) const {
    Piece piece = first_piece(0);
    const int64_t top = row + number * SIDE;
    do {
        const int64_t n = (piece.end - piece.begin) / SIDE;
        read_squares(x, call->x_row, call->rows, top, piece.begin, n, scratch.lines);
        if (y) pack_panel(panel(number, piece), scratch.lines, top, piece);
        int64_t before = 0;
        for (int64_t p = 0; p < call->count; p++) {
            const ProjectLinear& linear = call->linears[p];
            const int64_t here = squares_of(linear);
            if (here == 0) continue;
            const Real* lines = scratch.lines;
            if (linear.threshold) {
                drop_squares(DropoutMask(linear), lines, call->inputs, top, piece.begin, n, scratch.dropped);
                lines = scratch.dropped;
            }
            for (int64_t s = 0; s < here; s++)
                multiply_squares(scratch.sums + (before + s) * SQUARE, SIDE, lines, SQUARE,
                                 square_a(p, before, s, piece.begin / SIDE), here * SQUARE, n, piece.begin > 0);
            before += here;
        }
    } while (advance(&piece, 0));
    for (int64_t s = 0; s < rank_squares; s++) {
        round_square(scratch.sums + s * SQUARE, scratch.lines);
        for (int64_t r = 0; r < least(SIDE, call->rows - top); r++)
            put_line(reduced + ((top + r) * rank_squares + s) * SIDE, scratch.sums + s * SQUARE + r * SIDE);
        transpose_squares(scratch.lines, thin + (number * rank_squares + s) * SQUARE, 1);
    }
}

// Pack panel `number` of dy's rows from `row` on, and compute these rows' dreduced, in left form into thin. The transposes of
// reduced and dreduced, which the gradients of B and A multiply, are packed as well.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::pack_backward(int64_t row, int64_t number, const ThinScratch& scratch) const {
    const int64_t top = row + number * SIDE;
    const Real* b = packed_b;
    Piece piece = first_piece(0);
    int64_t before = 0;
    for (bool more = true; more;) {
        const int64_t n = (piece.end - piece.begin) / SIDE;
        const ProjectLinear& linear = call->linears[piece.linear];
        const int64_t here = squares_of(linear);
        Real* lines = SCALED ? scratch.lines : reinterpret_cast<Real*>(panel(number, piece));
        read_squares(y, call->y_row, call->rows, top, piece.offset, n, lines);
        pack_panel(panel(number, piece), lines, top, piece);
        for (int64_t s = 0; s < here; s++)
            multiply_squares(scratch.sums + (before + s) * SQUARE, SIDE, lines, SQUARE,
                             b + (piece.begin / SIDE * here + s) * SQUARE, here * SQUARE, n, piece.begin > 0);
        if (piece.end == linear.outputs) b += linear.outputs * here * SIDE, before += here;
        more = advance(&piece, call->count - 1);
    }
    // X's left form is turned to its right form, whose transpose is X^T's left form.
    for (int64_t s = 0; s < rank_squares; s++) {
        Real* to = thin + (number * rank_squares + s) * SQUARE;
        round_square(scratch.sums + s * SQUARE, to);
        turn_squares(to, scratch.lines, 1);
        transpose_squares(scratch.lines, dreduced_turned + (s * panel_count + number) * SQUARE, 1);
        read_squares(reduced, rank_squares * SIDE, call->rows, top, s * SIDE, 1, scratch.lines);
        turn_squares(scratch.lines, scratch.dropped, 1);
        transpose_squares(scratch.dropped, reduced_turned + (s * panel_count + number) * SQUARE, 1);
    }
}
