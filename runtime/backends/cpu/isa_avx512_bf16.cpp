// AVX-512 with BF16, VNNI and VBMI: AMD Zen 4 and later, Intel Sapphire Rapids and later.
#define ET_ISA avx512_bf16
#define ET_USE_AVX2 1
#define ET_USE_AVX512 1
#define ET_USE_AVX512_BF16 1
#include "kernels.inl"
