// gemm.inl's strips: 32 rows (forward) or columns (backward) of an NF4 weight, along at most STRIP_DEPTH of the depth,
// dequantised into squares that tile products take. A strip is made in chunks of 64 weights, so that the work can be spread
// between the products of the strip before it.
//
// A byte of packed weights holds two codes, the first weight's in the high nibble. A chunk lies within one quantisation block
// (or in one block of each of its rows), so its weights are looked up among 16 products of the code table with one absmax.

template <bool BACKWARD, class W>
struct Strip {  // W: Real or WeightCode
    Absmax absmax;  // copies: behind a pointer the compiler would have to load them again after every store
    const uint8_t* packed;
    int64_t inputs, block_shift;
    const float* table;              // (16,): the values of the codes
    const float* inverse;            // int8: (outputs,), 1 / the scale of every row of the weight
    W* squares;                      // the strip: squares along the depth
    int64_t first;                   // of its 32 rows (forward) or columns (backward) of the weight
    int64_t begin_depth, end_depth;  // its part of the other dimension
    int64_t row, column;             // where in the weight the next chunk begins

    ET_MEMBER Strip(const ProjectWeight& weight, int64_t inputs, const float* inverse)
        : absmax(weight.absmax), packed(weight.packed), inputs(inputs), block_shift(weight.block_shift),
          table(weight.codes), inverse(inverse) {}
    ET_MEMBER void begin(W* to, int64_t first_wide, int64_t from, int64_t until) {
        squares = to, first = first_wide, begin_depth = from, end_depth = until;
        row = BACKWARD ? from : first, column = BACKWARD ? first : from;
    }
    ET_MEMBER bool more() const { return BACKWARD ? row < end_depth : row < first + SIDE; }
    // Return the number of chunks in a strip of this depth.
    static constexpr int64_t chunks(int64_t depth) { return depth * SIDE / (BACKWARD ? SIDE * WORD : CHUNK); }
    static constexpr int64_t WORD = 4 / sizeof(W);  // neighbours along the depth in a word: rows of a chunk backward

    ET_MEMBER void next_columns() {
        column += CHUNK;
        if (column >= end_depth) column = begin_depth, row++;
    }

#if !defined(ET_USE_AVX512_BF16)
    // Write 32 weights of row `of_row`, from flat index `weight` on.
    ET_MEMBER void expand(int64_t weight, int64_t of_row, W* out) const {
        const uint8_t* from = packed + (weight >> 1);
        const float scale = absmax.at(weight >> block_shift);
        if constexpr (sizeof(W) == sizeof(Real)) {
            Products<Real>(table, scale).expand32(from, out);
        } else {
            Products<Code>(table, scale * inverse[of_row]).expand32(from, reinterpret_cast<Code*>(out));
            for (int64_t i = 0; i < 32; i++) out[i] = W(out[i] + CODE_ZERO);
        }
    }
    // Dequantise the next chunk. Forward, columns of a row are a row of the left form. Backward, the right form has words of
    // neighbouring rows.
    ET_MEMBER void chunk() {
        typedef Form<W> F;
        if (!BACKWARD) {
            alignas(64) W line[CHUNK];
            const int64_t weight = row * inputs + column, deep = DEPTH<W>;
            for (int64_t i = 0; i < CHUNK; i += 32) expand(weight + i, row, line + i);
            for (int64_t i = 0, k = column - begin_depth; i < CHUNK; i += F::depth, k += F::depth)
                memcpy(static_cast<void*>(F::left(squares + k / deep * F::square, row - first, k % deep)), line + i, 64);
            next_columns();
            return;
        }
        alignas(64) W lines[WORD][SIDE], words[WORD * SIDE];
        for (int64_t i = 0; i < WORD; i++) expand((row + i) * inputs + column, row + i, lines[i]);
        for (int64_t j = 0; j < SIDE; j++)
            for (int64_t i = 0; i < WORD; i++) words[j * WORD + i] = lines[i][j];
        const int64_t k = row - begin_depth;
        W* out = squares + k / DEPTH<W> * F::square + k % DEPTH<W> / F::depth * F::tile + k % F::depth * 16;
        for (int64_t half = 0; half < 2; half++)
            memcpy(static_cast<void*>(out + half * F::deep * F::tile), words + half * F::depth, 64);
        row += WORD;
    }
#else
    // Dequantise the next chunk.
    ET_MEMBER void chunk() {
        if constexpr (sizeof(W) == 1) {
            if (BACKWARD) int8_columns();
            else int8_row();
        } else {
            if (BACKWARD) bf16_columns();
            else bf16_row();
        }
    }

