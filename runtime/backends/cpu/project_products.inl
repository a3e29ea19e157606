// project.inl's large products: a thread's columns of one linear's y, or of dx, for the rows that are packed.

// Return the portion of `columns` of linear's y (forward) or of dx (backward).
template <bool BACKWARD, class M, class E>
Portion<M> Project<BACKWARD, M, E>::portion(int64_t row, int64_t panels_here, Range columns, int64_t linear) const {
    Portion<M> mine = {row, panels_here, columns, linear, linear, 0, 0, 0, packed_b, y, call->y_row};
    if (BACKWARD) {
        mine.first = 0, mine.last = call->count - 1, mine.rank_squares = rank_squares;
        mine.adapter = packed_a, mine.out = dx, mine.out_row = call->dx_row;
        return mine;
    }
    mine.rank_squares = squares_of(call->linears[linear]);
    for (int64_t p = 0; p < linear; p++) {
        const int64_t passed = squares_of(call->linears[p]);
        mine.squares_before += passed, mine.outputs_before += call->linears[p].outputs;
        mine.adapter += call->linears[p].outputs * passed * SIDE;
    }
    mine.out += mine.outputs_before;
    return mine;
}

// Move on to the next strip of the block, else to the first strip of the block in the next piece, else to the next block.
// Return false after the last.
template <bool BACKWARD, class M, class E>
bool Project<BACKWARD, M, E>::next_strip(const Portion<M>& mine, Position* at) const {
    at->column += SIDE;
    if (at->column < at->block_end) return true;
    at->column = at->block_begin;
    if (advance(&at->piece, mine.last)) return true;
    at->piece = first_piece(mine.first);
    at->column = at->block_begin = at->block_end;
    at->block_end = least(at->block_begin + SUM_COLUMNS, mine.columns.end);
    return at->column < mine.columns.end;
}

// Return the prefetching that goes with one strip: an equal part of the next piece's panels, or of the first piece's again for
// the next block, so that all strips of this piece and block together fetch all of them. `sums` and `out` are left null.
template <bool BACKWARD, class M, class E>
Ahead Project<BACKWARD, M, E>::prefetch_panels(const Portion<M>& mine, const Position& at, int64_t steps) const {
    Piece later = at.piece;
    if (!advance(&later, mine.last)) later = first_piece(mine.first);
    const int64_t all_steps = (at.block_end - at.block_begin) / SIDE * mine.panels * steps;
    const int64_t later_lines = mine.panels * SIDE * (later.end - later.begin) * int64_t(sizeof(E)) / 64;
    const int64_t lines = (later_lines + all_steps - 1) / all_steps;
    const int64_t steps_before = (at.column - at.block_begin) / SIDE * mine.panels * steps;
    const char* panels = reinterpret_cast<const char*>(panel(0, later)) + steps_before * lines * 64;
    return {nullptr, nullptr, mine.out_row * int64_t(sizeof(M)), panels, lines};
}

// Write a finished square of sums c (32, 32) to 32 rows and columns of the result, after the adapters' part has been added
// where it did not join the large product: sums of codes are integers, and backward every linear may have its own dropout.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::finish(const Portion<M>& mine, float* c, Thin rest, int64_t top, int64_t column) const {
    const int64_t rows = least(SIDE, call->rows - top);
    M* to = mine.out + top * mine.out_row + column;
    if (SCALED) {
        alignas(64) float thin_sums[SQUARE];
        if (rest.count) multiply_squares(thin_sums, SIDE, rest.left, SQUARE, rest.right, SQUARE, rest.count, false);
        const float *of_rows = row_scales + top, *of_weight = weight_scales + mine.outputs_before + column;
        // backward, the weight's scales are already in dy
        scale_sums(c, BACKWARD ? of_rows : of_weight, BACKWARD ? nullptr : of_rows, row_excess + top,
                   rest.count ? thin_sums : nullptr);
    }
    if (!BACKWARD) write_columns(c, to, mine.out_row, rows);
    else {
        if (has_dropout) add_dropped(c, rest, top, column);
        write_rows(c, to, mine.out_row, rows);
    }
}

