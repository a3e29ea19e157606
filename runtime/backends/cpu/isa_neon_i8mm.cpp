// NEON with bf16 and int8 dot products and matrix products: Apple M2 and later, Graviton 3 and later.
#define ET_ISA neon_i8mm
#define ET_USE_NEON 1
#define ET_USE_NEON_I8MM 1
#include "kernels.inl"
