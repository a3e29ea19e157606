// AVX2 with FMA and F16C: Intel since 2013, AMD since 2015.
#define ET_ISA avx2
#define ET_USE_AVX2 1
#include "kernels.inl"
