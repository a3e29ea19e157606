// Several NF4 linears that share their input, each with its LoRA adapter, forward and backward in one call.
//     forward    reduced_p = dropout_p(x) A_p^T        y_p = x W_p^T + reduced_p (s B_p)^T
//     backward   dreduced_p = s dy_p B_p               dx = sum of dy_p W_p + dropout_p(dreduced_p A_p)
//                dB_p = s dy_p^T reduced_p             dA_p = dreduced_p^T dropout_p(x)
// What is thin (the rank, in squares of 32) is made of the rows that are being packed for gemm.inl's products, and joins
// those as a few more squares of depth. Weight gradients are shared out by columns: no sum depends on how many threads there are.

namespace project {

using namespace gemm;

template <class E>
constexpr int64_t LONG = STRIP_DEPTH<E> / SIDE;  // bf16 squares of a piece

ET_INLINE int64_t squares_of(const ProjectLinear& linear) { return (linear.rank + SIDE - 1) / SIDE; }

// ---- 32 x 32 numbers at a time ----

// Rows [row, row + 32) of a matrix, numbers [column, column + 32 * count), as squares in left form; 0 beyond the last row.
static void read_squares(const Bf16* matrix, int64_t stride, int64_t rows, int64_t row, int64_t column, int64_t count, Bf16* to) {
    for (int64_t r = 0; r < SIDE; r++) {
        const Bf16* from = matrix + (row + r) * stride + column;
        for (int64_t k = 0; k < count; k++) {
            __m512i line = row + r < rows ? _mm512_loadu_si512(from + k * SIDE) : _mm512_setzero_si512();
            _mm512_store_si512(to + k * SQUARE + r * SIDE, line);
        }
    }
}

// The same of an fp32 matrix (rows, columns) times a factor, one square; 0 beyond its ends.
static void read_square(const float* matrix, int64_t rows, int64_t columns, int64_t row, int64_t column, float factor, Bf16* to) {
    for (int64_t r = 0; r < SIDE; r++, to += SIDE) {
        __m512 parts[2];
        for (int64_t i = 0; i < 2; i++) {
            int64_t here = row + r < rows ? least(16, columns - column - 16 * i) : 0;
            __mmask16 mask = here > 0 ? __mmask16((1u << here) - 1) : __mmask16(0);
            const float* from = mask ? matrix + (row + r) * columns + column + 16 * i : matrix;
            parts[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from), _mm512_set1_ps(factor));
        }
        _mm512_store_si512(to, rounded(parts[0], parts[1]));
    }
}

struct Mask {  // elementwise.inl's dropout
    uint32_t seed, threshold;
    float keep;

    ET_MEMBER explicit Mask(const ProjectLinear& linear)
        : seed(hash32(uint32_t(linear.key))), threshold(uint32_t(linear.threshold)), keep(linear.keep) {}
    // The factors of 16 elements from this place on.
    ET_MEMBER __m512 at(int64_t place) const {
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        Words hash = hash32((Words)_mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(place))) ^ seed);
        return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask((__m512i)hash, _mm512_set1_epi32(int32_t(threshold))),
                                   _mm512_set1_ps(keep));
    }
};

// Squares in left form, as read_squares has them, with a linear's dropout.
static void drop_squares(const Mask& mask, const Bf16* from, int64_t width, int64_t row, int64_t column, int64_t count, Bf16* to) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t r = 0; r < SIDE; r++) {
            __m512i line = _mm512_load_si512(from + k * SQUARE + r * SIDE);
            int64_t place = (row + r) * width + column + k * SIDE;
            __m512 low = _mm512_mul_ps(widened(_mm512_castsi512_si256(line)), mask.at(place));
            __m512 high = _mm512_mul_ps(widened(_mm512_extracti64x4_epi64(line, 1)), mask.at(place + 16));
            _mm512_store_si512(to + k * SQUARE + r * SIDE, rounded(low, high));
        }
}

// 32 x 32 sums, row after row, times a factor, to one square in left form.
static void round_square(const float* c, float factor, Bf16* to) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t r = 0; r < SIDE; r++, c += SIDE)
        _mm512_store_si512(to + r * SIDE, rounded(_mm512_mul_ps(_mm512_loadu_ps(c), by), _mm512_mul_ps(_mm512_loadu_ps(c + 16), by)));
}

// ---- the whole ----

