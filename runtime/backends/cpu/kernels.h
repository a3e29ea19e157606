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

// ---- the thread team (team.cpp) ----

// Call piece(argument, index, slot) for every index < pieces, each once, on whichever of at most `threads` threads is free, and
// return when all have returned. slot: the number of the thread, below `threads`, for scratch of its own. Indices are taken in
// rising order. A piece should take 0.1 to 1 millisecond, must not wait for another one, and must not depend on its slot.
typedef void (*Piece)(void* argument, int64_t index, int slot);
void share_out(int threads, int64_t pieces, Piece piece, void* argument);

// Run task(argument, index, count) for every index < count at the same time, so that tasks may wait for each other in meet().
// count: how many threads there are, at most `threads`. For work that is too short to be handed out in pieces.
typedef void (*Task)(void* argument, int index, int count);
void parallel(int threads, Task task, void* argument);

// A barrier for the tasks of `parallel`. It polls for some microseconds, then blocks (team.cpp tells why).
struct Meeting {
    int arrived, round, sleepers;  // all start at 0
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

// Call body(index, slot) for every index < pieces: share_out with any callable object.
template <class Body>
void for_pieces(int threads, int64_t pieces, const Body& body) {
    edgetune::share_out(
        threads, pieces,
        [](void* given, int64_t index, int slot) { (*static_cast<const Body*>(given))(index, slot); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Call body(begin, end) for contiguous parts of [0, n), cut at multiples of `grain`, on whichever thread is free.
template <class Body>
void parallel_for(int threads, int64_t n, int64_t grain, const Body& body) {
    if (threads <= 1 || n <= grain) {
        if (n > 0) body(int64_t(0), n);
        return;
    }
    const int64_t grains = (n + grain - 1) / grain, wanted = int64_t(threads) * PIECES_PER_THREAD;
    const int pieces = int(grains < wanted ? grains : wanted);
    for_pieces(threads, pieces, [&](int64_t index, int) {
        const Range range = share(n, grain, int(index), pieces);
        body(range.begin, range.end);
    });
}

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

}  // namespace
