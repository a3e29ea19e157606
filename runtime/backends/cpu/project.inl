// Several NF4 linears that share their input, each with its LoRA adapter, forward and backward in one call.
//
//     forward    reduced_p = dropout_p(x) A_p^T        y_p = x W_p^T + reduced_p (s B_p)^T
//     backward   dreduced_p = s dy_p B_p               dx = sum of dy_p W_p + dropout_p(dreduced_p A_p)
//                dB_p = s dy_p^T reduced_p             dA_p = dreduced_p^T dropout_p(x)
//
// with p the linear, s its alpha / rank, x (M, I), W_p (O_p, I), A_p (rank_p, I), B_p (O_p, rank_p).
//
// Words used in these files:
//     square     32 x 32 numbers (of bytes: 32 x 64), packed as tiles in left or right form (attention_tiles.inl)
//     depth      the dimension that a large product sums over: I forward; backward all outputs, of one linear after another
//     wide       the other dimension of the weight, and so the columns of the result: O_p forward, I backward
//     piece      at most STRIP_DEPTH of the depth, never of two linears
//     strip      32 of the wide dimension along one piece: weights dequantised into the first cache (gemm_strip.inl)
//     panel      32 rows of x (or dy) along one piece, packed once and used by every strip: they stay in the second cache
//     block      the sums that are computed together: SUM_ROWS rows of x by SUM_COLUMNS of the wide dimension
//     thin       a product with the rank, padded to squares, as one dimension: reduced, dreduced, and what they are made into
//
//                              SUM_ROWS rows of x: panel 0, 1, 2, ...
//                                   32   32   32
//                                 +----+----+----+--
//                       piece 0   |    |    |    |         packed panels, a piece after the other
//                                 +----+----+----+--
//            depth      piece 1   |    |    |    |
//                                 +----+----+----+--
//              |        thin      |    |    |    |         reduced, as a few more squares of depth (without codes)
//              v                  +====+====+====+==
//     piece 0  piece 1  thin
//    +--------+--------+----+     +----+----+----+--
// 32 | strip  | strip  | sB |     | c  | c  | c  |         c: a square of sums; all strips of the block's columns meet all
//    +--------+--------+----+     +----+----+----+--       panels of piece 0, then those of piece 1, and so on: sums are
// 32 |        |        |    |     |    |    |    |         loaded, added to and stored once a piece
//    +--------+--------+----+     +----+----+----+--
//      wide: a piece of the columns of y (forward: sums are y^T) or of dx (backward: strips stand on the right)
//
// Rows are packed by all threads, then threads take pieces of the result's columns as they become free: whoever computes columns
// dequantises their part of the weight, and the next strip while the current one is multiplied. The thin products are made of
// the rows while these are being packed. Weight gradients are shared out by columns as well. So no sum depends on how many
// threads there are, or on which of them was faster.

namespace project {

using namespace gemm;

template <class E>
constexpr int64_t PIECE_SQUARES = STRIP_DEPTH<E> / SIDE;  // squares of Real along a piece

// Return the number of squares that a linear's rank is padded to.
ET_INLINE int64_t squares_of(const ProjectLinear& linear) { return (linear.rank + SIDE - 1) / SIDE; }

#include "project_squares.inl"

// A run of the depth that one strip covers: [begin, end) of that of linear number `linear`.
struct Piece {
    int64_t linear, begin, end;
    int64_t offset;  // where it begins in the whole depth
};

typedef Squares<Real, Real> Thin;  // the operands of a thin product

// The part of a large product that one thread computes at a time: some columns, for the rows that are packed. Fixed from strip
// to strip.
template <class M>
struct Portion {
    int64_t row, panels;     // the first row, and how many panels of rows are packed
    Range columns;           // of y or dx
    int64_t first, last;     // the linears whose depth is summed over: forward one, backward all
    int64_t rank_squares;    // of those linears
    int64_t squares_before;  // of the linears before them
    int64_t outputs_before;
    const Real* adapter;  // B's or A's squares of those linears
    M* out;               // (rows, out_row): their y, or dx
    int64_t out_row;
};

// The position of the loops: over blocks of columns, within one over pieces of depth, within one over strips.
struct Position {
    Piece piece;
    int64_t column;                  // the first of the strip's 32 columns
    int64_t block_begin, block_end;  // the block of columns that it lies in
};

// One call. M: the type of x, y and dx. E: what the large products multiply of x or dy, Real or Code; the thin ones multiply
// Real.
template <bool BACKWARD, class M, class E>
struct Project {
    static constexpr bool SCALED = sizeof(E) != sizeof(Real);
    typedef typename WeightsOf<E>::type W;
    ProjectCall* call;
    const M* x;
    M *y, *dx, *reduced;  // y: backward it holds dy
    int64_t depth, panel_count;  // panel_count: panels that are packed at a time
    int64_t rank_squares;        // of all linears together
    bool has_dropout;
    E* panels;                               // of x or dy: a piece after the other, and in each panel_count panels
    // Of codes only:
    float *row_scales, *row_errors;          // (rows,) of x or dy, and the squared error of rounding each
    int32_t* row_excess;                     // (rows,): see round_squares
    float *weight_scales, *weight_inverses;  // (sum of outputs,), and 1 / them
    Real *packed_a, *packed_b;               // the adapters, as squares: see square_a and pack_adapters
    Real* thin;                              // (panel, rank square): reduced in right form, or dreduced in left form
    Real *reduced_turned, *dreduced_turned;  // backward: (rank square, panel), transposed, in left form
    char* thread_scratch;                    // (threads, thread_bytes)
    int64_t thread_bytes, sums_bytes;

