// Dequantises NF4 (or any 16-entry code table) to bf16, fp16 or fp32, bit for bit as nf4.py defines it:
//     absmax = table[code] * nested_absmax, + offset (two roundings);  weight = codes[nibble] * absmax, rounded to the type.
// All weights of a block share one absmax, so a block has only 16 different values: they are computed and rounded once a block,
// and every weight is a lookup among them.
//
// Packed weights: two codes a byte, the first weight's in the high nibble.

// ---- Products<T>: the 16 rounded products of a block, and the lookup of 32 weights (16 packed bytes) among them ----

#if defined(ET_USE_AVX512)

ET_INLINE __m512i repeat16(__m512i words) {  // 16 values in 32-bit lanes -> 32 lanes of 16 bits, all values twice
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(words));
}

ET_INLINE __m512i round16(__m512 products, const Bf16*) {
    __m512i bits = _mm512_castps_si512(products);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return repeat16(_mm512_srli_epi32(bits, 16));
}

ET_INLINE __m512i round16(__m512 products, const int16_t*) { return repeat16(_mm512_cvtps_epi32(products)); }

ET_INLINE __m512i round16(__m512 products, const F16*) {
    return _mm512_broadcast_i64x4(_mm512_cvtps_ph(products, _MM_FROUND_TO_NEAREST_INT));
}

// 16 packed bytes -> 32 16-bit lanes whose low 4 bits are the codes in order. The bits above need no mask: the lookup reads 5
// bits, and the table of 32 holds the 16 values twice.
ET_INLINE __m512i spread(const uint8_t* packed) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    return _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
}

template <class T>
struct Products {  // T of 16 bits
    __m512i values;
    ET_MEMBER Products(const float* codes, float absmax) {
        values = round16(_mm512_mul_ps(_mm512_loadu_ps(codes), _mm512_set1_ps(absmax)), static_cast<const T*>(nullptr));
    }
    ET_MEMBER void expand32(const uint8_t* packed, T* out) const {
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(spread(packed), values));
    }
};

template <>
struct Products<float> {
    __m512 values;
    ET_MEMBER Products(const float* codes, float absmax) {
        values = _mm512_mul_ps(_mm512_loadu_ps(codes), _mm512_set1_ps(absmax));
    }
    ET_MEMBER void expand32(const uint8_t* packed, float* out) const {
        for (int i = 0; i < 2; i++) {
            // 8 bytes -> 16 lanes: each byte twice, shifted right by 4 in the even lane; the lookup reads 4 bits
            __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8 * i));
            __m512i lanes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes));
            _mm512_storeu_ps(out + 16 * i, _mm512_permutexvar_ps(lanes, values));
        }
    }
};

#elif defined(ET_USE_AVX2) || defined(ET_USE_NEON)

