// NEON with products of bytes: Apple M1, Raspberry Pi 5, most phones and boards since 2018.
#define ET_ISA neon_dot
#define ET_USE_NEON 1
#define ET_USE_NEON_DOT 1
#include "kernels.inl"
