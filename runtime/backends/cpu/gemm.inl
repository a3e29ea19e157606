// Products of NF4 weights with many rows on AMX: the weight is dequantised piece by piece into the first cache and multiplied
// from there, so that no dense copy of it ever exists. In bf16 weights have nf4.py's bits, sums are fp32 over the whole depth,
// and the result is rounded once.
//     forward    y (M, O)  = x (M, I) W^T     computed as y^T = W x^T: dequantised rows are a tile's left form as they lie
//     backward   dx (M, I) = dy (M, O) W      dequantised pairs of rows, interleaved, are its right form
// In both, "strips" of the weight, 32 of its `wide` dimension, meet "panels" of 32 rows of x (or dy), which were packed once
// in the other form. Threads share the wide dimension: each dequantises its part alone, and sums do not depend on how many
// there are. AMX needs no more than one instruction in 16 cycles, so the next strip is dequantised in between, and the panels
// of the next piece of depth are fetched into the second cache. Panels are loaded past the first cache, which strips need.
// project.inl makes whole linears with adapters of these.
// In int8 the same squares hold twice the depth: int8.inl.

namespace gemm {

using namespace attention;  // its squares, in left and right form

template <class E>
constexpr int64_t DEPTH = 64 / sizeof(E);  // of a square of E: 32 bf16 or 64 int8, 2 KB of either
template <class E>
constexpr int64_t DEEP = STRIP_SQUARES * DEPTH<E>;  // of a strip: two strips, a panel and its sums fit the first cache

ET_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ET_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- a strip, one chunk after the other ----

template <bool BACKWARD, class E>
struct Strip {
    Absmax absmax;  // copies: the compiler must believe that a store changes what a pointer shows
    const uint8_t* packed;
    int64_t inputs, shift;
    __m512 table;
    const float* inverse;  // int8: 1 / the scale of every row of the weight
    E* to;              // squares along the depth
    int64_t wide;       // the first of its 32 rows (forward) or columns (backward) of the weight
    int64_t deep, end;  // the part of the other dimension
    int64_t row, column;  // the next chunk

    ET_MEMBER Strip(const ProjectWeight& weight, int64_t inputs, const float* inverse)
        : absmax(weight.absmax), packed(weight.packed), inputs(inputs), shift(weight.block_shift),
          table(_mm512_loadu_ps(weight.codes)), inverse(inverse) {}
    ET_MEMBER void begin(E* squares, int64_t first, int64_t from, int64_t until) {
        to = squares, wide = first, deep = from, end = until;
        row = BACKWARD ? from : first, column = BACKWARD ? first : from;
    }
    ET_MEMBER bool more() const { return BACKWARD ? row < end : row < wide + SIDE; }
    // How many chunks a strip of this depth has.
    static int64_t chunks(int64_t depth) { return depth * SIDE / (BACKWARD && sizeof(E) == 1 ? 2 * CHUNK : CHUNK); }

