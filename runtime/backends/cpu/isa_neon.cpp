// NEON: every 64-bit ARM.
#define ET_ISA neon
#define ET_USE_NEON 1
#include "kernels.inl"
