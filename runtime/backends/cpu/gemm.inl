// Products of NF4 weights with many rows on AMX: the weight is dequantised piece by piece into the first cache and multiplied
// from there, so that no dense copy of it ever exists. Weights are nf4.py's bits in bf16, sums are fp32 over the whole depth,
// and the result is rounded once.
//     forward    y (M, O)  = x (M, I) W^T     computed as y^T = W x^T: dequantised rows are a tile's left form as they lie
//     backward   dx (M, I) = dy (M, O) W      dequantised pairs of rows, interleaved, are its right form
// In both, "strips" of the weight, 32 of its `wide` dimension, meet "panels" of 32 rows of x (or dy), which were packed once
// in the other form. Threads share the wide dimension: each dequantises its part alone, and sums do not depend on how many
// there are. AMX needs no more than one instruction in 16 cycles, so the next strip is dequantised in between, and the panels
// of the next piece of depth are fetched into the second cache. Panels are loaded past the first cache, which strips need.
// project.inl makes whole linears with adapters of these.

namespace gemm {

using namespace attention;  // its squares, in left and right form

constexpr int64_t DEEP = 256;              // of a strip: two strips, a panel and its sums fit the first cache
constexpr int64_t WIDE = 512, TALL = 512;  // sums at a time: they fit the second cache
constexpr int64_t CHUNK = 64;              // weights dequantised at once: never of two blocks

struct Weight {  // project.py's _Weight, field for field
    const uint8_t* packed;
    const float* codes;
    Absmax absmax;
    int64_t block_shift;
};

ET_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ET_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- a strip, one chunk after the other ----

template <bool BACKWARD>
struct Strip {
    Absmax absmax;  // copies: the compiler must believe that a store changes what a pointer shows
    const uint8_t* packed;
    int64_t inputs, shift;
    __m512 table;
    Bf16* to;           // squares along the depth
    int64_t wide;       // the first of its 32 rows (forward) or columns (backward) of the weight
    int64_t deep, end;  // the part of the other dimension
    int64_t row, column;  // the next chunk

    ET_MEMBER Strip(const Weight& weight, int64_t inputs)
        : absmax(weight.absmax), packed(weight.packed), inputs(inputs), shift(weight.block_shift),
          table(_mm512_loadu_ps(weight.codes)) {}
    ET_MEMBER void begin(Bf16* squares, int64_t first, int64_t from, int64_t until) {
        to = squares, wide = first, deep = from, end = until;
        row = BACKWARD ? from : first, column = BACKWARD ? first : from;
    }
    ET_MEMBER bool more() const { return BACKWARD ? row < end : row < wide + SIDE; }

    ET_MEMBER __m512 products(int64_t weight) const {
        return _mm512_mul_ps(table, _mm512_set1_ps(absmax.at(weight >> shift)));
    }

    // Where bf16 rounds to a subnormal this gives zero, and dequantize does not; a tile product reads both as zero.
    ET_MEMBER void chunk() {
        const int64_t weight = row * inputs + column;
        const uint8_t* from = packed + (weight >> 1);
        if (BACKWARD) {
            __m512i values = (__m512i)_mm512_cvtne2ps_pbh(products(weight + inputs), products(weight));
            __m128i even = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            __m128i odd = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (inputs >> 1)));
            _mm_prefetch(reinterpret_cast<const char*>(from + 64), _MM_HINT_T0);
            Bf16* out = to + (row - deep) / SIDE * SQUARE + (row - deep) % SIDE * 16;
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(pairs(_mm_unpacklo_epi8(even, odd)), values));
            _mm512_storeu_si512(out + 512, _mm512_permutexvar_epi16(pairs(_mm_unpackhi_epi8(even, odd)), values));
            row += 2;
        } else {
            __m512 all = products(weight);
            __m512i values = (__m512i)_mm512_cvtne2ps_pbh(all, all);
            _mm_prefetch(reinterpret_cast<const char*>(from + 16 * inputs), _MM_HINT_T0);
            Bf16* out = to + (column - deep) / SIDE * SQUARE + (row - wide) * SIDE;
            for (int i = 0; i < 2; i++) _mm512_storeu_si512(out + i * SQUARE, _mm512_permutexvar_epi16(codes(from + 16 * i), values));
            column += CHUNK;
            if (column >= end) column = deep, row++;
        }
    }

    // 16 bytes of a row -> 32 words whose low 4 bits are its codes; the table repeats itself after 16.
    ET_MEMBER static __m512i codes(const uint8_t* from) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2020242400000404), bytes);
    }
    // 8 bytes of a row interleaved with 8 of the next -> 16 pairs of codes, the second row's with bit 4 set: the table's half.
    ET_MEMBER static __m512i pairs(__m128i bytes) {
        __m512i words = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x080800000c0c0404), _mm512_cvtepu16_epi64(bytes));
        return _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(0x000f000f), _mm512_set1_epi32(0x00100000), 0xea);
    }
};

