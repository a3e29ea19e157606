// AVX2 with products of bytes (AVX-VNNI): Intel laptops and desktops since 2021, AMD Zen 5 and later.
#define ET_ISA avx_vnni
#define ET_USE_AVX2 1
#define ET_USE_AVX_VNNI 1
#include "kernels.inl"
