// AVX-512 F, BW, VL and DQ: its first generation, Intel Skylake servers.
#define ET_ISA avx512
#define ET_USE_AVX2 1
#define ET_USE_AVX512 1
#include "kernels.inl"
