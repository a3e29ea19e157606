// NF4 linears of many rows on AMX: the weight is dequantised piece by piece into the first cache and multiplied from there,
// so that no dense copy of it ever exists. Weights are nf4.py's bits in bf16, sums are fp32 over the whole depth, and the
// result is rounded once.
//     forward    y (M, O)  = x (M, I) W^T     computed as y^T = W x^T: dequantised rows are a tile's left form as they lie
//     backward   dx (M, I) = dy (M, O) W      dequantised pairs of rows, interleaved, are its right form
// In both, "strips" of the weight, 32 of its `wide` dimension, meet "panels" of 32 rows of x (or dy), which were packed once
// in the other form. Threads share the wide dimension: each dequantises its part alone, and sums do not depend on how many
// there are. AMX needs no more than one instruction in 16 cycles, so the next strip is dequantised in between.

namespace gemm {

using namespace attention;  // its squares, in left and right form

constexpr int64_t DEEP = 256;              // of a strip: two strips, a panel and its sums fit the first cache
constexpr int64_t WIDE = 512, TALL = 512;  // sums at a time: they fit the second cache
constexpr int64_t CHUNK = 64;              // weights dequantised at once: never of two blocks
constexpr int64_t AHEAD = 2;               // rows that packing asks for before it needs them

struct Product {  // gemm.py's _Call, field for field
    const Bf16* x;
    int64_t x_row;
    Bf16* out;
    int64_t out_row;
    const uint8_t* packed;
    const float* codes;
    Absmax absmax;
    int64_t block_shift, rows, outputs, inputs, accumulate, threads;
    char* scratch;  // null: only say how much is needed
    int64_t scratch_bytes;
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

    ET_MEMBER explicit Strip(const Product* call)
        : absmax(call->absmax), packed(call->packed), inputs(call->inputs), shift(call->block_shift),
          table(_mm512_loadu_ps(call->codes)) {}
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

// ---- panels ----

// Rows [row, row + 32) of x, numbers [from, until) of each, to squares in the form that is not the strips'; 0 beyond the end.
template <bool BACKWARD>
static void pack_panel(const Product* call, int64_t row, int64_t from, int64_t until, Bf16* to) {
    alignas(64) Bf16 lines[DEEP * 16];
    for (int64_t half = 0; half < 2; half++, row += 16, to += 512) {
        Bf16* tile = BACKWARD ? to : lines;
        const int64_t step = BACKWARD ? SQUARE : 512, rows = call->rows - row;
        for (int64_t r = 0; r < 16; r++) {
            const Bf16* x = call->x + (row + r) * call->x_row;
            for (int64_t k = from; k < until; k += SIDE) {
                if (r + AHEAD < rows) _mm_prefetch(reinterpret_cast<const char*>(x + AHEAD * call->x_row + k), _MM_HINT_T0);
                __m512i line = r < rows ? _mm512_loadu_si512(x + k) : _mm512_setzero_si512();
                _mm512_storeu_si512(tile + (k - from) / SIDE * step + r * SIDE, line);
            }
        }
        if (BACKWARD) continue;
        for (int64_t k = 0; k < (until - from) / SIDE; k++) transpose_words(lines + k * 512, 64, to + k * SQUARE);
    }
}

// ---- products ----

// Memory that is wanted soon: the next 32 x 32 sums, and 32 rows of the result, 64 bytes of each.
struct Ahead {
    const float* sums;
    Bf16* out;
    int64_t out_row;

