// The inner products of decoding: blocks of 64 packed weights times activations, in registers. A "form" is one way to compute
// them; each instruction set has its own Bf16Form and Int8Form, or uses FloatForm for them. The loops around forms, and the
// choice of a form, are in matvec.inl.
//
// A form defines
//     BLOCKS     the blocks that one step takes
//     SCALED     true if activations have a scale for each block (int8), by which absmax is multiplied for every token
//     Table      the 16 values of the code table as the form looks them up
//     Weights    the weights of one step in registers
//     Sum        an accumulator
//     prepare(cols, x)                       convert the activations x.x, fp32 (cols,), to the form's own layout
//     load(table, packed, left, weights)     look up the packed bytes of a step, of which only `left` blocks may be read
//     dot(weights, x, block, scales, at, sum) return sum + scale * (weights . activations), for the blocks of a step: `block`
//                                            and on, whose scales are scales[at] and on
//     group(x, block, absmax, sum)           return sum corrected for ABSMAX_GROUP blocks (int8 with an unsigned table)
//     total(sum)                             return the sum of an accumulator's lanes
//
// Packed weights have two codes a byte, the first weight's in the high nibble. Lookups give all high nibbles (the even weights)
// and all low nibbles (the odd ones) in registers of their own, so activations are laid out as evens, then odds, once.

// One token's activations, as lay_out (matvec.inl) prepares them.
struct Activations {
    const float* x;     // (cols,)
    void* values;       // (cols,) of at most 4 bytes in the form's layout; padded to ABSMAX_GROUP blocks
    float* scale;       // int8: (blocks,), padded to ABSMAX_GROUP with 0
    float* correction;  // int8: (blocks,), padded likewise
};

#if defined(ET_USE_AVX2) && defined(__GNUC__)

// fp32: LANES packed bytes are LANES even weights and LANES odd ones, each looked up in a register. Activations: for each
// 2 LANES of them, the even ones, then the odd ones.
struct FloatForm {
    static constexpr int BLOCKS = 1, PARTS = QUANT_BLOCK / 2 / LANES;
    static constexpr bool SCALED = false;
    typedef Floats Sum;
#if defined(ET_USE_AVX512)
    struct Table {
        __m512 values;
        ET_MEMBER explicit Table(const float* codes) { values = _mm512_loadu_ps(codes); }
        ET_MEMBER void look_up(const uint8_t* packed, Floats& even, Floats& odd) const {  // the lookup reads 4 bits
            const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
            even = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), values);
            odd = (Floats)_mm512_permutexvar_ps(words, values);
        }
    };
#else
    struct Table {
        __m256 low, high;
        ET_MEMBER explicit Table(const float* codes) { low = _mm256_loadu_ps(codes), high = _mm256_loadu_ps(codes + 8); }
        // Look up the low 4 bits of `index`; `signs` has the highest of them in the highest bit. A lookup reads 3 bits.
        ET_MEMBER __m256 at(__m256i index, __m256i signs) const {
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                    _mm256_castsi256_ps(signs));
        }
        ET_MEMBER void look_up(const uint8_t* packed, Floats& even, Floats& odd) const {
            const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
            const __m256 a = at(_mm256_srli_epi32(words, 4), _mm256_slli_epi32(words, 24));
            const __m256 b = at(words, _mm256_slli_epi32(words, 28));
            memcpy(&even, &a, sizeof a), memcpy(&odd, &b, sizeof b);
        }
    };
#endif
    struct Weights {
        Floats even[PARTS], odd[PARTS];
    };

    static void prepare(int64_t cols, const Activations& x) {
        float* out = static_cast<float*>(x.values);
        for (int64_t i = 0; i + 2 * LANES <= cols; i += 2 * LANES)
            for (int64_t k = 0; k < LANES; k++) out[i + k] = x.x[i + 2 * k], out[i + LANES + k] = x.x[i + 2 * k + 1];
    }
    static ET_MEMBER Sum zero() { return Floats{}; }
    static ET_MEMBER float total(Sum all) { return sum(all); }
    static ET_MEMBER void load(const Table& table, const uint8_t* packed, int64_t, Weights& weights) {
        for (int i = 0; i < PARTS; i++) table.look_up(packed + i * LANES, weights.even[i], weights.odd[i]);
    }
    static ET_MEMBER Sum dot(const Weights& weights, const Activations& x, int64_t block, const float* scales, int64_t at,
                             Sum sum) {
        const float* values = static_cast<const float*>(x.values) + block * QUANT_BLOCK;
        Floats product = {};
        for (int i = 0; i < PARTS; i++) {
            product = fused(weights.even[i], get(values + 2 * i * LANES), product);
            product = fused(weights.odd[i], get(values + (2 * i + 1) * LANES), product);
        }
        return fused(product, all(scales[at]), sum);
    }
    static ET_MEMBER Sum group(const Activations&, int64_t, const float*, Sum sum) { return sum; }
};

