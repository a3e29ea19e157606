// AMX with bf16 and int8: Intel Sapphire Rapids and later. It multiplies matrices and nothing else, so only attention and the
// products of many rows are compiled for it.
#define ET_ISA amx
#define ET_USE_AVX2 1
#define ET_USE_AVX512 1
#define ET_USE_AVX512_BF16 1
#define ET_USE_AMX 1
#include "kernels.inl"