// ---- products ----

// Memory that is wanted soon: the next 32 x 32 sums, and 32 rows of the result, 64 bytes of each; and later: `lines` of the
// next panels a step.
struct Ahead {
    const float* sums;
    Bf16* out;
    int64_t out_row;
    const char* panels;
    int64_t lines;

    ET_MEMBER void fetch(int64_t step) const {
        for (int64_t i = step * lines; i < (step + 1) * lines; i++) _mm_prefetch(panels + i * 64, _MM_HINT_T1);
        if (step >= 8) return;
        if (sums)
            for (int i = 0; i < 8; i++) _mm_prefetch(reinterpret_cast<const char*>(sums) + (step * 8 + i) * 64, _MM_HINT_T0);
        if (out)
            for (int i = 0; i < 4; i++) _mm_prefetch(reinterpret_cast<const char*>(out + (step * 4 + i) * out_row), _MM_HINT_T0);
    }
};

struct Squares {
    const Bf16 *left, *right;
    int64_t count;
};

// PANEL_LEFT: which of the two is the panel's.
template <bool PANEL_LEFT>
ET_INLINE void multiply_square(const Bf16* left, const Bf16* right) {
    if (PANEL_LEFT) {
        _tile_loadd(6, right, 64);
        _tile_stream_loadd(4, left, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, left + 512, 64);
    } else {
        _tile_stream_loadd(6, right, 64);
        _tile_loadd(4, left, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, right + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 512, 64);
    }
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// c (four tiles of 16 x 16 sums) = or += the products of `main` and then of `more`; the strip gets `each` chunks further
// after every one of main's.
template <bool PANEL_LEFT, class Next>
ET_INLINE void multiply(float* c, const Squares& main, const Squares& more, bool add, Next& next, int64_t each,
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
        multiply_square<PANEL_LEFT>(main.left + s * SQUARE, main.right + s * SQUARE);
        ahead.fetch(s);
        for (int64_t i = 0; i < each && next.more(); i++) next.chunk();
    }
    for (int64_t s = 0; s < more.count; s++)
        multiply_square<PANEL_LEFT>(more.left + s * SQUARE, more.right + s * SQUARE);
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
    ET_MEMORY_BARRIER();
}

ET_INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

ET_INLINE __m512 widened(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// 32 x 32 sums of x's rows (two tiles, then two) to bf16: `rows` rows of out, as far as there are.
static void write_rows(const float* c, Bf16* out, int64_t out_row, int64_t rows) {
    for (int64_t half = 0; half < 2; half++, c += 512, out += 16 * out_row)
        for (int64_t r = 0; r < least(16, rows - 16 * half); r++)
            _mm512_storeu_si512(out + r * out_row, rounded(_mm512_loadu_ps(c + 16 * r), _mm512_loadu_ps(c + 256 + 16 * r)));
}

// The same for sums whose columns are x's rows. Rounded neighbours of a column become one word before words are transposed.
static void write_columns(const float* c, Bf16* out, int64_t out_row, int64_t rows) {
    alignas(64) static const uint16_t zip[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
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

}  // namespace gemm