    ET_MEMBER void fetch(int64_t step) const {
        if (step >= 8) return;
        if (sums)
            for (int i = 0; i < 8; i++) _mm_prefetch(reinterpret_cast<const char*>(sums) + (step * 8 + i) * 64, _MM_HINT_T0);
        if (out)
            for (int i = 0; i < 4; i++) _mm_prefetch(reinterpret_cast<const char*>(out + (step * 4 + i) * out_row), _MM_HINT_T0);
    }
};

// c (four tiles of 16 x 16 sums) = or += n squares of left x right; the strip gets `each` chunks further after every one.
template <class Next>
ET_INLINE void multiply(float* c, const Bf16* left, const Bf16* right, int64_t n, bool add, Next& next, int64_t each,
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
    for (int64_t s = 0; s < n; s++, left += SQUARE, right += SQUARE) {
        _tile_loadd(6, right, 64);
        _tile_loadd(4, left, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 512, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        ahead.fetch(s);
        for (int64_t i = 0; i < each && next.more(); i++) next.chunk();
    }
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

// 32 x 32 sums of x's rows (two tiles, then two) to bf16: rows [row, row + 32) of dx, as far as there are, from `column`.
static void write_rows(const Product* call, const float* c, int64_t row, int64_t column) {
    for (int64_t half = 0; half < 2; half++, row += 16, c += 512)
        for (int64_t r = 0; r < least(16, call->rows - row); r++) {
            Bf16* out = call->out + (row + r) * call->out_row + column;
            __m512 low = _mm512_loadu_ps(c + 16 * r), high = _mm512_loadu_ps(c + 256 + 16 * r);
            if (call->accumulate) {
                __m512i old = _mm512_loadu_si512(out);
                low = _mm512_add_ps(low, widened(_mm512_castsi512_si256(old)));
                high = _mm512_add_ps(high, widened(_mm512_extracti64x4_epi64(old, 1)));
            }
            _mm512_storeu_si512(out, rounded(low, high));
        }
}

// The same for sums whose columns are x's rows. Rounded neighbours of a column become one word before words are transposed.
static void write_columns(const Product* call, const float* c, int64_t row, int64_t column) {
    alignas(64) static const uint16_t zip[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(zip);
    for (int64_t half = 0; half < 2; half++, row += 16, c += 256) {
        alignas(64) Bf16 pairs[512], turned[512];
        for (int64_t i = 0; i < 16; i++) {
            const float* sums = c + i / 8 * 512 + i % 8 * 32;
            __m512i both = rounded(_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16));
            _mm512_store_si512(pairs + 32 * i, _mm512_permutexvar_epi16(order, both));
        }
        transpose_words(pairs, 64, turned);
        for (int64_t r = 0; r < least(16, call->rows - row); r++)
            _mm512_storeu_si512(call->out + (row + r) * call->out_row + column, _mm512_load_si512(turned + 32 * r));
    }
}

template <bool BACKWARD>
struct Gemm {
    Product* call;
    edgetune::Meeting meeting;
    int64_t depth, width, panels;  // panels: of the rows that are packed at a time
    Bf16* packed;
    char* own;  // a thread's part of the scratch: sums, then two strips
    int64_t own_bytes;

    void plan(Product* product) {
        call = product, meeting = {};
        depth = BACKWARD ? call->outputs : call->inputs, width = BACKWARD ? call->inputs : call->outputs;
        panels = round_up(least(call->rows, TALL), SIDE) / SIDE;
        int64_t packed_bytes = panels * SIDE * depth * 2, sums_bytes = panels * SIDE * least(width, WIDE) * 4;
        own_bytes = sums_bytes + 2 * DEEP * SIDE * 2;
        call->scratch_bytes = packed_bytes + call->threads * own_bytes;
        packed = reinterpret_cast<Bf16*>(call->scratch), own = call->scratch + packed_bytes;
    }

    // Squares of one depth for all panels lie together: they share the second cache with the sums.
    Bf16* panel(int64_t number, int64_t deep) const {
        return packed + deep * panels * SIDE + number * SIDE * least(DEEP, depth - deep);
    }

    void pack(int64_t row, int index, int count) const {
        int64_t pieces = (depth + DEEP - 1) / DEEP;
        Range mine = share(panels * pieces, 1, index, count);
        for (int64_t i = mine.begin; i < mine.end; i++) {
            int64_t deep = i / panels * DEEP, number = i % panels;
            pack_panel<BACKWARD>(call, row + number * SIDE, deep, least(deep + DEEP, depth), panel(number, deep));
        }
    }

    // The strip after (wide, deep) in the order of `multiply_share`; false after the last.
    bool advance(Range mine, int64_t* wide, int64_t* deep) const {
        int64_t block = mine.begin + (*wide - mine.begin) / WIDE * WIDE, stop = least(block + WIDE, mine.end);
        *wide += SIDE;
        if (*wide < stop) return true;
        *deep += DEEP;
        *wide = *deep < depth ? block : stop;
        if (*deep >= depth) *deep = 0;
        return *wide < mine.end;
    }

    void multiply_share(int64_t row, int64_t here, Range mine, char* scratch) const {
        float* sums = reinterpret_cast<float*>(scratch);
        Bf16* strips[2];
        strips[0] = reinterpret_cast<Bf16*>(scratch + own_bytes) - 2 * DEEP * SIDE, strips[1] = strips[0] + DEEP * SIDE;
        Strip<BACKWARD> next(call);
        int64_t wide = mine.begin, deep = 0;
        next.begin(strips[0], wide, deep, least(DEEP, depth));
        for (int current = 0;; current ^= 1) {
            while (next.more()) next.chunk();
            int64_t end = least(deep + DEEP, depth), steps = (end - deep) / SIDE, next_wide = wide, next_deep = deep;
            bool more = advance(mine, &next_wide, &next_deep);
            int64_t each = 0;
            if (more) {
                int64_t next_end = least(next_deep + DEEP, depth), chunks = (next_end - next_deep) * SIDE / CHUNK;
                next.begin(strips[current ^ 1], next_wide, next_deep, next_end);
                each = (chunks + here * steps - 1) / (here * steps);
            }
            float* c = sums + (wide - mine.begin) % WIDE * here * SIDE;
            for (int64_t number = 0; number < here; number++, c += SQUARE) {
                const Bf16 *strip = strips[current], *other = panel(number, deep);
                Ahead ahead = {deep > 0 ? c + SQUARE : nullptr, nullptr, call->out_row};
                if (end == depth && row + number * SIDE + SIDE <= call->rows)
                    ahead.out = call->out + (row + number * SIDE) * call->out_row + wide;
                multiply(c, BACKWARD ? other : strip, BACKWARD ? strip : other, steps, deep > 0, next, each, ahead);
                if (end == depth) (BACKWARD ? write_rows : write_columns)(call, c, row + number * SIDE, wide);
            }
            if (!more) return;
            wide = next_wide, deep = next_deep;
        }
    }

    void work(int index, int count) {
        Range mine = share(width, SIDE, index, count);
        products_begin();
        for (int64_t row = 0; row < call->rows; row += panels * SIDE) {
            int64_t here = least(panels, (call->rows - row + SIDE - 1) / SIDE);
            pack(row, index, count);
            edgetune::meet(&meeting, count);
            if (mine.begin < mine.end) multiply_share(row, here, mine, own + index * own_bytes);
            edgetune::meet(&meeting, count);
        }
        products_end();
    }
};

template <bool BACKWARD>
static void run_gemm(Product* call) {
    Gemm<BACKWARD> gemm;
    gemm.plan(call);
    if (!call->scratch) return;
    edgetune::parallel(
        int(call->threads), [](void* gemm, int index, int count) { static_cast<Gemm<BACKWARD>*>(gemm)->work(index, count); },
        &gemm);
}

}  // namespace gemm

void linear_nf4(gemm::Product* call) { gemm::run_gemm<false>(call); }
void linear_nf4_backward(gemm::Product* call) { gemm::run_gemm<true>(call); }

#define ET_GEMM_KERNELS(X) X(linear_nf4) X(linear_nf4_backward)