// A run of the depth that one strip covers: [from, until) of linear `part`'s.
struct Piece {
    int64_t part, from, until, at;  // at: where it begins in the whole depth
};

template <bool BACKWARD, class E>  // E: what large products take, Bf16 or int8_t
struct Project {
    static constexpr bool SCALED = sizeof(E) == 1;
    ProjectCall* call;
    edgetune::Meeting meeting;
    int64_t depth, panels;  // panels: of the rows that are packed at a time
    int64_t squares;        // of all ranks
    bool drops;
    E* packed;              // panels of x or dy
    float *row_scales, *errors;  // int8: of x's or dy's rows, and what rounding costs each
    float *scales, *inverses;    // int8: of all weights' rows
    Bf16 *packed_a, *packed_b;
    Bf16* thin;             // reduced (right form) or dreduced (left form): [panel][square]
    Bf16 *turned, *turned_d;  // backward: reduced^T and dreduced^T, left form: [square][panel]
    char* own;              // a thread's part of the scratch
    int64_t own_bytes, sums_bytes;

    int64_t width_of(const ProjectLinear& linear) const { return BACKWARD ? call->inputs : linear.outputs; }
    int64_t depth_of(int64_t part) const { return BACKWARD ? call->linears[part].outputs : call->inputs; }

    void plan(ProjectCall* given) {
        call = given, meeting = {}, squares = 0, drops = false;
        int64_t outputs = 0, widest = call->inputs, numbers_b = 0;
        for (int64_t p = 0; p < call->count; p++) {
            const ProjectLinear& linear = call->linears[p];
            outputs += linear.outputs, squares += squares_of(linear), numbers_b += linear.outputs * squares_of(linear) * SIDE;
            if (linear.outputs > widest) widest = linear.outputs;
            drops |= linear.rank > 0 && linear.threshold > 0;
        }
        depth = BACKWARD ? outputs : call->inputs;
        panels = round_up(least(call->rows, SUM_ROWS), SIDE) / SIDE;
        char* next = call->scratch;
        auto take = [&](int64_t bytes) {
            char* taken = next;
            next += round_up(bytes, ALIGNMENT);
            return taken;
        };
        packed = reinterpret_cast<E*>(take(panels * SIDE * depth * sizeof(E)));
        row_scales = reinterpret_cast<float*>(take(SCALED ? round_up(call->rows, SIDE) * 4 : 0));
        errors = reinterpret_cast<float*>(take(SCALED ? call->rows * 4 : 0));
        scales = reinterpret_cast<float*>(take(SCALED ? outputs * 4 : 0));
        inverses = reinterpret_cast<float*>(take(SCALED ? outputs * 4 : 0));
        packed_a = reinterpret_cast<Bf16*>(take(call->inputs * squares * SIDE * 2));
        packed_b = reinterpret_cast<Bf16*>(take(numbers_b * 2));
        thin = reinterpret_cast<Bf16*>(take(panels * squares * SQUARE * 2));
        turned = reinterpret_cast<Bf16*>(take(BACKWARD ? panels * squares * SQUARE * 2 : 0));
        turned_d = reinterpret_cast<Bf16*>(take(BACKWARD ? panels * squares * SQUARE * 2 : 0));
        // sums and two strips, which products need; sums of thin products and squares, which packing and gradients need
        sums_bytes = panels * SIDE * least(widest, SUM_COLUMNS) * 4;
        const int64_t products = sums_bytes + 2 * STRIP_DEPTH<E> * SIDE * sizeof(E);
        const int64_t thins = (squares + 1) * SQUARE * 4 + (2 * LONG<E> + 2 * panels) * SQUARE * 2;
        own_bytes = round_up(products > thins ? products : thins, ALIGNMENT);
        own = take(call->threads * own_bytes);
        call->scratch_bytes = next - call->scratch;
    }

    E* panel(int64_t number, const Piece& piece) const {
        return packed + piece.at * panels * SIDE + number * SIDE * (piece.until - piece.from);
    }

    Piece first_piece(int64_t part) const {
        int64_t at = 0;
        for (int64_t p = 0; BACKWARD && p < part; p++) at += depth_of(p);
        return {part, 0, least(STRIP_DEPTH<E>, depth_of(part)), at};
    }
    // The piece after; false after the last of linear `last`.
    bool advance(Piece* piece, int64_t last) const {
        int64_t length = piece->until - piece->from;
        if (piece->until == depth_of(piece->part)) {
            if (piece->part == last) return false;
            *piece = {piece->part + 1, 0, 0, piece->at + length};
        } else {
            *piece = {piece->part, piece->until, 0, piece->at + length};
        }
        piece->until = least(piece->from + STRIP_DEPTH<E>, depth_of(piece->part));
        return true;
    }