#else

// fp32, for every other instruction set: 64 weights are expanded to the stack (dequant.inl) and multiplied in their own order.
struct FloatForm {
    static constexpr int BLOCKS = 1;
    static constexpr bool SCALED = false;
    typedef Floats Sum;
    struct Table : Products<float> {
        ET_MEMBER explicit Table(const float* codes) : Products<float>(codes, 1.0f) {}
    };
    struct Weights {
        alignas(64) float values[QUANT_BLOCK];
    };

    static void prepare(int64_t, const Activations&) {}
    static ET_MEMBER Sum zero() { return Floats{}; }
    static ET_MEMBER float total(Sum all) { return sum(all); }
    static ET_MEMBER void load(const Table& table, const uint8_t* packed, int64_t, Weights& weights) {
        table.expand32(packed, weights.values);
        table.expand32(packed + 16, weights.values + 32);
    }
    static ET_MEMBER Sum dot(const Weights& weights, const Activations& x, int64_t block, const float* scales, int64_t at,
                             Sum sum) {
        const float* values = x.x + block * QUANT_BLOCK;
        Floats product = {};
        for (int64_t i = 0; i < QUANT_BLOCK; i += LANES) product = fused(get(weights.values + i), get(values + i), product);
        return fused(product, all(scales[at]), sum);
    }
    static ET_MEMBER Sum group(const Activations&, int64_t, const float*, Sum sum) { return sum; }
};

#endif

#if defined(ET_USE_AVX512_BF16)

// bf16, one block a step. 32 packed bytes in 16-bit lanes are looked up among 32 values: the 16 twice, so that neither nibble
// needs a mask, as the lookup reads 5 bits. Activations of a block: 32 even ones, then 32 odd ones.
struct Bf16Form {
    static constexpr int BLOCKS = 1;
    static constexpr bool SCALED = false;
    typedef __m512 Sum;
    struct Table {
        __m512i values;
        ET_MEMBER explicit Table(const float* codes) {
            values = round16(_mm512_loadu_ps(codes), static_cast<const Bf16*>(nullptr));
        }
    };
    struct Weights {
        __m512bh even, odd;
    };

    static void prepare(int64_t cols, const Activations& x) {
        const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
        Bf16* out = static_cast<Bf16*>(x.values);
        for (int64_t i = 0; i < cols; i += QUANT_BLOCK) {
            __m512 a = _mm512_loadu_ps(x.x + i), b = _mm512_loadu_ps(x.x + i + 16);
            __m512 c = _mm512_loadu_ps(x.x + i + 32), d = _mm512_loadu_ps(x.x + i + 48);
            __m512bh even = _mm512_cvtne2ps_pbh(_mm512_permutex2var_ps(c, first, d), _mm512_permutex2var_ps(a, first, b));
            __m512bh odd = _mm512_cvtne2ps_pbh(_mm512_permutex2var_ps(c, second, d), _mm512_permutex2var_ps(a, second, b));
            _mm512_storeu_si512(out + i, (__m512i)even);
            _mm512_storeu_si512(out + i + 32, (__m512i)odd);
        }
    }
    static ET_MEMBER Sum zero() { return _mm512_setzero_ps(); }
    static ET_MEMBER float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
    static ET_MEMBER void load(const Table& table, const uint8_t* packed, int64_t, Weights& weights) {
        __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
        weights.even = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table.values);
        weights.odd = (__m512bh)_mm512_permutexvar_epi16(words, table.values);
    }
    static ET_MEMBER Sum dot(const Weights& weights, const Activations& x, int64_t block, const float* scales, int64_t at,
                             Sum sum) {
        const Bf16* values = static_cast<const Bf16*>(x.values) + block * QUANT_BLOCK;
        Sum product = _mm512_dpbf16_ps(zero(), weights.even, (__m512bh)_mm512_loadu_si512(values));
        product = _mm512_dpbf16_ps(product, weights.odd, (__m512bh)_mm512_loadu_si512(values + 32));
        return _mm512_fmadd_ps(product, _mm512_set1_ps(scales[at]), sum);
    }
    static ET_MEMBER Sum group(const Activations&, int64_t, const float*, Sum sum) { return sum; }
};

#endif

// ---- int8: weights are looked up as bytes, and activations are quantised, with a scale for each block of 64 ----