    // A thread's scratch while it packs rows and while it makes gradients.
    struct ThinScratch {
        float* sums;            // (rank_squares + 1, SQUARE)
        Real *lines, *dropped;  // (PIECE_SQUARES, SQUARE) each, in left form
        Real* rights;           // (2 * panel_count, SQUARE)
    };

    // ---- this file: layout of scratch, and the order of work ----
    inline void plan(ProjectCall* given);
    inline void work() const;
    inline int64_t piece_columns(int64_t panels_here) const;

    int64_t width_of(const ProjectLinear& linear) const { return BACKWARD ? call->inputs : linear.outputs; }
    int64_t depth_of(int64_t linear) const { return BACKWARD ? call->linears[linear].outputs : call->inputs; }

    E* panel(int64_t number, const Piece& piece) const {
        return panels + piece.offset * panel_count * SIDE + number * SIDE * (piece.end - piece.begin);
    }

    ThinScratch thin_scratch(int index) const {
        char* mine = thread_scratch + index * thread_bytes;
        float* sums = reinterpret_cast<float*>(mine);
        Real* lines = reinterpret_cast<Real*>(sums + (rank_squares + 1) * SQUARE);
        return {sums, lines, lines + PIECE_SQUARES<E> * SQUARE, lines + 2 * PIECE_SQUARES<E> * SQUARE};
    }

    Piece first_piece(int64_t linear) const {
        int64_t offset = 0;
        for (int64_t p = 0; BACKWARD && p < linear; p++) offset += depth_of(p);
        return {linear, 0, least(STRIP_DEPTH<E>, depth_of(linear)), offset};
    }
    // Move on to the next piece; return false, and leave it, after the last piece of linear `last`.
    bool advance(Piece* piece, int64_t last) const {
        int64_t length = piece->end - piece->begin;
        if (piece->end == depth_of(piece->linear)) {
            if (piece->linear == last) return false;
            *piece = {piece->linear + 1, 0, 0, piece->offset + length};
        } else {
            *piece = {piece->linear, piece->end, 0, piece->offset + length};
        }
        piece->end = least(piece->begin + STRIP_DEPTH<E>, depth_of(piece->linear));
        return true;
    }

    // ---- project_pack.inl: adapters, scales and rows into the forms that products take ----
    inline Real* square_a(int64_t linear, int64_t squares_before, int64_t square, int64_t deep) const;
    inline void pack_adapters(int index, int count) const;
    inline void scale_weights(int index, int count) const;
    inline void scale_matrix(int index, int count) const;
    // Every thread comes to the same answer, since it looks at all rows.
    bool serves() const { return even_enough(row_errors, call->rows); }
    inline void pack_panel(Real* panel, const Real* lines, int64_t top, const Piece& piece) const;
    inline void pack_panel(Code* panel, const Real* lines, int64_t top, const Piece& piece) const;
    inline void pack_forward(int64_t row, int64_t number, const ThinScratch& scratch) const;
    inline void pack_backward(int64_t row, int64_t number, const ThinScratch& scratch) const;

