// project.inl's gradients of the adapters, for one block of rows; they are added to da and db. Each thread has its own columns.

// db_p (O_p, rank_p) += s dy_p^T reduced_p, computed as (reduced_p^T dy_p)^T in squares: 32 of the rank by 32 outputs.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::gradients_b(int64_t row, int64_t panels_here, int index, int count,
                                       const ThinScratch& scratch) const {
    Range mine = share(depth, SIDE, index, count);
    Piece piece = first_piece(0);
    int64_t before = 0, current = 0;  // rank squares of the linears before the current one
    do {
        if (piece.linear != current) before += squares_of(call->linears[current]), current = piece.linear;
        const ProjectLinear& linear = call->linears[current];
        const int64_t here = squares_of(linear);
        for (int64_t o = piece.begin; o < piece.end && here > 0; o += SIDE) {
            const int64_t column = piece.offset + o - piece.begin;
            if (column < mine.begin || column >= mine.end) continue;
            for (int64_t number = 0; number < panels_here; number++) {
                // Without codes the packed panel is dy itself; with them it has been rounded, so dy is read again.
                const Real* lines = scratch.lines;
                if (SCALED) read_squares(y, call->y_row, call->rows, row + number * SIDE, column, 1, scratch.lines);
                else lines = reinterpret_cast<const Real*>(panel(number, piece)) + (o - piece.begin) / SIDE * SQUARE;
                turn_squares(lines, scratch.rights + number * SQUARE, 1);
            }
            for (int64_t s = 0; s < here; s++) {
                multiply_squares(scratch.sums, SIDE, reduced_turned + (before + s) * panel_count * SQUARE, SQUARE,
                                 scratch.rights, SQUARE, panels_here, false);
                for (int64_t j = 0; j < SIDE; j++)
                    for (int64_t i = 0; i < least(SIDE, linear.rank - s * SIDE); i++)
                        linear.db[(o + j) * linear.rank + s * SIDE + i] += scratch.sums[i * SIDE + j] * linear.scale;
            }
        }
    } while (advance(&piece, call->count - 1));
}

// da_p (rank_p, I) += dreduced_p^T dropout_p(x), in squares: 32 of the rank by 32 inputs. Every linear has a dropout of its
// own.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::gradients_a(int64_t row, int64_t panels_here, int index, int count,
                                       const ThinScratch& scratch) const {
    Range mine = share(call->inputs, SIDE, index, count);
    for (int64_t column = mine.begin; column < mine.end; column += SIDE) {
        Real* lines = scratch.rights + panel_count * SQUARE;
        for (int64_t number = 0; number < panels_here; number++) {
            read_squares(x, call->x_row, call->rows, row + number * SIDE, column, 1, lines + number * SQUARE);
            if (!has_dropout) turn_squares(lines + number * SQUARE, scratch.rights + number * SQUARE, 1);
        }
        int64_t before = 0;
        for (int64_t p = 0; p < call->count; p++) {
            const ProjectLinear& linear = call->linears[p];
            const int64_t here = squares_of(linear);
            if (here == 0) continue;
            for (int64_t number = 0; has_dropout && number < panels_here; number++) {
                drop_squares(DropoutMask(linear), lines + number * SQUARE, call->inputs, row + number * SIDE, column, 1,
                             scratch.dropped);
                turn_squares(scratch.dropped, scratch.rights + number * SQUARE, 1);
            }
            for (int64_t s = 0; s < here; s++) {
                multiply_squares(scratch.sums, SIDE, dreduced_turned + (before + s) * panel_count * SQUARE, SQUARE,
                                 scratch.rights, SQUARE, panels_here, false);
                for (int64_t i = 0; i < least(SIDE, linear.rank - s * SIDE); i++)
                    for (int64_t j = 0; j < SIDE; j += LANES) {
                        float* to = linear.da + (s * SIDE + i) * call->inputs + column + j;
                        put(to, get(scratch.sums + i * SIDE + j) + get(to));
                    }
            }
            before += here;
        }
    }
}