ET_INLINE int byte_of(float code) { return int(code * NF4_INT8_SCALE + (code < 0 ? -0.5f : 0.5f)); }

// x.x (cols,) -> x.values, bytes from -127 to 127, and x.scale: for each step of `step` blocks the even numbers, then the odd
// ones. x.correction becomes offset * scale * the sum of the block's bytes: what the product with a table whose bytes are
// -offset too high must be corrected by.
ET_INLINE void quantize_activations(int64_t cols, const Activations& x, int step, float offset) {
    const int64_t blocks = cols / QUANT_BLOCK, padded = (blocks + ABSMAX_GROUP - 1) / ABSMAX_GROUP * ABSMAX_GROUP;
    const float shift = ROUNDING_SHIFT;
    for (int64_t block = 0; block < padded; block++) {
        int8_t* even = static_cast<int8_t*>(x.values) + (block - block % step) * QUANT_BLOCK + block % step * 32;
        int8_t* odd = even + step * 32;
        x.scale[block] = x.correction[block] = 0;
        if (block >= blocks) {
            if (block % step) memset(even, 0, 32), memset(odd, 0, 32);
            continue;
        }
        const float* values = x.x + block * QUANT_BLOCK;
        Floats magnitudes = {};
        for (int64_t i = 0; i < QUANT_BLOCK; i += LANES)
            magnitudes = larger(magnitudes, as_floats(as_words(get(values + i)) & MAGNITUDE_BITS));
        const float top = largest(magnitudes);
        const float inverse = top > SMALLEST_ACTIVATION ? INT8_LARGEST / top : 0.0f;
        float sum = 0;
        ET_SIMD_SUM(sum)
        for (int i = 0; i < 32; i++) {
            float a = values[2 * i] * inverse + shift - shift, b = values[2 * i + 1] * inverse + shift - shift;
            even[i] = int8_t(a);
            odd[i] = int8_t(b);
            sum += a + b;
        }
        x.scale[block] = top / (INT8_LARGEST * NF4_INT8_SCALE);
        x.correction[block] = sum * x.scale[block] * offset;
    }
}

#if defined(ET_USE_AVX512_BF16)

// 64 packed bytes, two blocks a step. vpdpbusd (VNNI) multiplies unsigned by signed bytes and adds four neighbours to each
// 32-bit lane: the table's bytes are stored 128 too high, to be unsigned, and `group` takes 128 * the sum of activations back.
struct Int8Form {
    static constexpr int BLOCKS = 2;
    static constexpr bool SCALED = true;
    typedef __m512 Sum;
    struct Table {
        __m512i values;
        ET_MEMBER explicit Table(const float* codes) {
            uint8_t bytes[64];
            for (int i = 0; i < 64; i++) bytes[i] = uint8_t(byte_of(codes[i & 15]) + 128);
            values = _mm512_loadu_si512(bytes);
        }
    };
    struct Weights {
        __m512i even, odd;
    };

    static void prepare(int64_t cols, const Activations& x) { quantize_activations(cols, x, BLOCKS, -128.0f); }
    static ET_MEMBER Sum zero() { return _mm512_setzero_ps(); }
    static ET_MEMBER float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
    static ET_MEMBER void load(const Table& table, const uint8_t* packed, int64_t left, Weights& weights) {
        __m512i bytes = left > 1 ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi64(0x0f, packed);
        weights.even = _mm512_permutexvar_epi8(_mm512_srli_epi16(bytes, 4), table.values);  // the lookup reads 6 bits
        weights.odd = _mm512_permutexvar_epi8(bytes, table.values);
    }
    static ET_MEMBER Sum dot(const Weights& weights, const Activations& x, int64_t block, const float* scales, int64_t at,
                             Sum sum) {
        const int8_t* values = static_cast<const int8_t*>(x.values) + block * QUANT_BLOCK;
        __m512i product = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights.even, _mm512_loadu_si512(values));
        product = _mm512_dpbusd_epi32(product, weights.odd, _mm512_loadu_si512(values + 64));
        const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(at)));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_permutexvar_ps(places, _mm512_load_ps(scales)), sum);
    }
    static ET_MEMBER Sum group(const Activations& x, int64_t block, const float* absmax, Sum sum) {
        return _mm512_fmadd_ps(_mm512_load_ps(absmax), _mm512_loadu_ps(x.correction + block), sum);
    }
};

#elif defined(ET_USE_AVX2)