// Multiply one strip with all panels, while `next`, the strip after it, is dequantised `chunks` chunks a square.
// sums: the block's, a square for every strip and panel; they are started at depth 0 and written to the result at its end.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::multiply_strip(const Portion<M>& mine, const Position& at, const W* strip, float* sums,
                                          Strip<BACKWARD, W>& next, int64_t chunks) const {
    const int64_t steps = (at.piece.end - at.piece.begin) / DEPTH<E>;
    const bool starts = at.piece.offset == 0;
    const bool ends = at.piece.linear == mine.last && at.piece.end == depth_of(mine.last);
    Ahead ahead = prefetch_panels(mine, at, steps);
    float* c = sums + (at.column - at.block_begin) * mine.panels * SIDE;
    for (int64_t number = 0; number < mine.panels; number++, c += SQUARE, ahead.panels += steps * ahead.lines * 64) {
        const E* rows = panel(number, at.piece);
        const int64_t top = mine.row + number * SIDE;
        Thin rest = {};
        if (ends && mine.rank_squares > 0)
            rest = squares<BACKWARD>(thin + (number * rank_squares + mine.squares_before) * SQUARE,
                                     mine.adapter + at.column * mine.rank_squares * SIDE,
                                     BACKWARD && has_dropout ? 0 : mine.rank_squares);
        ahead.sums = starts ? nullptr : c + SQUARE;
        const char* out = reinterpret_cast<const char*>(mine.out + top * mine.out_row + at.column);
        ahead.out = ends && call->rows - top >= SIDE ? out : nullptr;
        const auto main = squares<BACKWARD>(rows, strip, steps);
        // The thin product joins the large one as more depth, unless that is of codes, whose sums are integers.
        if constexpr (SCALED) multiply<BACKWARD>(c, main, {}, !starts, next, chunks, ahead);
        else multiply<BACKWARD>(c, main, rest, !starts, next, chunks, ahead);
        if (ends) finish(mine, c, rest, top, at.column);
    }
}

// Compute `columns` of linear's y (forward) or of dx (backward, linear 0) for `panels_here` panels of rows from `row` on.
// scratch: a block of sums, then two strips, of which one is multiplied while the other is made.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::multiply_columns(int64_t row, int64_t panels_here, Range columns, int64_t linear,
                                            char* scratch) const {
    const Portion<M> mine = portion(row, panels_here, columns, linear);
    float* sums = reinterpret_cast<float*>(scratch);
    W* strips[2];
    strips[0] = reinterpret_cast<W*>(scratch + sums_bytes), strips[1] = strips[0] + STRIP_DEPTH<E> * SIDE;
    Position at = {first_piece(mine.first), columns.begin, columns.begin, least(columns.begin + SUM_COLUMNS, columns.end)};
    Strip<BACKWARD, W> next(call->linears[mine.first].weight, call->inputs, weight_inverses + mine.outputs_before);
    next.begin(strips[0], at.column, at.piece.begin, at.piece.end);
    for (int current = 0;; current ^= 1) {
        while (next.more()) next.chunk();  // the few chunks that found no place between products
        Position then = at;
        const bool more = next_strip(mine, &then);
        int64_t chunks = 0;
        if (more) {
            if (BACKWARD && then.piece.linear != at.piece.linear)
                next = Strip<BACKWARD, W>(call->linears[then.piece.linear].weight, call->inputs,
                                          weight_inverses + then.piece.offset - then.piece.begin);
            next.begin(strips[current ^ 1], then.column, then.piece.begin, then.piece.end);
            const int64_t squares = panels_here * ((at.piece.end - at.piece.begin) / DEPTH<E>);
            chunks = (Strip<BACKWARD, W>::chunks(then.piece.end - then.piece.begin) + squares - 1) / squares;
        }
        multiply_strip(mine, at, strips[current], sums, next, chunks);
        if (!more) return;
        at = then;
    }
}

// c (32, 32) += the adapters' part of dx at 32 rows and columns from (row, column) on, each with its own dropout.
// rest.left: dreduced of these rows, rest.right: A's squares, both of all linears one after another.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::add_dropped(float* c, Thin rest, int64_t row, int64_t column) const {
    alignas(64) float part[SQUARE];
    for (int64_t p = 0; p < call->count; p++) {
        const int64_t here = squares_of(call->linears[p]);
        if (here == 0) continue;
        multiply_squares(part, SIDE, rest.left, SQUARE, rest.right, SQUARE, here, false);
        rest.left += here * SQUARE, rest.right += here * SQUARE;
        const DropoutMask mask(call->linears[p]);
        for (int64_t r = 0; r < SIDE; r++)
            for (int64_t i = r * SIDE; i < (r + 1) * SIDE; i += LANES)
                put(c + i, fused(get(part + i), mask.at((row + r) * call->inputs + column + i % SIDE), get(c + i)));
    }
}
