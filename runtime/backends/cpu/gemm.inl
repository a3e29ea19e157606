// Products of NF4 weights with many rows: the weight is dequantised piece by piece into the first cache and multiplied from
// there, so that no dense copy of it ever exists. This file has one 32 x 32 square of sums; gemm_strip.inl dequantises,
// gemm_int8.inl rounds to 8 bits, and project.inl (which draws the whole) makes linear layers with adapters of it.
//
//     forward    y (M, O)  = x (M, I) W^T     computed as y^T = W x^T: dequantised rows already are the left form of a tile
//     backward   dx (M, I) = dy (M, O) W      dequantised pairs of rows, interleaved, are its right form
//
// "Left form" and "right form" are those of attention_tiles.inl, whose multiply_squares is the product on every CPU but AMX
// (gemm_amx.inl). The weights have nf4.py's bits, sums are fp32 over the whole depth, and the result is rounded once.

namespace gemm {

using namespace attention;  // its squares, in left and right form

// What a product multiplies whose sums are fp32: bf16 where the CPU does, else fp32.
#if defined(ET_USE_AVX512_BF16)
typedef Bf16 Real;
#else
typedef float Real;
#endif

// What an "int8" product multiplies: integers of at most INT8_LARGEST. Most CPUs that multiply bytes want one operand without
// sign: weights stand CODE_ZERO above their value, and what that adds to a sum is taken off at the end (gemm_int8.inl). Others
// multiply 16-bit integers in pairs: AVX2's product of bytes saturates.
#if defined(ET_USE_AVX512_BF16) || defined(ET_USE_AVX_VNNI) || defined(ET_USE_NEON_I8MM)
typedef int8_t Code;
typedef uint8_t WeightCode;
constexpr int32_t CODE_ZERO = 128;
#elif defined(ET_USE_NEON_DOT)
typedef int8_t Code;
typedef int8_t WeightCode;
constexpr int32_t CODE_ZERO = 0;
#else
typedef int16_t Code;
typedef int16_t WeightCode;
constexpr int32_t CODE_ZERO = 0;
#endif

// The weights' type where rows are of type E: Real or Code.
template <class E>
struct WeightsOf {
    typedef WeightCode type;
};
template <>
struct WeightsOf<Real> {
    typedef Real type;
};

// Numbers along the depth of one square of E: 32, or 64 bytes. And of a strip.
template <class E>
constexpr int64_t DEPTH = Form<E>::square / SIDE;
template <class E>
constexpr int64_t STRIP_DEPTH = STRIP_BYTES / SIDE / int64_t(sizeof(E));

ET_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ET_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#include "gemm_strip.inl"

// ---- products ----

// Memory to prefetch while a square of sums is computed. Only AMX does: it needs no more than one instruction in 16 cycles.
struct Ahead {
    const float* sums;   // the next square of sums (SQUARE,), into the first cache; or null
    const char* out;     // the 32 rows of the result that this square will be written to, 64 bytes of each; or null
    int64_t out_row;     // stride of those rows in bytes
    const char* panels;  // the panels of the next piece of depth, into the second cache:
    int64_t lines;       // this many lines of 64 bytes at every step
#if defined(ET_USE_AMX)
    // step: counts the squares along the depth. The first 8 steps fetch all of sums (64 lines) and of out (32 lines).
    ET_MEMBER void fetch(int64_t step) const {
        for (int64_t i = step * lines; i < (step + 1) * lines; i++) _mm_prefetch(panels + i * 64, _MM_HINT_T1);
        if (step >= 8) return;
        if (sums)
            for (int i = 0; i < 8; i++) _mm_prefetch(reinterpret_cast<const char*>(sums) + (step * 8 + i) * 64, _MM_HINT_T0);
        if (out)
            for (int i = 0; i < 4; i++) _mm_prefetch(out + (step * 4 + i) * out_row, _MM_HINT_T0);
    }
#endif
};

// The operands of a product: `count` squares along the depth, in left form and in right form.
template <class L, class R>
struct Squares {
    const L* left;
    const R* right;
    int64_t count;
};

// Return the operands of a product of rows and weights. Forward the weights stand on the left, backward on the right.
template <bool BACKWARD, class E, class W>
ET_INLINE auto squares(const E* rows, const W* weights, int64_t count) {
    if constexpr (BACKWARD) return Squares<E, W>{rows, weights, count};
    else return Squares<W, E>{weights, rows, count};
}

#if defined(ET_USE_AMX)
#include "gemm_amx.inl"
#else
// c (32, 32) = or, if `add`, += the products of `main` and then of `more`: fp32, or 32-bit integers. `next` (a strip that is
// being dequantised) gets `chunks` chunks further for every square of main. PANEL_LEFT and ahead are for AMX.
template <bool PANEL_LEFT, class L, class R, class Next>
ET_INLINE void multiply(float* c, const Squares<L, R>& main, const Squares<L, R>& more, bool add, Next& next, int64_t chunks,
                        const Ahead&) {
    for (int64_t i = 0; i < chunks * main.count && next.more(); i++) next.chunk();
    multiply_squares(c, SIDE, main.left, Form<L>::square, main.right, Form<R>::square, main.count, add);
    if (more.count)
        multiply_squares(c, SIDE, more.left, Form<L>::square, more.right, Form<R>::square, more.count, true);
}
#endif

// ---- results ----

// 32 numbers of fp32 -> 32 of the matrix's type, to nearest even.
template <class M>
ET_INLINE void put_line(M* to, const float* from) {
    for (int64_t i = 0; i < SIDE; i += LANES) put(to + i, get(from + i));
}
#if defined(ET_USE_AVX512_BF16)
ET_INLINE __m512i rounded(const float* low, const float* high) {  // 16 of each
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
}
ET_INLINE void put_line(Bf16* to, const float* from) { _mm512_storeu_si512(to, rounded(from, from + 16)); }
#endif

// c (32, 32), a row of it a row of x -> the first `rows` (at most 32) rows of out, 32 columns of each.
template <class M>
static void write_rows(const float* c, M* out, int64_t out_row, int64_t rows) {
    for (int64_t r = 0; r < least(SIDE, rows); r++) put_line(out + r * out_row, c + r * SIDE);
}

// c (32, 32), a column of it a row of x -> the same.
template <class M>
static void write_columns(const float* c, M* out, int64_t out_row, int64_t rows) {
    alignas(64) float turned[16 * SIDE];
    for (int64_t half = 0; half < 2; half++, c += 16, out += 16 * out_row) {
        for (int64_t i = 0; i < 2; i++) {
            alignas(64) float block[256];
            transpose_words(c + i * 16 * SIDE, SIDE * 4, block);
            for (int64_t r = 0; r < 16; r++) memcpy(turned + r * SIDE + 16 * i, block + r * 16, 64);
        }
        for (int64_t r = 0; r < least(16, rows - 16 * half); r++) put_line(out + r * out_row, turned + r * SIDE);
    }
}
#if defined(ET_USE_AVX512_BF16)
// Rounded neighbours of a column are joined to one 32-bit word first, so that words can be transposed instead of 16-bit
// numbers.
static void write_columns(const float* c, Bf16* out, int64_t out_row, int64_t rows) {
    alignas(64) static const uint16_t zip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(zip);
    for (int64_t half = 0; half < 2; half++, c += 16, out += 16 * out_row) {
        alignas(64) Bf16 pairs[512], turned[512];
        for (int64_t i = 0; i < 16; i++) {
            const float* sums = c + 2 * i * SIDE;
            _mm512_store_si512(pairs + 32 * i, _mm512_permutexvar_epi16(order, rounded(sums, sums + SIDE)));
        }
        transpose_words(pairs, 64, turned);
        for (int64_t r = 0; r < least(16, rows - 16 * half); r++)
            _mm512_storeu_si512(out + r * out_row, _mm512_load_si512(turned + 32 * r));
    }
}
#endif

#include "gemm_int8.inl"

}  // namespace gemm
