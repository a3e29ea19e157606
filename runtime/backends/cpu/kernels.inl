// Compiles all kernels for one instruction set: isa_*.cpp defines ET_ISA (the namespace) and the ET_USE_... macros, and
// includes this file with compiler flags of its own.
#include "structures.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(ET_USE_NEON)
#include <arm_neon.h>
#endif

namespace edgetune {
namespace ET_ISA {
namespace {
#include "numbers.inl"
#include "lanes.inl"

#include "attention.inl"
#include "dequant.inl"
#if defined(ET_USE_AVX2) || defined(ET_USE_NEON)
#include "gemm.inl"
#include "project.inl"
#else
#define ET_PROJECT_KERNELS(X)
#endif
#if !defined(ET_USE_AMX)
#include "elementwise.inl"
#include "matvec.inl"
#include "decode.inl"
#endif
}  // namespace

#if defined(ET_USE_AMX)  // AMX only multiplies matrices: for all other kernels et_kernel falls back to avx512_bf16's
#define ET_KERNELS(X) ET_ATTENTION_KERNELS(X) ET_PROJECT_KERNELS(X)
#else
#define ET_KERNELS(X) \
    ET_ATTENTION_KERNELS(X) ET_PROJECT_KERNELS(X) ET_DEQUANT_KERNELS(X) ET_ELEMENTWISE_KERNELS(X) ET_MATVEC_KERNELS(X) \
    ET_DECODE_KERNELS(X)
#endif
#define X(kernel) {#kernel, reinterpret_cast<void (*)()>(&kernel)},
extern const Kernel table[];
const Kernel table[] = {ET_KERNELS(X){nullptr, nullptr}};
#undef X
}  // namespace ET_ISA
}  // namespace edgetune
