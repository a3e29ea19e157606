// Products of NF4 weights with many rows on AMX: the weight is dequantised piece by piece into the first cache and multiplied
// from there, so that no dense copy of it ever exists. This file has the loops around one 32 x 32 square of sums;
// gemm_strip.inl dequantises, gemm_int8.inl rounds to 8 bits, and project.inl (which draws the whole) makes linear layers with
// adapters of it.
//
//     forward    y (M, O)  = x (M, I) W^T     computed as y^T = W x^T: dequantised rows already are the left form of a tile
//     backward   dx (M, I) = dy (M, O) W      dequantised pairs of rows, interleaved, are its right form
//
// "Left form" and "right form" are those of attention_tiles.inl: the two operands of a tile product. In bf16 the weights have
// nf4.py's bits, sums are fp32 over the whole depth, and the result is rounded once. In int8 a square has the same bytes and
// twice the depth.

namespace gemm {

using namespace attention;  // its squares, in left and right form

// Numbers along the depth of one square of E: 32 bf16 or 64 int8. A square is 2 KB of either: 32 rows of 64 bytes.
template <class E>
constexpr int64_t DEPTH = 64 / sizeof(E);
template <class E>
constexpr int64_t STRIP_DEPTH = STRIP_SQUARES * DEPTH<E>;

ET_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ET_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#include "gemm_strip.inl"

// ---- products ----

// Memory to prefetch while a square of sums is computed. AMX needs no more than one instruction in 16 cycles, so there is room.
struct Ahead {
    const float* sums;   // the next square of sums (SQUARE,), into the first cache; or null
    Bf16* out;           // the 32 rows of the result that this square will be written to, 64 bytes of each; or null
    int64_t out_row;     // stride of those rows in numbers
    const char* panels;  // the panels of the next piece of depth, into the second cache:
    int64_t lines;       // this many lines of 64 bytes at every step