    ET_MEMBER __m512 products(int64_t weight) const {
        return _mm512_mul_ps(table, _mm512_set1_ps(absmax.at(weight >> shift)));
    }
    // The same of row `of`, in units of its scale, rounded to 16 bytes.
    ET_MEMBER __m128i bytes(int64_t weight, int64_t of) const {
        return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(products(weight), _mm512_set1_ps(inverse[of]))));
    }
    ET_MEMBER void chunk() { chunk(static_cast<const E*>(nullptr)); }

    // Where bf16 rounds to a subnormal this gives zero, and dequantize does not; a tile product reads both as zero.
    ET_MEMBER void chunk(const Bf16*) {
        const int64_t weight = row * inputs + column;
        const uint8_t* from = packed + (weight >> 1);
        if (BACKWARD) {
            __m512i values = (__m512i)_mm512_cvtne2ps_pbh(products(weight + inputs), products(weight));
            __m128i even = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            __m128i odd = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (inputs >> 1)));
            _mm_prefetch(reinterpret_cast<const char*>(from + 64), _MM_HINT_T0);
            E* out = to + (row - deep) / SIDE * SQUARE + (row - deep) % SIDE * 16;
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(pairs(_mm_unpacklo_epi8(even, odd)), values));
            _mm512_storeu_si512(out + 512, _mm512_permutexvar_epi16(pairs(_mm_unpackhi_epi8(even, odd)), values));
            row += 2;
        } else {
            __m512 all = products(weight);
            __m512i values = (__m512i)_mm512_cvtne2ps_pbh(all, all);
            _mm_prefetch(reinterpret_cast<const char*>(from + 16 * inputs), _MM_HINT_T0);
            E* out = to + (column - deep) / SIDE * SQUARE + (row - wide) * SIDE;
            for (int i = 0; i < 2; i++) _mm512_storeu_si512(out + i * SQUARE, _mm512_permutexvar_epi16(codes(from + 16 * i), values));
            next_columns();
        }
    }

    // int8: forward a row's 64 columns are 64 bytes; backward 16 words are made of four rows' 16 columns, twice.
    ET_MEMBER void chunk(const int8_t*) {
        const int64_t weight = row * inputs + column;
        const uint8_t* from = packed + (weight >> 1);
        E* square = to + (BACKWARD ? row - deep : column - deep) / 64 * 2048;
        if (BACKWARD) {
            __m512i values = _mm512_castsi128_si512(bytes(weight, row)), nibbles = lane(from);
            values = _mm512_inserti32x4(values, bytes(weight + inputs, row + 1), 1);
            values = _mm512_inserti32x4(values, bytes(weight + 2 * inputs, row + 2), 2);
            values = _mm512_inserti32x4(values, bytes(weight + 3 * inputs, row + 3), 3);
            nibbles = _mm512_inserti32x4(nibbles, _mm512_castsi512_si128(lane(from + inputs / 2)), 1);
            nibbles = _mm512_inserti32x4(nibbles, _mm512_castsi512_si128(lane(from + inputs)), 2);
            nibbles = _mm512_inserti32x4(nibbles, _mm512_castsi512_si128(lane(from + inputs / 2 * 3)), 3);
            _mm_prefetch(reinterpret_cast<const char*>(from + 64), _MM_HINT_T0);
            const __m512i low = _mm512_set1_epi8(15);
            __m512i even = _mm512_shuffle_epi8(values, _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), low));
            __m512i odd = _mm512_shuffle_epi8(values, _mm512_and_si512(nibbles, low));
            // Byte r of word 2i is even[16 r + i], of word 2i + 1 odd[16 r + i]; the second half's words follow 8 further on.
            alignas(64) static const uint8_t order[64] = {
                0, 16, 32, 48, 64, 80, 96, 112, 1, 17, 33, 49, 65, 81, 97, 113,
                2, 18, 34, 50, 66, 82, 98, 114, 3, 19, 35, 51, 67, 83, 99, 115,
                4, 20, 36, 52, 68, 84, 100, 116, 5, 21, 37, 53, 69, 85, 101, 117,
                6, 22, 38, 54, 70, 86, 102, 118, 7, 23, 39, 55, 71, 87, 103, 119};
            const __m512i first = _mm512_load_si512(order), second = _mm512_add_epi8(first, _mm512_set1_epi8(8));
            E* out = square + (row - deep) % 64 * 16;
            _mm512_storeu_si512(out, _mm512_permutex2var_epi8(even, first, odd));
            _mm512_storeu_si512(out + 1024, _mm512_permutex2var_epi8(even, second, odd));
            row += 4;
        } else {
            __m512i values = _mm512_broadcast_i32x4(bytes(weight, row));
            __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
            _mm_prefetch(reinterpret_cast<const char*>(from + 16 * inputs), _MM_HINT_T0);
            __m512i nibbles = _mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_slli_epi16(words, 8));
            nibbles = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
            _mm512_storeu_si512(square + (row - wide) * 64, _mm512_shuffle_epi8(values, nibbles));
            next_columns();
        }
    }
    ET_MEMBER void next_columns() {
        column += CHUNK;
        if (column >= end) column = deep, row++;
    }
    ET_MEMBER static __m512i lane(const uint8_t* from) {
        return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
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

template <class E>
struct Squares {
    const E *left, *right;
    int64_t count;
};

// A tile of sums += left x right.
#define ET_TILE_PRODUCT(sums, left, right) \
    do { \
        if (sizeof(E) == 1) _tile_dpbssd(sums, left, right); \
        else _tile_dpbf16ps(sums, left, right); \
    } while (0)

// PANEL_LEFT: which of the two is the panel's.
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

// c (four tiles of 16 x 16 sums, whole numbers of int8) = or += the products of `main` and then of `more`; the strip gets `each`
// chunks further after every one of main's.
template <bool PANEL_LEFT, class E, class Next>
ET_INLINE void multiply(float* c, const Squares<E>& main, const Squares<E>& more, bool add, Next& next, int64_t each,
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
        for (int64_t i = 0; i < each && next.more(); i++) next.chunk();
    }
    for (int64_t s = 0; s < more.count; s++)
        multiply_square<PANEL_LEFT>(more.left + s * SIDE * DEPTH<E>, more.right + s * SIDE * DEPTH<E>);
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
    ET_MEMORY_BARRIER();
}

// The same of one product, no sums before it and nothing to do in between.
template <class E>
static void multiply_alone(float* c, const Squares<E>& squares) {
    struct {
        ET_MEMBER bool more() const { return false; }
        ET_MEMBER void chunk() const {}
    } nothing;
    multiply<false>(c, squares, Squares<E>{}, false, nothing, 0, Ahead{});
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