    // ---- adapters, in the forms that products want ----

    Bf16* square_a(int64_t part, int64_t square_before, int64_t square, int64_t deep) const {  // deep: of the inputs, in squares
        const int64_t all = call->inputs / SIDE, here = squares_of(call->linears[part]);
        return packed_a + (BACKWARD ? deep * squares + square_before + square : square_before * all + deep * here + square) * SQUARE;
    }
    void pack_adapters(int index, int count) const {
        alignas(64) Bf16 lines[SQUARE];
        Bf16* b = packed_b;
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
                    Bf16* to = b + (o * here + s) * SQUARE;
                    if (BACKWARD) turn_squares(lines, to, 1);
                    else memcpy(static_cast<void*>(to), lines, sizeof lines);
                }
            b += linear.outputs * here * SIDE, before += here;
        }
    }

    // ---- int8: scales, and whether they serve ----

    // Every thread comes to the same answer, since it looks at all rows.
    bool serves() const { return even_enough(errors, call->rows); }

    void scale_matrix(int index, int count) const {
        const Range mine = share(round_up(call->rows, SIDE), 1, index, count);
        const Bf16* matrix = BACKWARD ? call->y : call->x;
        const float* factors = BACKWARD ? scales : nullptr;
        for (int64_t row = mine.begin; row < mine.end; row++) {
            row_scales[row] = 0.0f;
            if (row >= call->rows) continue;
            const Bf16* from = matrix + row * (BACKWARD ? call->y_row : call->x_row);
            errors[row] = scale_numbers(from, factors, depth, &row_scales[row]);
        }
    }

    void scale_weights(int index, int count) const {
        int64_t before = 0;
        for (int64_t p = 0; p < call->count; p++) {
            const ProjectLinear& linear = call->linears[p];
            const Range mine = share(linear.outputs, 1, index, count);
            scale_rows(linear.weight, call->inputs, mine.begin, mine.end, scales + before, inverses + before);
            before += linear.outputs;
        }
    }

    // ---- a panel of rows, packed, and the thin products of it ----

    struct Desk {  // a thread's scratch while it packs and makes gradients
        float* sums;
        Bf16 *lines, *dropped, *rights;
    };
    Desk desk(int index) const {
        char* mine = own + index * own_bytes;
        float* sums = reinterpret_cast<float*>(mine);
        Bf16* lines = reinterpret_cast<Bf16*>(sums + (squares + 1) * SQUARE);
        return {sums, lines, lines + LONG<E> * SQUARE, lines + 2 * LONG<E> * SQUARE};
    }

    // A piece of 32 rows, as squares in left form, to the form of a panel.
    void enter(Bf16* panel, const Bf16* lines, int64_t, const Piece& piece) const {
        if (!BACKWARD) transpose_squares(lines, panel, (piece.until - piece.from) / SIDE);
    }
    void enter(int8_t* panel, const Bf16* lines, int64_t top, const Piece& piece) const {
        round_squares(lines, row_scales + top, BACKWARD ? scales + piece.at : nullptr, piece.until - piece.from, !BACKWARD, panel);
    }

    void enter_forward(int64_t row, int64_t number, const Desk& desk) const {
        Piece piece = first_piece(0);
        const int64_t top = row + number * SIDE;
        do {
            const int64_t n = (piece.until - piece.from) / SIDE;
            read_squares(call->x, call->x_row, call->rows, top, piece.from, n, desk.lines);
            if (call->y) enter(panel(number, piece), desk.lines, top, piece);
            int64_t before = 0;
            for (int64_t p = 0; p < call->count; p++) {
                const ProjectLinear& linear = call->linears[p];
                const int64_t here = squares_of(linear);
                if (here == 0) continue;
                const Bf16* lines = desk.lines;
                if (linear.threshold) {
                    drop_squares(Mask(linear), lines, call->inputs, top, piece.from, n, desk.dropped);
                    lines = desk.dropped;
                }
                for (int64_t s = 0; s < here; s++)
                    multiply_squares(desk.sums + (before + s) * SQUARE, SIDE, lines, SQUARE,
                                     square_a(p, before, s, piece.from / SIDE), here * SQUARE, n, piece.from > 0);
                before += here;
            }
        } while (advance(&piece, 0));
        for (int64_t s = 0; s < squares; s++) {
            round_square(desk.sums + s * SQUARE, 1.0f, desk.lines);
            for (int64_t r = 0; r < least(SIDE, call->rows - top); r++)
                memcpy(static_cast<void*>(call->reduced + (top + r) * squares * SIDE + s * SIDE), desk.lines + r * SIDE, SIDE * 2);
            transpose_squares(desk.lines, thin + (number * squares + s) * SQUARE, 1);
        }
    }

    void enter_backward(int64_t row, int64_t number, const Desk& desk) const {
        const int64_t top = row + number * SIDE;
        const Bf16* b = packed_b;
        Piece piece = first_piece(0);
        int64_t before = 0;
        for (bool more = true; more;) {
            const int64_t n = (piece.until - piece.from) / SIDE;
            const ProjectLinear& linear = call->linears[piece.part];
            const int64_t here = squares_of(linear);
            Bf16* lines = SCALED ? desk.lines : reinterpret_cast<Bf16*>(panel(number, piece));
            read_squares(call->y, call->y_row, call->rows, top, piece.at, n, lines);
            enter(panel(number, piece), lines, top, piece);
            for (int64_t s = 0; s < here; s++)
                multiply_squares(desk.sums + (before + s) * SQUARE, SIDE, lines, SQUARE,
                                 b + (piece.from / SIDE * here + s) * SQUARE, here * SQUARE, n, piece.from > 0);
            if (piece.until == linear.outputs) b += linear.outputs * here * SIDE, before += here;
            more = advance(&piece, call->count - 1);
        }
        for (int64_t s = 0; s < squares; s++) {
            Bf16* to = thin + (number * squares + s) * SQUARE;
            round_square(desk.sums + s * SQUARE, 1.0f, to);
            turn_squares(to, desk.lines, 1);
            transpose_squares(desk.lines, turned_d + (s * panels + number) * SQUARE, 1);
            read_squares(call->reduced, squares * SIDE, call->rows, top, s * SIDE, 1, desk.lines);
            turn_squares(desk.lines, desk.dropped, 1);
            transpose_squares(desk.dropped, turned + (s * panels + number) * SQUARE, 1);
        }
    }

    // ---- the large products: columns `mine` of linear `part`'s y, or of dx ----

    void multiply_share(int64_t row, int64_t here, Range mine, int64_t part, char* scratch) const {
        const int64_t last = BACKWARD ? call->count - 1 : part, own_squares = BACKWARD ? squares : squares_of(call->linears[part]);
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
        Strip<BACKWARD, E> next(call->linears[BACKWARD ? 0 : part].weight, call->inputs, inverses + outputs);
        Piece piece = first_piece(BACKWARD ? 0 : part);
        int64_t wide = mine.begin;
        next.begin(strips[0], wide, piece.from, piece.until);
        for (int current = 0;; current ^= 1) {
            while (next.more()) next.chunk();
            // The next strip: the next 32 of this block of columns, then the next piece of the depth, then the next block.
            const Piece now = piece;
            const int64_t block = mine.begin + (wide - mine.begin) / SUM_COLUMNS * SUM_COLUMNS, stop = least(block + SUM_COLUMNS, mine.end);
            const int64_t steps = (now.until - now.from) / DEPTH<E>;
            int64_t then = wide + SIDE;
            bool ends = now.part == last && now.until == depth_of(last), more = true;
            if (then >= stop) {
                then = block;
                if (!advance(&piece, last)) piece = first_piece(BACKWARD ? 0 : part), then = stop, more = stop < mine.end;
            }
            int64_t each = 0;
            if (more) {
                if (BACKWARD && piece.part != now.part)
                    next = Strip<BACKWARD, E>(call->linears[piece.part].weight, call->inputs, inverses + piece.at - piece.from);
                next.begin(strips[current ^ 1], then, piece.from, piece.until);
                const int64_t chunks = Strip<BACKWARD, E>::chunks(piece.until - piece.from);
                each = (chunks + here * steps - 1) / (here * steps);
            }
            // The next piece's panels, or the first's again, in equal parts while this piece's are multiplied.
            Piece later = now;
            if (!advance(&later, last)) later = first_piece(BACKWARD ? 0 : part);
            const int64_t all_steps = (stop - block) / SIDE * here * steps;
            const int64_t later_lines = here * SIDE * (later.until - later.from) * int64_t(sizeof(E)) / 64;
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
                    const Bf16 *of_rows = thin + (number * squares + before) * SQUARE,
                               *of_weight = more_of_weight + wide * own_squares * SIDE;
                    rest = {BACKWARD ? of_rows : of_weight, BACKWARD ? of_weight : of_rows, BACKWARD && drops ? 0 : own_squares};
                }
                Ahead ahead = {now.at > 0 ? c + SQUARE : nullptr, ends && rows == SIDE ? to : nullptr, out_row,
                               fetched + number * steps * lines * 64, lines};
                const Squares<E> joining = joined(rest, static_cast<const E*>(nullptr));
                multiply<BACKWARD>(c, main, joining, now.at > 0, next, each, ahead);
                if (!ends) continue;
                if (SCALED) {
                    alignas(64) float part[SQUARE];
                    if (rest.count) multiply_alone(part, rest);
                    const float *of_rows = row_scales + top, *of_weight = scales + outputs + wide;
                    const float* thin_sums = rest.count ? part : nullptr;
                    scale_sums(c, BACKWARD ? of_rows : of_weight, BACKWARD ? nullptr : of_rows, thin_sums);
                }
                if (!BACKWARD) write_columns(c, to, out_row, rows);
                else {
                    if (drops) add_dropped(c, rest, top, wide);
                    write_rows(c, to, out_row, rows);
                }
            }
            if (!more) return;
            wide = then;
        }
    }

    // What of the thin product joins the large one as more depth: all of it in bf16, nothing in int8, whose sums are integers.
    static const Squares<Bf16>& joined(const Squares<Bf16>& rest, const Bf16*) { return rest; }
    static Squares<int8_t> joined(const Squares<Bf16>&, const int8_t*) { return {}; }

    // c (four tiles) += the adapters' dx of 32 rows and columns, each with its own dropout.
    void add_dropped(float* c, Squares<Bf16> thin, int64_t row, int64_t column) const {
        alignas(64) float part[SQUARE];
        for (int64_t p = 0; p < call->count; p++) {
            const int64_t here = squares_of(call->linears[p]);
            if (here == 0) continue;
            multiply_squares(part, SIDE, thin.left, SQUARE, thin.right, SQUARE, here, false);
            thin.left += here * SQUARE, thin.right += here * SQUARE;
            const Mask mask(call->linears[p]);
            for (int64_t r = 0; r < SIDE; r++)
                for (int64_t i = 0; i < 2; i++) {
                    float* sum = c + r / 16 * 512 + i * 256 + r % 16 * 16;
                    __m512 factor = mask.at((row + r) * call->inputs + column + 16 * i);
                    _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_loadu_ps(part + r * SIDE + 16 * i), factor, _mm512_loadu_ps(sum)));
                }
        }
    }

    // ---- gradients of the adapters ----

    void gradients_b(int64_t row, int64_t here, int index, int count, const Desk& desk) const {
        Range mine = share(depth, SIDE, index, count);
        Piece piece = first_piece(0);
        int64_t before = 0, part = 0;
        do {
            if (piece.part != part) before += squares_of(call->linears[part]), part = piece.part;
            const ProjectLinear& linear = call->linears[part];
            const int64_t of_part = squares_of(linear);
            for (int64_t o = piece.from; o < piece.until && of_part > 0; o += SIDE) {
                const int64_t column = piece.at + o - piece.from;
                if (column < mine.begin || column >= mine.end) continue;
                for (int64_t number = 0; number < here; number++) {
                    const Bf16* lines = desk.lines;
                    if (SCALED) read_squares(call->y, call->y_row, call->rows, row + number * SIDE, column, 1, desk.lines);
                    else lines = reinterpret_cast<const Bf16*>(panel(number, piece)) + (o - piece.from) / SIDE * SQUARE;
                    turn_squares(lines, desk.rights + number * SQUARE, 1);
                }
                for (int64_t s = 0; s < of_part; s++) {
                    multiply_squares(desk.sums, SIDE, turned + (before + s) * panels * SQUARE, SQUARE, desk.rights, SQUARE, here, false);
                    for (int64_t j = 0; j < SIDE; j++)
                        for (int64_t i = 0; i < least(SIDE, linear.rank - s * SIDE); i++)
                            linear.db[(o + j) * linear.rank + s * SIDE + i] += desk.sums[i * SIDE + j] * linear.scale;
                }
            }
        } while (advance(&piece, call->count - 1));
    }

    void gradients_a(int64_t row, int64_t here, int index, int count, const Desk& desk) const {
        Range mine = share(call->inputs, SIDE, index, count);
        for (int64_t column = mine.begin; column < mine.end; column += SIDE) {
            Bf16* lines = desk.rights + panels * SQUARE;
            for (int64_t number = 0; number < here; number++) {
                read_squares(call->x, call->x_row, call->rows, row + number * SIDE, column, 1, lines + number * SQUARE);
                if (!drops) turn_squares(lines + number * SQUARE, desk.rights + number * SQUARE, 1);
            }
            int64_t before = 0;
            for (int64_t p = 0; p < call->count; p++) {
                const ProjectLinear& linear = call->linears[p];
                const int64_t of_part = squares_of(linear);
                if (of_part == 0) continue;
                for (int64_t number = 0; drops && number < here; number++) {
                    drop_squares(Mask(linear), lines + number * SQUARE, call->inputs, row + number * SIDE, column, 1, desk.dropped);
                    turn_squares(desk.dropped, desk.rights + number * SQUARE, 1);
                }
                for (int64_t s = 0; s < of_part; s++) {
                    multiply_squares(desk.sums, SIDE, turned_d + (before + s) * panels * SQUARE, SQUARE, desk.rights, SQUARE, here,
                                     false);
                    for (int64_t i = 0; i < least(SIDE, linear.rank - s * SIDE); i++)
                        for (int64_t j = 0; j < SIDE; j += 16) {
                            float* to = linear.da + (s * SIDE + i) * call->inputs + column + j;
                            __m512 sum = _mm512_loadu_ps(desk.sums + i * SIDE + j);
                            _mm512_storeu_ps(to, _mm512_add_ps(sum, _mm512_loadu_ps(to)));
                        }
                }
                before += of_part;
            }
        }
    }

    void work(int index, int count) {
        products_begin();
        if (SCALED) {
            scale_weights(index, count);
            edgetune::meet(&meeting, count);
            scale_matrix(index, count);
            edgetune::meet(&meeting, count);
            if (!serves()) return products_end();
        }
        pack_adapters(index, count);
        edgetune::meet(&meeting, count);
        for (int64_t row = 0; row < call->rows; row += panels * SIDE) {
            const int64_t here = least(panels, (call->rows - row + SIDE - 1) / SIDE);
            Range mine = share(here, 1, index, count);
            for (int64_t number = mine.begin; number < mine.end; number++) {
                if (BACKWARD) enter_backward(row, number, desk(index));
                else enter_forward(row, number, desk(index));
            }
            edgetune::meet(&meeting, count);
            for (int64_t part = 0; part < (BACKWARD ? 1 : call->y ? call->count : 0); part++) {
                mine = share(width_of(call->linears[part]), SIDE, index, count);
                if (mine.begin < mine.end) multiply_share(row, here, mine, part, own + index * own_bytes);
            }
            if (BACKWARD && squares > 0) {
                gradients_b(row, here, index, count, desk(index));
                gradients_a(row, here, index, count, desk(index));
            }
            edgetune::meet(&meeting, count);
        }
        products_end();
    }
};

// False: int8 does not serve, and nothing is done.
template <bool BACKWARD, class E>
static bool run(ProjectCall* call) {
    Project<BACKWARD, E> project;
    project.plan(call);
    if (!call->scratch) return true;
    edgetune::parallel(
        int(call->threads),
        [](void* project, int index, int count) { static_cast<Project<BACKWARD, E>*>(project)->work(index, count); }, &project);
    return sizeof(E) != 1 || project.serves();
}

template <bool BACKWARD>
static void run_either(ProjectCall* call) {
    if (call->int8 && run<BACKWARD, int8_t>(call) && call->scratch) return;
    const int64_t needed = call->int8 ? call->scratch_bytes : 0;
    run<BACKWARD, Bf16>(call);
    if (call->scratch_bytes < needed) call->scratch_bytes = needed;
}

}  // namespace project

void project_nf4(ProjectCall* call) { project::run_either<false>(call); }
void project_nf4_backward(ProjectCall* call) { project::run_either<true>(call); }

#define ET_PROJECT_KERNELS(X) X(project_nf4) X(project_nf4_backward)
