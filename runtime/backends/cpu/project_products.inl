// project.inl's large products: a thread's columns of one linear's y, or of dx, for the rows that are packed.

// The part of the thin product that joins the large one as more depth: all of it in bf16; nothing in int8, whose sums are
// integers.
static const Squares<Bf16>& joined(const Squares<Bf16>& rest, const Bf16*) { return rest; }
static Squares<int8_t> joined(const Squares<Bf16>&, const int8_t*) { return {}; }

// Return the portion of `columns` of linear's y (forward) or of dx (backward).
template <bool BACKWARD, class E>
Portion Project<BACKWARD, E>::portion(int64_t row, int64_t panels_here, Range columns, int64_t linear) const {
    Portion mine = {row, panels_here, columns, linear, linear, 0, 0, 0, packed_b, call->y, call->y_row};
    if (BACKWARD) {
        mine.first = 0, mine.last = call->count - 1, mine.rank_squares = rank_squares;
        mine.adapter = packed_a, mine.out = call->dx, mine.out_row = call->dx_row;
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
template <bool BACKWARD, class E>
bool Project<BACKWARD, E>::next_strip(const Portion& mine, Position* at) const {
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
template <bool BACKWARD, class E>
Ahead Project<BACKWARD, E>::prefetch_panels(const Portion& mine, const Position& at, int64_t steps) const {
    Piece later = at.piece;
    if (!advance(&later, mine.last)) later = first_piece(mine.first);
    const int64_t all_steps = (at.block_end - at.block_begin) / SIDE * mine.panels * steps;
    const int64_t later_lines = mine.panels * SIDE * (later.end - later.begin) * int64_t(sizeof(E)) / 64;
    const int64_t lines = (later_lines + all_steps - 1) / all_steps;
    const int64_t steps_before = (at.column - at.block_begin) / SIDE * mine.panels * steps;
    return {nullptr, nullptr, mine.out_row, reinterpret_cast<const char*>(panel(0, later)) + steps_before * lines * 64, lines};
}

// Write a finished square of sums c (four tiles) to 32 rows and columns of the result, after the adapters' part has been added
// where it did not join the large product: int8's sums are integers, and backward every linear may have its own dropout.
template <bool BACKWARD, class E>
void Project<BACKWARD, E>::finish(const Portion& mine, float* c, Squares<Bf16> rest, int64_t top, int64_t column) const {
    const int64_t rows = least(SIDE, call->rows - top);
    Bf16* to = mine.out + top * mine.out_row + column;
    if (SCALED) {
        alignas(64) float thin_sums[SQUARE];
        if (rest.count) multiply_alone(thin_sums, rest);
        const float *of_rows = row_scales + top, *of_weight = weight_scales + mine.outputs_before + column;
        // backward, the weight's scales are already in dy
        scale_sums(c, BACKWARD ? of_rows : of_weight, BACKWARD ? nullptr : of_rows, rest.count ? thin_sums : nullptr);
    }
    if (!BACKWARD) write_columns(c, to, mine.out_row, rows);
    else {
        if (has_dropout) add_dropped(c, rest, top, column);
        write_rows(c, to, mine.out_row, rows);
    }
}

// Multiply one strip with all panels, while `next`, the strip after it, is dequantised `chunks` chunks a square.
// sums: the block's, a square for every strip and panel; they are started at depth 0 and written to the result at its end.
template <bool BACKWARD, class E>
void Project<BACKWARD, E>::multiply_strip(const Portion& mine, const Position& at, const E* strip, float* sums,
                                          Strip<BACKWARD, E>& next, int64_t chunks) const {
    const int64_t steps = (at.piece.end - at.piece.begin) / DEPTH<E>;
    const bool starts = at.piece.offset == 0;
    const bool ends = at.piece.linear == mine.last && at.piece.end == depth_of(mine.last);
    Ahead ahead = prefetch_panels(mine, at, steps);
    float* c = sums + (at.column - at.block_begin) * mine.panels * SIDE;
    for (int64_t number = 0; number < mine.panels; number++, c += SQUARE, ahead.panels += steps * ahead.lines * 64) {
        const E* rows = panel(number, at.piece);
        const int64_t top = mine.row + number * SIDE;
        const Squares<E> main = {BACKWARD ? rows : strip, BACKWARD ? strip : rows, steps};
        Squares<Bf16> rest = {};
        if (ends && mine.rank_squares > 0) {
            const Bf16* of_rows = thin + (number * rank_squares + mine.squares_before) * SQUARE;
            const Bf16* of_weight = mine.adapter + at.column * mine.rank_squares * SIDE;
            rest = {BACKWARD ? of_rows : of_weight, BACKWARD ? of_weight : of_rows,
                    BACKWARD && has_dropout ? 0 : mine.rank_squares};
        }
        ahead.sums = starts ? nullptr : c + SQUARE;
        ahead.out = ends && call->rows - top >= SIDE ? mine.out + top * mine.out_row + at.column : nullptr;
        const Squares<E> joining = joined(rest, static_cast<const E*>(nullptr));
        multiply<BACKWARD>(c, main, joining, !starts, next, chunks, ahead);
        if (ends) finish(mine, c, rest, top, at.column);
    }
}

// Compute `columns` of linear's y (forward) or of dx (backward, linear 0) for `panels_here` panels of rows from `row` on.
// scratch: a block of sums, then two strips, of which one is multiplied while the other is made.
template <bool BACKWARD, class E>
void Project<BACKWARD, E>::multiply_columns(int64_t row, int64_t panels_here, Range columns, int64_t linear,
                                            char* scratch) const {
    const Portion mine = portion(row, panels_here, columns, linear);
    float* sums = reinterpret_cast<float*>(scratch);
    E* strips[2];
    strips[0] = reinterpret_cast<E*>(scratch + sums_bytes), strips[1] = strips[0] + STRIP_DEPTH<E> * SIDE;
    Position at = {first_piece(mine.first), columns.begin, columns.begin, least(columns.begin + SUM_COLUMNS, columns.end)};
    Strip<BACKWARD, E> next(call->linears[mine.first].weight, call->inputs, weight_inverses + mine.outputs_before);
    next.begin(strips[0], at.column, at.piece.begin, at.piece.end);
    for (int current = 0;; current ^= 1) {
        while (next.more()) next.chunk();  // the few chunks that found no place between products
        Position then = at;
        const bool more = next_strip(mine, &then);
        int64_t chunks = 0;
        if (more) {
            if (BACKWARD && then.piece.linear != at.piece.linear)
                next = Strip<BACKWARD, E>(call->linears[then.piece.linear].weight, call->inputs,
                                          weight_inverses + then.piece.offset - then.piece.begin);
            next.begin(strips[current ^ 1], then.column, then.piece.begin, then.piece.end);
            const int64_t squares = panels_here * ((at.piece.end - at.piece.begin) / DEPTH<E>);
            chunks = (Strip<BACKWARD, E>::chunks(then.piece.end - then.piece.begin) + squares - 1) / squares;
        }
        multiply_strip(mine, at, strips[current], sums, next, chunks);
        if (!more) return;
        at = then;
    }
}

// c (four tiles of sums) += the adapters' part of dx at 32 rows and columns from (row, column) on, each with its own dropout.
// thin.left: dreduced of these rows, thin.right: A's squares, both of all linears one after another.
template <bool BACKWARD, class E>
void Project<BACKWARD, E>::add_dropped(float* c, Squares<Bf16> thin, int64_t row, int64_t column) const {
    alignas(64) float part[SQUARE];
    for (int64_t p = 0; p < call->count; p++) {
        const int64_t here = squares_of(call->linears[p]);
        if (here == 0) continue;
        multiply_squares(part, SIDE, thin.left, SQUARE, thin.right, SQUARE, here, false);
        thin.left += here * SQUARE, thin.right += here * SQUARE;
        const DropoutMask mask(call->linears[p]);
        for (int64_t r = 0; r < SIDE; r++)
            for (int64_t i = 0; i < 2; i++) {
                float* sum = c + r / 16 * 512 + i * 256 + r % 16 * 16;
                __m512 factor = mask.at((row + r) * call->inputs + column + 16 * i);
                _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_loadu_ps(part + r * SIDE + 16 * i), factor, _mm512_loadu_ps(sum)));
            }
    }
}
