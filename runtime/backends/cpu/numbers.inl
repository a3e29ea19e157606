// Conversions of single numbers between bf16, fp16, int8 and fp32, and a fused multiply-add. Compilers vectorise them in loops.

ET_INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

ET_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

ET_INLINE float load(const float* p) { return *p; }
ET_INLINE float load(const int8_t* p) { return *p; }
ET_INLINE float load(const Bf16* p) { return from_bits(uint32_t(p->bits) << 16); }

ET_INLINE void store(float* p, float value) { *p = value; }

// Integers of small magnitude: to nearest, ties to even.
ET_INLINE float nearest(float value) { return (value + ROUNDING_SHIFT) - ROUNDING_SHIFT; }
ET_INLINE void store(int8_t* p, float value) { *p = int8_t(nearest(value)); }
ET_INLINE void store(int16_t* p, float value) { *p = int16_t(nearest(value)); }

// Rounds to nearest, ties to even: half a unit is added, or a little less where the last bit is even. A NaN stays a NaN.
ET_INLINE void store(Bf16* p, float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    p->bits = uint16_t((bits & MAGNITUDE_BITS) > INFINITY_BITS ? BF16_NAN : rounded);
}

// Rounds to nearest, ties to even. Below 2^-14 (subnormals) the step of fp16 is 2^-24, which is fp32's step at 0.5: adding 0.5
// rounds to it. Elsewhere the exponent's bias changes from 127 to 15.
ET_INLINE void store(F16* p, float value) {
    uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & MAGNITUDE_BITS;
    uint32_t half;
    if (magnitude > INFINITY_BITS) half = 0x7e00;
    else if (magnitude >= 0x47800000) half = 0x7c00;                                            // 65536 and larger: infinity
    else if (magnitude < 0x38800000) half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;  // below 2^-14
    else half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    p->bits = uint16_t(sign | half);
}

// Return a * b + c, with one rounding on CPUs that have the instruction. The library is compiled with -ffp-contract=off, so the
// compiler fuses nothing else.
ET_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

ET_INLINE float square_root(float x) {
#if defined(_MSC_VER)
    return float(sqrt(double(x)));
#else
    return __builtin_sqrtf(x);
#endif
}