    // ---- project_products.inl: the large products ----
    inline void multiply_columns(int64_t row, int64_t panels_here, Range columns, int64_t linear, char* scratch) const;
    ET_MEMBER Portion<M> portion(int64_t row, int64_t panels_here, Range columns, int64_t linear) const;
    ET_MEMBER bool next_strip(const Portion<M>& mine, Position* at) const;
    ET_MEMBER Ahead prefetch_panels(const Portion<M>& mine, const Position& at, int64_t steps) const;
    ET_MEMBER void multiply_strip(const Portion<M>& mine, const Position& at, const W* strip, float* sums,
                                  Strip<BACKWARD, W>& next, int64_t chunks) const;
    ET_MEMBER void finish(const Portion<M>& mine, float* c, Thin rest, int64_t top, int64_t column) const;
    inline void add_dropped(float* c, Thin rest, int64_t row, int64_t column) const;

    // ---- project_gradients.inl: gradients of the adapters ----
    inline void gradients_b(int64_t row, int64_t panels_here, int index, int count, const ThinScratch& scratch) const;
    inline void gradients_a(int64_t row, int64_t panels_here, int index, int count, const ThinScratch& scratch) const;
};

// Lay the scratch out; without scratch this only measures it. Pieces of scratch that a direction or a type does not need are
// empty.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::plan(ProjectCall* given) {
    call = given, rank_squares = 0, has_dropout = false;
    x = static_cast<const M*>(call->x), y = static_cast<M*>(call->y);
    dx = static_cast<M*>(call->dx), reduced = static_cast<M*>(call->reduced);
    int64_t outputs = 0, widest = call->inputs, numbers_b = 0;
    for (int64_t p = 0; p < call->count; p++) {
        const ProjectLinear& linear = call->linears[p];
        outputs += linear.outputs, rank_squares += squares_of(linear);
        numbers_b += linear.outputs * squares_of(linear) * SIDE;
        if (linear.outputs > widest) widest = linear.outputs;
        has_dropout |= linear.rank > 0 && linear.threshold > 0;
    }
    depth = BACKWARD ? outputs : call->inputs;
    panel_count = round_up(least(call->rows, SUM_ROWS), SIDE) / SIDE;
    char* next = call->scratch;
    constexpr int64_t size = sizeof(Real);
    auto take = [&](int64_t bytes) {
        char* taken = next;
        next += round_up(bytes, ALIGNMENT);
        return taken;
    };
    panels = reinterpret_cast<E*>(take(panel_count * SIDE * depth * sizeof(E)));
    row_scales = reinterpret_cast<float*>(take(SCALED ? round_up(call->rows, SIDE) * 4 : 0));
    row_errors = reinterpret_cast<float*>(take(SCALED ? call->rows * 4 : 0));
    row_excess = reinterpret_cast<int32_t*>(take(SCALED ? round_up(call->rows, SIDE) * 4 : 0));
    weight_scales = reinterpret_cast<float*>(take(SCALED ? outputs * 4 : 0));
    weight_inverses = reinterpret_cast<float*>(take(SCALED ? outputs * 4 : 0));
    packed_a = reinterpret_cast<Real*>(take(call->inputs * rank_squares * SIDE * size));
    packed_b = reinterpret_cast<Real*>(take(numbers_b * size));
    thin = reinterpret_cast<Real*>(take(panel_count * rank_squares * SQUARE * size));
    reduced_turned = reinterpret_cast<Real*>(take(BACKWARD ? panel_count * rank_squares * SQUARE * size : 0));
    dreduced_turned = reinterpret_cast<Real*>(take(BACKWARD ? panel_count * rank_squares * SQUARE * size : 0));
    // A thread never packs or makes gradients while it multiplies, so both use the same memory: for multiplying, a block of
    // sums and two strips; for the other, ThinScratch.
    sums_bytes = panel_count * SIDE * least(widest, SUM_COLUMNS) * 4;
    const int64_t products = sums_bytes + 2 * STRIP_BYTES;
    const int64_t thins = (rank_squares + 1) * SQUARE * 4 + (2 * PIECE_SQUARES<E> + 2 * panel_count) * SQUARE * size;
    thread_bytes = round_up(products > thins ? products : thins, ALIGNMENT);
    thread_scratch = take(call->threads * thread_bytes);
    call->scratch_bytes = next - call->scratch;
}

// Return how many columns of y or dx a piece of a large product has: about PIECE_PRODUCTS multiplications, fewer if threads would
// have less than PIECES_PER_THREAD pieces each. Sums do not depend on it.
template <bool BACKWARD, class M, class E>
int64_t Project<BACKWARD, M, E>::piece_columns(int64_t panels_here) const {
    int64_t width = 0;
    for (int64_t p = 0; p < (BACKWARD ? 1 : call->count); p++) width += width_of(call->linears[p]);
    const int64_t by_work = PIECE_PRODUCTS / (panels_here * SIDE * depth);
    const int64_t columns = least(least(by_work, width / (call->threads * PIECES_PER_THREAD)), SUM_COLUMNS);
    return columns < SIDE ? SIDE : columns / SIDE * SIDE;
}