// 32 packed bytes, one block a step. maddubs multiplies unsigned by signed bytes: it gets |weight|, and the activation with the
// weight's sign.
struct Int8Form {
    static constexpr int BLOCKS = 1;
    static constexpr bool SCALED = true;
    typedef __m256 Sum;
    struct Table {
        __m256i values;
        ET_MEMBER explicit Table(const float* codes) {
            int8_t bytes[16];
            for (int i = 0; i < 16; i++) bytes[i] = int8_t(byte_of(codes[i]));
            values = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
        }
    };
    struct Weights {
        __m256i even, odd;
    };

    static void prepare(int64_t cols, const Activations& x) { quantize_activations(cols, x, BLOCKS, 0.0f); }
    static ET_MEMBER Sum zero() { return _mm256_setzero_ps(); }
    static ET_MEMBER float total(Sum sum) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static ET_MEMBER void load(const Table& table, const uint8_t* packed, int64_t, Weights& weights) {
        const __m256i nibble = _mm256_set1_epi8(15);
        __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
        weights.even = _mm256_shuffle_epi8(table.values, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
        weights.odd = _mm256_shuffle_epi8(table.values, _mm256_and_si256(bytes, nibble));
    }
    // Return 16-bit sums of two products: at most 2 * 127 * 124, which fits.
    static ET_MEMBER __m256i multiply(__m256i weights, const int8_t* values) {
        __m256i signed_values = _mm256_sign_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), weights);
        return _mm256_maddubs_epi16(_mm256_abs_epi8(weights), signed_values);
    }
    static ET_MEMBER Sum dot(const Weights& weights, const Activations& x, int64_t block, const float* scales, int64_t at,
                             Sum sum) {
        const int8_t* values = static_cast<const int8_t*>(x.values) + block * QUANT_BLOCK;
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i even = _mm256_madd_epi16(multiply(weights.even, values), ones);
        __m256i odd = _mm256_madd_epi16(multiply(weights.odd, values + 32), ones);
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(even, odd)), _mm256_set1_ps(scales[at]), sum);
    }
    static ET_MEMBER Sum group(const Activations&, int64_t, const float*, Sum sum) { return sum; }
};

#elif defined(ET_USE_NEON)

// 32 packed bytes, one block a step, with the dot-product instruction on CPUs that have it.
struct Int8Form {
    static constexpr int BLOCKS = 1;
    static constexpr bool SCALED = true;
    typedef float32x4_t Sum;
    struct Table {
        int8x16_t values;
        ET_MEMBER explicit Table(const float* codes) {
            int8_t bytes[16];
            for (int i = 0; i < 16; i++) bytes[i] = int8_t(byte_of(codes[i]));
            values = vld1q_s8(bytes);
        }
    };
    struct Weights {
        int8x16_t even[2], odd[2];
    };

    static void prepare(int64_t cols, const Activations& x) { quantize_activations(cols, x, BLOCKS, 0.0f); }
    static ET_MEMBER Sum zero() { return vdupq_n_f32(0); }
    static ET_MEMBER float total(Sum sum) { return vaddvq_f32(sum); }
    static ET_MEMBER void load(const Table& table, const uint8_t* packed, int64_t, Weights& weights) {
        for (int i = 0; i < 2; i++) {
            uint8x16_t bytes = vld1q_u8(packed + 16 * i);
            weights.even[i] = vqtbl1q_s8(table.values, vshrq_n_u8(bytes, 4));
            weights.odd[i] = vqtbl1q_s8(table.values, vandq_u8(bytes, vdupq_n_u8(15)));
        }
    }
    static ET_MEMBER int32x4_t multiply(int32x4_t sum, int8x16_t weights, const int8_t* values) {
        int8x16_t x = vld1q_s8(values);
#if defined(ET_USE_NEON_I8MM)
        return vdotq_s32(sum, weights, x);
#else
        sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(weights), vget_low_s8(x)));
        return vpadalq_s16(sum, vmull_s8(vget_high_s8(weights), vget_high_s8(x)));
#endif
    }
    static ET_MEMBER Sum dot(const Weights& weights, const Activations& x, int64_t block, const float* scales, int64_t at,
                             Sum sum) {
        const int8_t* values = static_cast<const int8_t*>(x.values) + block * QUANT_BLOCK;
        int32x4_t product = vdupq_n_s32(0);
        for (int i = 0; i < 2; i++) {
            product = multiply(product, weights.even[i], values + 16 * i);
            product = multiply(product, weights.odd[i], values + 32 + 16 * i);
        }
        return vfmaq_n_f32(sum, vcvtq_f32_s32(product), scales[at]);
    }
    static ET_MEMBER Sum group(const Activations&, int64_t, const float*, Sum sum) { return sum; }
};

#else
typedef FloatForm Int8Form;
#endif

#if !defined(ET_USE_AVX512_BF16)
typedef FloatForm Bf16Form;
#endif