    // Return the 16 values that the weights of one block can have. weight: the flat index of any weight in it.
    ET_MEMBER __m512 products(int64_t weight) const {
        return _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(absmax.at(weight >> block_shift)));
    }
    // Return these 16 values as bytes, in steps of the scale of the weight's row `of_row`, and CODE_ZERO above them.
    ET_MEMBER __m128i bytes(int64_t weight, int64_t of_row) const {
        const __m512 steps = _mm512_mul_ps(products(weight), _mm512_set1_ps(inverse[of_row]));
        return _mm_xor_si128(_mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(steps)), _mm_set1_epi8(char(CODE_ZERO)));
    }

    // ---- bf16 ----
    // The conversion turns bf16 subnormals into zero, and dequantize does not; but a tile product reads both as zero.

    // 64 columns of one row are one row of two squares in left form.
    ET_MEMBER void bf16_row() {
        const int64_t weight = row * inputs + column;
        const uint8_t* from = packed + (weight >> 1);
        __m512 all = products(weight);
        __m512i values = (__m512i)_mm512_cvtne2ps_pbh(all, all);
        // 16 * inputs bytes are 32 rows: the same columns of the next strip
        _mm_prefetch(reinterpret_cast<const char*>(from + 16 * inputs), _MM_HINT_T0);
        W* out = squares + (column - begin_depth) / SIDE * SQUARE + (row - first) * SIDE;
        for (int i = 0; i < 2; i++)
            _mm512_storeu_si512(out + i * SQUARE, _mm512_permutexvar_epi16(codes(from + 16 * i), values));
        next_columns();
    }

    // 32 columns of two rows are a row of words of one square in right form: a word is two neighbours along the depth, hence
    // of two rows. The table of 32 holds the first row's values, then the second's.
    ET_MEMBER void bf16_columns() {
        const int64_t weight = row * inputs + column;
        const uint8_t* from = packed + (weight >> 1);
        __m512i values = (__m512i)_mm512_cvtne2ps_pbh(products(weight + inputs), products(weight));
        __m128i even = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        __m128i odd = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (inputs >> 1)));
        _mm_prefetch(reinterpret_cast<const char*>(from + 64), _MM_HINT_T0);
        W* out = squares + (row - begin_depth) / SIDE * SQUARE + (row - begin_depth) % SIDE * 16;
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(pairs(_mm_unpacklo_epi8(even, odd)), values));
        _mm512_storeu_si512(out + 512, _mm512_permutexvar_epi16(pairs(_mm_unpackhi_epi8(even, odd)), values));
        row += 2;
    }

    // 16 bytes of a row -> 32 words of 16 bits whose low 4 bits are its codes. Bits above are ignored: the lookup reads 5, and
    // the table of 32 holds the 16 values twice. Each byte of the constant selects 8 bits from that bit of a 64-bit lane on.
    ET_MEMBER static __m512i codes(const uint8_t* from) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2020242400000404), bytes);
    }
    // 8 bytes of a row interleaved with 8 of the next -> 16 pairs of codes; the second row's have bit 4 set, which selects the
    // second half of the table. 0xea: (words & 0x000f000f) | 0x00100000.
    ET_MEMBER static __m512i pairs(__m128i bytes) {
        __m512i words = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x080800000c0c0404), _mm512_cvtepu16_epi64(bytes));
        return _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(0x000f000f), _mm512_set1_epi32(0x00100000), 0xea);
    }

    // ---- int8: a word has four neighbours along the depth, a square is 64 deep ----

    // 64 columns of one row are 64 bytes: one row of a square in left form.
    ET_MEMBER void int8_row() {
        const int64_t weight = row * inputs + column;
        const uint8_t* from = packed + (weight >> 1);
        W* square = squares + (column - begin_depth) / 64 * 2048;
        __m512i values = _mm512_broadcast_i32x4(bytes(weight, row));
        __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        _mm_prefetch(reinterpret_cast<const char*>(from + 16 * inputs), _MM_HINT_T0);
        __m512i nibbles = _mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_slli_epi16(words, 8));
        nibbles = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
        _mm512_storeu_si512(square + (row - first) * 64, _mm512_shuffle_epi8(values, nibbles));
        next_columns();
    }

    // 32 columns of four rows are a row of words of one square in right form. Each of the four 128-bit lanes looks one row's
    // codes up among that row's 16 bytes.
    ET_MEMBER void int8_columns() {
        const int64_t weight = row * inputs + column;
        const uint8_t* from = packed + (weight >> 1);
        W* square = squares + (row - begin_depth) / 64 * 2048;
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
        // clang-format off
        alignas(64) static const uint8_t order[64] = {
            0, 16, 32, 48, 64, 80, 96, 112, 1, 17, 33, 49, 65, 81, 97, 113,
            2, 18, 34, 50, 66, 82, 98, 114, 3, 19, 35, 51, 67, 83, 99, 115,
            4, 20, 36, 52, 68, 84, 100, 116, 5, 21, 37, 53, 69, 85, 101, 117,
            6, 22, 38, 54, 70, 86, 102, 118, 7, 23, 39, 55, 71, 87, 103, 119};
        // clang-format on
        const __m512i first_half = _mm512_load_si512(order), second_half = _mm512_add_epi8(first_half, _mm512_set1_epi8(8));
        W* out = square + (row - begin_depth) % 64 * 16;
        _mm512_storeu_si512(out, _mm512_permutex2var_epi8(even, first_half, odd));
        _mm512_storeu_si512(out + 1024, _mm512_permutex2var_epi8(even, second_half, odd));
        row += 4;
    }

    ET_MEMBER static __m512i lane(const uint8_t* from) {
        return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
#endif
};
