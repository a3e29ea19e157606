// project.inl's large products: a thread's columns of one linear's y, or of dx, for the rows that are packed.

// The part of the thin product that joins the large one as more depth: all of it in bf16; nothing in int8, whose sums are
// integers.
static const Squares<Bf16>& joined(const Squares<Bf16>& rest, const Bf16*) { return rest; }
static Squares<int8_t> joined(const Squares<Bf16>&, const int8_t*) { return {}; }

// Forward: the 32 x 32 sums at c have rows of the result in columns. Backward: rows are rows.
template <bool BACKWARD, class E>
void Project<BACKWARD, E>::multiply_columns(int64_t row, int64_t here, Range mine, int64_t part, char* scratch) const {
    const int64_t last = BACKWARD ? call->count - 1 : part;
    const int64_t own_squares = BACKWARD ? rank_squares : squares_of(call->linears[part]);
    float* sums = reinterpret_cast<float*>(scratch);
    E* strips[2];
    strips[0] = reinterpret_cast<E*>(scratch + sums_bytes), strips[1] = strips[0] + STRIP_DEPTH<E> * SIDE;
    const Bf16* more_of_weight = BACKWARD ? packed_a : packed_b;
    int64_t before = 0, outputs = 0;  // of the linears before this one
    Bf16* out = BACKWARD ? call->dx : call->y;
    const int64_t out_row = BACKWARD ? call->dx_row : call->y_row;
    for (int64_t p = 0; !BACKWARD && p < part; p++) {
        const int64_t passed = squares_of(call->linears[p]);
        before += passed, more_of_weight += call->linears[p].outputs * passed * SIDE, outputs += call->linears[p].outputs;
    }
    if (!BACKWARD) out += outputs;
    Strip<BACKWARD, E> next(call->linears[BACKWARD ? 0 : part].weight, call->inputs, weight_inverses + outputs);
    Piece piece = first_piece(BACKWARD ? 0 : part);
    int64_t wide = mine.begin;
    next.begin(strips[0], wide, piece.begin, piece.end);
    for (int current = 0;; current ^= 1) {
        while (next.more()) next.chunk();
        // The next strip: the next 32 of this block of columns, then the next piece of the depth, then the next block.
        const Piece now = piece;
        const int64_t block = mine.begin + (wide - mine.begin) / SUM_COLUMNS * SUM_COLUMNS, stop = least(block + SUM_COLUMNS, mine.end);
        const int64_t steps = (now.end - now.begin) / DEPTH<E>;
        int64_t then = wide + SIDE;
        bool ends = now.linear == last && now.end == depth_of(last), more = true;
        if (then >= stop) {
            then = block;
            if (!advance(&piece, last)) piece = first_piece(BACKWARD ? 0 : part), then = stop, more = stop < mine.end;
        }
        int64_t each = 0;
        if (more) {
            if (BACKWARD && piece.linear != now.linear)
                next = Strip<BACKWARD, E>(call->linears[piece.linear].weight, call->inputs, weight_inverses + piece.offset - piece.begin);
            next.begin(strips[current ^ 1], then, piece.begin, piece.end);
            const int64_t chunks = Strip<BACKWARD, E>::chunks(piece.end - piece.begin);
            each = (chunks + here * steps - 1) / (here * steps);
        }
        // The next piece's panels, or the first's again, in equal parts while this piece's are multiplied.
        Piece later = now;
        if (!advance(&later, last)) later = first_piece(BACKWARD ? 0 : part);
        const int64_t all_steps = (stop - block) / SIDE * here * steps;
        const int64_t later_lines = here * SIDE * (later.end - later.begin) * int64_t(sizeof(E)) / 64;
        const int64_t lines = (later_lines + all_steps - 1) / all_steps;
        const char* fetched = reinterpret_cast<const char*>(panel(0, later)) + (wide - block) / SIDE * here * steps * lines * 64;
        float* c = sums + (wide - block) * here * SIDE;
        for (int64_t number = 0; number < here; number++, c += SQUARE) {
            const E *strip = strips[current], *other = panel(number, now);
            const int64_t top = row + number * SIDE, rows = least(SIDE, call->rows - top);
            Bf16* to = out + top * out_row + wide;
            Squares<E> main = {BACKWARD ? other : strip, BACKWARD ? strip : other, steps};
            Squares<Bf16> rest = {};
            if (ends && own_squares > 0) {
                const Bf16 *of_rows = thin + (number * rank_squares + before) * SQUARE,
                           *of_weight = more_of_weight + wide * own_squares * SIDE;
                rest = {BACKWARD ? of_rows : of_weight, BACKWARD ? of_weight : of_rows, BACKWARD && has_dropout ? 0 : own_squares};
            }
            Ahead ahead = {now.offset > 0 ? c + SQUARE : nullptr, ends && rows == SIDE ? to : nullptr, out_row,
                           fetched + number * steps * lines * 64, lines};
            const Squares<E> joining = joined(rest, static_cast<const E*>(nullptr));
            multiply<BACKWARD>(c, main, joining, now.offset > 0, next, each, ahead);
            if (!ends) continue;
            if (SCALED) {
                alignas(64) float part[SQUARE];
                if (rest.count) multiply_alone(part, rest);
                const float *of_rows = row_scales + top, *of_weight = weight_scales + outputs + wide;
                const float* thin_sums = rest.count ? part : nullptr;
                scale_sums(c, BACKWARD ? of_rows : of_weight, BACKWARD ? nullptr : of_rows, thin_sums);
            }
            if (!BACKWARD) write_columns(c, to, out_row, rows);
            else {
                if (has_dropout) add_dropped(c, rest, top, wide);
                write_rows(c, to, out_row, rows);
            }
        }
        if (!more) return;
        wide = then;
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
