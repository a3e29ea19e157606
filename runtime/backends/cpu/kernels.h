// Declarations that every file of the library shares: element types, the thread team, and the table of kernels.
//
// From outside, the library is plain C (no Python.h, no C++ names): `et_kernel(isa, name)` returns a function pointer, and
// library.py calls it through ctypes. All other symbols are hidden.
//
// Each instruction set has one translation unit, isa_*.cpp, which includes kernels.inl and is compiled with its own flags. Two
// units must never share an inline function: the linker would keep one copy for all of them, perhaps the AVX-512 one, and an
// older CPU would crash. Hence the kernels use no STL, each unit's kernels sit in its own namespace, and everything in this
// header that has a body is in an anonymous namespace.
//
// To add a kernel: write `static void name(...)` in one of the .inl files, add `X(name)` to that file's ET_..._KERNELS list,
// and fetch it in Python with library.kernel(name, signature). When a kernel's arguments change, raise ET_ABI here and ABI in
// library.py. To add a CPU: see dispatch.cpp.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "constants.h"

#define ET_ABI 7

#if defined(_MSC_VER)
#define ET_EXPORT extern "C" __declspec(dllexport)
#define ET_SIMD __pragma(loop(ivdep))
#define ET_SIMD_SUM(...)
#define ET_INLINE static __forceinline
#define ET_MEMBER __forceinline
#else
#define ET_EXPORT extern "C" __attribute__((visibility("default")))
#define ET_PRAGMA(text) _Pragma(#text)
#define ET_SIMD ET_PRAGMA(omp simd)                                      // iterations are independent: vectorise
#define ET_SIMD_SUM(...) ET_PRAGMA(omp simd reduction(+ : __VA_ARGS__))  // and these sums may be reordered
#define ET_INLINE static inline __attribute__((always_inline))
#define ET_MEMBER inline __attribute__((always_inline))
#endif

namespace edgetune {

struct Kernel {
    const char* name;
    void (*function)();
};

struct Isa {
    const char* name;
    bool (*supported)();    // by this CPU and its operating system
    const Kernel* kernels;  // ends with a null name
};

// Run task(argument, index, count) for every index < count, on `threads` threads of the OpenMP runtime that torch uses. count
// is how many threads the runtime grants, perhaps fewer than `threads`. Tasks may wait for each other at barrier(). With one
// thread this is a plain call.
typedef void (*Task)(void* argument, int index, int count);
void parallel(int threads, Task task, void* argument);
void barrier();

// A barrier that yields its processor when the other threads keep it waiting, for tasks that meet about a hundred times within
// milliseconds. OpenMP's own barrier keeps spinning, so on a busy machine threads would wait for each other more than they
// work.
struct Meeting {
    int arrived, round;  // both start at 0
};
void meet(Meeting* meeting, int count);

}  // namespace edgetune

namespace {

struct Range {
    int64_t begin, end;
};

// Return the index-th of `count` contiguous shares of n items, cut at multiples of `grain`.
inline Range share(int64_t n, int64_t grain, int index, int count) {
    int64_t pieces = (n + grain - 1) / grain;
    int64_t begin = pieces * index / count * grain, end = pieces * (index + 1) / count * grain;
    return {begin < n ? begin : n, end < n ? end : n};
}

template <class Body>
struct Shares {
    int64_t n, grain;
    const Body* body;
};

template <class Body>
void run_share(void* argument, int index, int count) {
    const Shares<Body>* shares = static_cast<const Shares<Body>*>(argument);
    Range range = share(shares->n, shares->grain, index, count);
    if (range.begin < range.end) (*shares->body)(range.begin, range.end);
}

// Call body(begin, end) on each thread for one contiguous share of [0, n), cut at multiples of `grain`.
template <class Body>
void parallel_for(int threads, int64_t n, int64_t grain, const Body& body) {
    if (threads <= 1 || n <= grain) {
        if (n > 0) body(int64_t(0), n);
        return;
    }
    int64_t pieces = (n + grain - 1) / grain;
    Shares<Body> shares = {n, grain, &body};
    edgetune::parallel(pieces < threads ? int(pieces) : threads, run_share<Body>, &shares);
}

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

}  // namespace