    // step: counts the squares along the depth. The first 8 steps fetch all of sums (64 lines) and of out (32 lines).
    ET_MEMBER void fetch(int64_t step) const {
        for (int64_t i = step * lines; i < (step + 1) * lines; i++) _mm_prefetch(panels + i * 64, _MM_HINT_T1);
        if (step >= 8) return;
        if (sums)
            for (int i = 0; i < 8; i++) _mm_prefetch(reinterpret_cast<const char*>(sums) + (step * 8 + i) * 64, _MM_HINT_T0);
        if (out)
            for (int i = 0; i < 4; i++)
                _mm_prefetch(reinterpret_cast<const char*>(out + (step * 4 + i) * out_row), _MM_HINT_T0);
    }
};

// The operands of a product: `count` squares along the depth, in left form and in right form.
template <class E>
struct Squares {
    const E *left, *right;
    int64_t count;
};

// Tile `sums` += tile `left` x tile `right`. A macro, since the intrinsics want literal tile numbers.
#define ET_TILE_PRODUCT(sums, left, right)                   \
    do {                                                     \
        if (sizeof(E) == 1) _tile_dpbssd(sums, left, right); \
        else _tile_dpbf16ps(sums, left, right);              \
    } while (0)

// Tiles 0 to 3 (2 x 2 blocks of sums) += one left square x one right square. Tiles 4 and 5 hold the left square's two halves,
// 6 and 7 the right one's; loads are spread between products, so that each has time to arrive.
// PANEL_LEFT: the left square is the panel's, not the strip's. A panel comes from the second cache and is used once, so it is
// loaded past the first cache (stream_loadd), which the strips need.
template <bool PANEL_LEFT, class E>
ET_INLINE void multiply_square(const E* left, const E* right) {
    constexpr int64_t tile = 1024 / sizeof(E);
    if (PANEL_LEFT) {
        _tile_loadd(6, right, 64);
        _tile_stream_loadd(4, left, 64);
        ET_TILE_PRODUCT(0, 4, 6);
        _tile_loadd(7, right + tile, 64);
        ET_TILE_PRODUCT(1, 4, 7);
        _tile_stream_loadd(5, left + tile, 64);
    } else {
        _tile_stream_loadd(6, right, 64);
        _tile_loadd(4, left, 64);
        ET_TILE_PRODUCT(0, 4, 6);
        _tile_stream_loadd(7, right + tile, 64);
        ET_TILE_PRODUCT(1, 4, 7);
        _tile_loadd(5, left + tile, 64);
    }
    ET_TILE_PRODUCT(2, 5, 6);
    ET_TILE_PRODUCT(3, 5, 7);
}

// c (SQUARE,) = or, if `add`, += the products of `main` and then of `more`. c holds four tiles of 16 x 16 sums one after
// another (top left, top right, bottom left, bottom right): fp32, or int32 for int8.
// After every square of main, `next` (a strip that is being dequantised) gets `chunks` chunks further.
template <bool PANEL_LEFT, class E, class Next>
ET_INLINE void multiply(float* c, const Squares<E>& main, const Squares<E>& more, bool add, Next& next, int64_t chunks,
                        const Ahead& ahead) {
    ET_MEMORY_BARRIER();
    if (add) {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + 256, 64);
        _tile_loadd(2, c + 512, 64);
        _tile_loadd(3, c + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < main.count; s++) {
        multiply_square<PANEL_LEFT>(main.left + s * SIDE * DEPTH<E>, main.right + s * SIDE * DEPTH<E>);
        ahead.fetch(s);
        for (int64_t i = 0; i < chunks && next.more(); i++) next.chunk();
    }
    for (int64_t s = 0; s < more.count; s++)
        multiply_square<PANEL_LEFT>(more.left + s * SIDE * DEPTH<E>, more.right + s * SIDE * DEPTH<E>);
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
    ET_MEMORY_BARRIER();
}

// c (SQUARE,), as four tiles, = one product, with no sums before it and nothing to dequantise or prefetch in between.
template <class E>
static void multiply_alone(float* c, const Squares<E>& squares) {
    struct {
        ET_MEMBER bool more() const { return false; }
        ET_MEMBER void chunk() const {}
    } nothing;
    multiply<false>(c, squares, Squares<E>{}, false, nothing, 0, Ahead{});
}

// ---- results ----

// Two registers of fp32 -> 32 bf16, to nearest even.
ET_INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

ET_INLINE __m512 widened(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

// c (four tiles of sums, a row of it a row of x) -> bf16: the first `rows` (at most 32) rows of out, 32 columns of each.
static void write_rows(const float* c, Bf16* out, int64_t out_row, int64_t rows) {
    for (int64_t half = 0; half < 2; half++, c += 512, out += 16 * out_row)
        for (int64_t r = 0; r < least(16, rows - 16 * half); r++)
            _mm512_storeu_si512(out + r * out_row, rounded(_mm512_loadu_ps(c + 16 * r), _mm512_loadu_ps(c + 256 + 16 * r)));
}

// c (four tiles of sums, a column of it a row of x) -> the same. Rounded neighbours of a column are joined to one 32-bit word
// first, so that words can be transposed instead of 16-bit numbers.
static void write_columns(const float* c, Bf16* out, int64_t out_row, int64_t rows) {
    alignas(64) static const uint16_t zip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(zip);
    for (int64_t half = 0; half < 2; half++, c += 256, out += 16 * out_row) {
        alignas(64) Bf16 pairs[512], turned[512];
        for (int64_t i = 0; i < 16; i++) {
            const float* sums = c + i / 8 * 512 + i % 8 * 32;
            __m512i both = rounded(_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16));
            _mm512_store_si512(pairs + 32 * i, _mm512_permutexvar_epi16(order, both));
        }
        transpose_words(pairs, 64, turned);
        for (int64_t r = 0; r < least(16, rows - 16 * half); r++)
            _mm512_storeu_si512(out + r * out_row, _mm512_load_si512(turned + 32 * r));
    }
}

#include "gemm_int8.inl"

}  // namespace gemm