// pshufb and tbl look 16 bytes up among 16 bytes. A 16-bit value takes two lookups, one for each of its bytes (a "plane"), and
// an fp32 value four; the planes are then interleaved.
#if defined(ET_USE_AVX2)
typedef __m128i Bytes;
ET_INLINE Bytes load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
ET_INLINE void store_bytes(void* p, Bytes v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
ET_INLINE Bytes low_nibbles(Bytes v) { return _mm_and_si128(v, _mm_set1_epi8(15)); }
ET_INLINE Bytes high_nibbles(Bytes v) { return _mm_and_si128(_mm_srli_epi16(v, 4), _mm_set1_epi8(15)); }
ET_INLINE Bytes lookup(Bytes table, Bytes index) { return _mm_shuffle_epi8(table, index); }
ET_INLINE Bytes zip_low(Bytes a, Bytes b) { return _mm_unpacklo_epi8(a, b); }
ET_INLINE Bytes zip_high(Bytes a, Bytes b) { return _mm_unpackhi_epi8(a, b); }
ET_INLINE Bytes zip_low_pairs(Bytes a, Bytes b) { return _mm_unpacklo_epi16(a, b); }
ET_INLINE Bytes zip_high_pairs(Bytes a, Bytes b) { return _mm_unpackhi_epi16(a, b); }
#else
typedef uint8x16_t Bytes;
ET_INLINE Bytes load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
ET_INLINE void store_bytes(void* p, Bytes v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
ET_INLINE Bytes low_nibbles(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
ET_INLINE Bytes high_nibbles(Bytes v) { return vshrq_n_u8(v, 4); }
ET_INLINE Bytes lookup(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
ET_INLINE Bytes zip_low(Bytes a, Bytes b) { return vzip1q_u8(a, b); }
ET_INLINE Bytes zip_high(Bytes a, Bytes b) { return vzip2q_u8(a, b); }
ET_INLINE Bytes zip_low_pairs(Bytes a, Bytes b) {
    return vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
ET_INLINE Bytes zip_high_pairs(Bytes a, Bytes b) {
    return vreinterpretq_u8_u16(vzip2q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
#endif

ET_INLINE void write_planes(const Bytes* planes, Bytes index, Bf16* out) {
    Bytes low = lookup(planes[0], index), high = lookup(planes[1], index);
    store_bytes(out, zip_low(low, high));
    store_bytes(out + 8, zip_high(low, high));
}
ET_INLINE void write_planes(const Bytes* planes, Bytes index, F16* out) {
    write_planes(planes, index, reinterpret_cast<Bf16*>(out));
}
ET_INLINE void write_planes(const Bytes* planes, Bytes index, int16_t* out) {
    write_planes(planes, index, reinterpret_cast<Bf16*>(out));
}
ET_INLINE void write_planes(const Bytes* planes, Bytes index, int8_t* out) { store_bytes(out, lookup(planes[0], index)); }
ET_INLINE void write_planes(const Bytes* planes, Bytes index, float* out) {
    Bytes a = lookup(planes[0], index), b = lookup(planes[1], index);
    Bytes c = lookup(planes[2], index), d = lookup(planes[3], index);
    Bytes low = zip_low(a, b), high = zip_low(c, d);
    store_bytes(out, zip_low_pairs(low, high));
    store_bytes(out + 4, zip_high_pairs(low, high));
    low = zip_high(a, b), high = zip_high(c, d);
    store_bytes(out + 8, zip_low_pairs(low, high));
    store_bytes(out + 12, zip_high_pairs(low, high));
}

template <class T>
struct Products {
    Bytes planes[sizeof(T)];
    ET_MEMBER Products(const float* codes, float absmax) {
        T values[16];
        uint8_t bytes[sizeof(T)][16];
        ET_SIMD
        for (int i = 0; i < 16; i++) store(values + i, codes[i] * absmax);
        for (size_t plane = 0; plane < sizeof(T); plane++) {
            for (int i = 0; i < 16; i++) bytes[plane][i] = reinterpret_cast<const uint8_t*>(values)[sizeof(T) * i + plane];
            planes[plane] = load_bytes(bytes[plane]);
        }
    }
    ET_MEMBER void expand32(const uint8_t* packed, T* out) const {
        Bytes both = load_bytes(packed), high = high_nibbles(both), low = low_nibbles(both);
        write_planes(planes, zip_low(high, low), out);
        write_planes(planes, zip_high(high, low), out + 16);
    }
};

#else

template <class T>
struct Products {
    T values[16];
    ET_MEMBER Products(const float* codes, float absmax) {
        for (int i = 0; i < 16; i++) store(values + i, codes[i] * absmax);
    }
    ET_MEMBER void expand32(const uint8_t* packed, T* out) const {
        for (int i = 0; i < 16; i++) {
            out[2 * i] = values[packed[i] >> 4];
            out[2 * i + 1] = values[packed[i] & 15];
        }
    }
};

#endif

// Dequantise weights [begin, end) of one block one by one: the ends that expand32 does not reach. packed: of the whole tensor;
// out (end - begin,).
template <class T>
void expand_some(const float* codes, float absmax, const uint8_t* packed, int64_t begin, int64_t end, T* out) {
    for (int64_t i = begin; i < end; i++) {
        int nibble = i & 1 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4;
        store(out + (i - begin), codes[nibble] * absmax);
    }
}

// Dequantise weights [begin, end) of the flattened tensor. packed: of the whole tensor; codes (16,); out (end - begin,).
template <class T>
void dequantize_range(const uint8_t* packed, const float* codes, Absmax absmax, int64_t block_size, int64_t begin, int64_t end,
                      T* out) {
    int64_t block = begin / block_size;
    for (int64_t i = begin; i < end; block++) {
        int64_t stop = (block + 1) * block_size;
        if (stop > end) stop = end;
        float scale = absmax.at(block);
        if (!(i & 1) && stop - i >= 32) {
            Products<T> products(codes, scale);
            for (; stop - i >= 32; i += 32) products.expand32(packed + (i >> 1), out + (i - begin));
        }
        expand_some(codes, scale, packed, i, stop, out + (i - begin));
        i = stop;
    }
}

// packed (ceil(count / 2),), codes (16,) -> out (count,). Threads share whole blocks.
template <class T>
void dequantize(const uint8_t* packed, const float* codes, Absmax absmax, int64_t block_size, int64_t count, T* out,
                int threads) {
    int64_t grain = block_size < DEQUANT_GRAIN ? DEQUANT_GRAIN / block_size * block_size : block_size;
    parallel_for(threads, count, grain, [=](int64_t begin, int64_t end) {
        dequantize_range(packed, codes, absmax, block_size, begin, end, out + begin);
    });
}

// Kernels: packed (ceil(count / 2),), codes (16,), and a structures.h Absmax as separate arguments -> out (count,). plain, or
// else absmax_codes, absmax_table and nested, is null.
#define ET_DEQUANTIZE(name, T)                                                                                                \
    void name(const uint8_t* packed, const float* codes, const float* plain, const uint8_t* absmax_codes,                     \
              const float* absmax_table, const float* nested, float offset, int64_t shift, int64_t block_size, int64_t count, \
              T* out, int threads) {                                                                                          \
        Absmax absmax = {plain, absmax_codes, absmax_table, nested, offset, shift};                                           \
        dequantize(packed, codes, absmax, block_size, count, out, threads);                                                   \
    }
ET_DEQUANTIZE(dequantize_bf16, Bf16)
ET_DEQUANTIZE(dequantize_f16, F16)
ET_DEQUANTIZE(dequantize_f32, float)

#define ET_DEQUANT_KERNELS(X) X(dequantize_bf16) X(dequantize_f16) X(dequantize_f32)
