// A register of fp32 numbers in the compiler's own vector types: the same source serves every instruction set, and does not
// depend on what the auto-vectoriser makes of a loop. 16 lanes with AVX-512, 8 with AVX2, 4 with NEON and SSE, and 1 for
// compilers without vector types (MSVC).
//
// get and put move numbers between memory and registers and convert them to and from fp32; everything is computed in fp32.

#if defined(ET_USE_AVX512)
constexpr int LANES = 16;
#elif defined(ET_USE_AVX2)
constexpr int LANES = 8;
#elif defined(__GNUC__)
constexpr int LANES = 4;
#else
constexpr int LANES = 1;
#endif

#if defined(__GNUC__)
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Octets __attribute__((vector_size(LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
ET_INLINE Words widen(Halves x) { return __builtin_convertvector(x, Words); }
ET_INLINE Halves narrow(Words x) { return __builtin_convertvector(x, Halves); }
ET_INLINE Floats to_floats(Octets x) { return __builtin_convertvector(__builtin_convertvector(x, Ints), Floats); }
ET_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
ET_INLINE Octets to_octets(Floats x) { return __builtin_convertvector(__builtin_convertvector(x, Ints), Octets); }
ET_INLINE Shorts to_shorts(Floats x) { return __builtin_convertvector(__builtin_convertvector(x, Ints), Shorts); }
ET_INLINE Words as_words(Floats x) { return (Words)x; }
ET_INLINE Floats as_floats(Words x) { return (Floats)x; }
ET_INLINE Floats all(float x) { return x - Floats{}; }
ET_INLINE Words all(uint32_t x) { return x - Words{}; }
#else
typedef float Floats;
typedef uint32_t Words;
typedef uint16_t Halves;
typedef int8_t Octets;
typedef int16_t Shorts;
typedef int32_t Ints;
ET_INLINE Words widen(Halves x) { return x; }
ET_INLINE Halves narrow(Words x) { return Halves(x); }
ET_INLINE Floats to_floats(Octets x) { return x; }
ET_INLINE Floats to_floats(Ints x) { return Floats(x); }
ET_INLINE Octets to_octets(Floats x) { return Octets(x); }
ET_INLINE Shorts to_shorts(Floats x) { return Shorts(x); }
ET_INLINE Words as_words(Floats x) { return to_bits(x); }
ET_INLINE Floats as_floats(Words x) { return from_bits(x); }
ET_INLINE Floats all(float x) { return x; }
ET_INLINE Words all(uint32_t x) { return x; }
#endif

template <class To, class From>
ET_INLINE To read_as(const From* p) {
    To value;
    memcpy(&value, p, sizeof value);
    return value;
}

ET_INLINE Floats get(const float* p) { return read_as<Floats>(p); }
ET_INLINE Floats get(const Bf16* p) { return as_floats(widen(read_as<Halves>(p)) << 16); }
ET_INLINE Floats get(const int8_t* p) {  // intrinsics: compilers turn the plain conversion into compares and shuffles
#if defined(ET_USE_AVX512)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(ET_USE_AVX2) && defined(__GNUC__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(ET_USE_NEON) && defined(__GNUC__)
    int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(read_as<uint32_t>(p))));  // the same four bytes in both halves
    return (Floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
#else
    return to_floats(read_as<Octets>(p));
#endif
}

ET_INLINE void put(float* p, Floats value) { memcpy(p, &value, sizeof value); }
ET_INLINE void put(int8_t* p, Floats value) {  // value: already rounded to integers
    Octets octets = to_octets(value);
    memcpy(p, &octets, sizeof octets);
}
ET_INLINE void put(int16_t* p, Floats value) {
    Shorts shorts = to_shorts(value);
    memcpy(p, &shorts, sizeof shorts);
}
ET_INLINE void put(Bf16* p, Floats value) {  // rounds to nearest, ties to even; a NaN stays a NaN
#if defined(ET_USE_AVX512_BF16) && defined(__GNUC__)
    __m256bh halves = _mm512_cvtneps_pbh((__m512)value);  // subnormals (below 1.2e-38) become 0 here, and only here
#else
    Words bits = as_words(value);
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Halves halves = narrow((bits & MAGNITUDE_BITS) > INFINITY_BITS ? all(uint32_t(BF16_NAN)) : rounded);
#endif
    memcpy(static_cast<void*>(p), &halves, sizeof halves);
}

// Return a * b + c, with one rounding on CPUs that have the instruction, and two on others.
ET_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(ET_USE_AVX512)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(ET_USE_AVX2) && defined(__GNUC__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(ET_USE_NEON) && defined(__GNUC__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

ET_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Return the sum of the lanes: halves are added to halves, so the order depends on LANES alone.
ET_INLINE float sum(Floats x) {
    float parts[LANES];
    put(parts, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}

ET_INLINE float largest(Floats x) {
    float most = from_bits(MINUS_INFINITY_BITS), parts[LANES];
    put(parts, x);
    for (float part : parts) most = part > most ? part : most;
    return most;
}

// ---- rows: all full registers of a row, then the rest ----

struct Full {};
struct Some {
    int64_t count;  // fewer than LANES
};

template <class T>
ET_INLINE Floats get(const T* p, Full, float = 0) {
    return get(p);
}
template <class T>
ET_INLINE Floats get(const T* p, Some some, float fill = 0) {  // `fill` in the lanes beyond the row
    float values[LANES];
    for (int64_t i = 0; i < LANES; i++) values[i] = i < some.count ? load(p + i) : fill;
    return get(values);
}
template <class T>
ET_INLINE void put(T* p, Floats value, Full) {
    put(p, value);
}
template <class T>
ET_INLINE void put(T* p, Floats value, Some some) {
    T values[LANES];
    put(values, value);
    memcpy(static_cast<void*>(p), values, size_t(some.count) * sizeof(T));
}

// Call body(i, part) for each register of a row of n numbers, i its first number. `part` is handed on to get and put: Full, or
// Some for the last few numbers, so that nothing outside the row is touched.
template <class Body>
ET_INLINE void each(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, Full());
    if (i < n) body(i, Some{n - i});
}

// Return e^x to about one unit in the last place; 0 below -87.3, e^88.37 (2.4e38) for everything above, NaN for NaN.
// x = n ln2 + r with |r| <= ln2/2; e^r by a polynomial (Cephes' expf), 2^n by adding n to the exponent.
ET_INLINE Floats exponential(Floats x) {
    const Floats shift = all(ROUNDING_SHIFT);
    Floats bounded = x > 88.37626f ? all(88.37626f) : x;
    Floats total = fused(bounded, all(1.44269504f), shift);
    Floats n = total - shift;
    Floats r = fused(n, all(-0.693359375f), bounded);
    r = fused(n, all(2.12194440e-4f), r);
    Floats p = fused(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = fused(p, r, all(8.3334519073e-3f));
    p = fused(p, r, all(4.1665795894e-2f));
    p = fused(p, r, all(1.6666665459e-1f));
    p = fused(p, r, all(5.0000001201e-1f));
    p = fused(p, r * r, r) + 1.0f;
    Floats y = as_floats(as_words(p) + (as_words(total) << 23));
    return x < -87.33654f ? all(0.0f) : y;
}

ET_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

template <class Word>
ET_INLINE Word hash32(Word x) {  // lowbias32 (Wellons 2018)
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}