// The whole call: phases, in each of which threads take pieces as they become free. A phase reads what the phases before have
// written. Every piece that multiplies sets the tile registers up and gives them back.
template <bool BACKWARD, class M, class E>
void Project<BACKWARD, M, E>::work() const {
    const int threads = int(call->threads), shares = threads * int(PIECES_PER_THREAD);
    if (SCALED) {
        for_pieces(threads, shares, [&](int64_t index, int) { scale_weights(int(index), shares); });
        for_pieces(threads, shares, [&](int64_t index, int) { scale_matrix(int(index), shares); });
        if (!serves()) return;
    }
    for_pieces(threads, shares, [&](int64_t index, int) { pack_adapters(int(index), shares); });
    for (int64_t row = 0; row < call->rows; row += panel_count * SIDE) {
        const int64_t panels_here = least(panel_count, (call->rows - row + SIDE - 1) / SIDE);
        for_pieces(threads, panels_here, [&](int64_t number, int slot) {
            products_begin();
            if (BACKWARD) pack_backward(row, number, thin_scratch(slot));
            else pack_forward(row, number, thin_scratch(slot));
            products_end();
        });
        // Backward, one product is summed over all linears; forward, each linear has its own (and none if y is not wanted).
        const int64_t products = BACKWARD ? 1 : y ? call->count : 0, columns = piece_columns(panels_here);
        int64_t pieces = 0;
        for (int64_t p = 0; p < products; p++) pieces += (width_of(call->linears[p]) + columns - 1) / columns;
        const int64_t thin_pieces = BACKWARD && rank_squares > 0 ? shares : 0;  // of either gradient
        for_pieces(threads, pieces + 2 * thin_pieces, [&](int64_t index, int slot) {
            products_begin();
            if (index >= pieces + thin_pieces) {
                gradients_a(row, panels_here, int(index - pieces - thin_pieces), shares, thin_scratch(slot));
            } else if (index >= pieces) {
                gradients_b(row, panels_here, int(index - pieces), shares, thin_scratch(slot));
            } else {
                int64_t p = 0;
                for (int64_t here; index >= (here = (width_of(call->linears[p]) + columns - 1) / columns); p++) index -= here;
                const Range mine = {index * columns, least((index + 1) * columns, width_of(call->linears[p]))};
                multiply_columns(row, panels_here, mine, p, thread_scratch + slot * thread_bytes);
            }
            products_end();
        });
    }
}

#include "project_pack.inl"
#include "project_products.inl"
#include "project_gradients.inl"

// Run one direction in one type. Return false if the rows are too uneven for int8; then nothing has been written.
template <bool BACKWARD, class M, class E>
static bool run(ProjectCall* call) {
    typedef Project<BACKWARD, M, E> P;
    P project;
    project.plan(call);
    if (!call->scratch) return true;
    project.work();
    return !P::SCALED || project.serves();
}

// Run in int8 if the caller asks for it and the rows are even enough, else in Real. When scratch is only measured, ask for
// enough for either.
template <bool BACKWARD, class M>
static void run_either(ProjectCall* call) {
    if (call->int8 && run<BACKWARD, M, Code>(call) && call->scratch) return;
    const int64_t needed = call->int8 ? call->scratch_bytes : 0;
    run<BACKWARD, M, Real>(call);
    if (call->scratch_bytes < needed) call->scratch_bytes = needed;
}

template <bool BACKWARD>
static void run_any(ProjectCall* call) {
    if (call->bf16) return run_either<BACKWARD, Bf16>(call);
#if !defined(ET_USE_AVX512_BF16)
    run_either<BACKWARD, float>(call);
#endif
}

}  // namespace project

// Both are called twice: without scratch they set scratch_bytes, with it they compute. Shapes: structures.h, ProjectCall.
// Forward: reads x and linears; writes y, unless it is null, and reduced.
void project_nf4(ProjectCall* call) { project::run_any<false>(call); }
// Backward: reads x, y (which holds dy), reduced and linears; writes dx, and adds to every linear's da and db.
void project_nf4_backward(ProjectCall* call) { project::run_any<true>(call); }

#define ET_PROJECT_KERNELS(X) X(project_nf4) X(project_nf4_backward)
