// The library's C interface: the instruction sets that this build holds and this machine runs, their kernels, and the layout of
// the structs.
//
// Adding a CPU (an instruction set `xyz`) touches these places and no others:
//   1. build.py: its flags for gcc and clang, and for MSVC, in the table X86 or ARM. The key is the name, `xyz`. Another
//      architecture needs another table, and a line in machine_isas.
//   2. isa_xyz.cpp: new; one line on the machines that have it, ET_ISA, the ET_USE_... macros it implies, and kernels.inl.
//   3. dispatch.cpp (here): has_xyz(), which asks the CPU and whether the operating system saves its registers; the
//      declaration of xyz::table; and a row of `isas` inside #ifndef ET_NO_XYZ (build.py defines that where the compiler is too
//      old). The rows are in order of preference: a kernel that xyz lacks is looked for in the rows below.
//   4. lanes.inl: LANES, and get, put and fused if the compiler's vector types do not do (ET_USE_XYZ). All kernels work then.
//   5. What it does better than the plain code, as an #if defined(ET_USE_XYZ) branch: numbers.inl (fma), dequant.inl (table
//      lookup), forms.inl (products of decoding), attention_tiles.inl and attention_softmax.inl (tile products, 2^x), and
//      gemm.inl (which integers).
//      kernels.inl includes its intrinsics' header, and chooses the kernels if, like AMX, it has only some.
//   6. tests: the list of instruction sets of test_attention_kernels.py's `isa` fixture (the other tests ask library.isas()).
//      If no machine at hand can run it: tests/test_neon.py and tests/neon show how to test it under an emulator.
//   7. docs/platforms.md: its table of machines.
// Python needs no change: library.py asks et_isa_name, and EDGETUNE_CPU_ISA=xyz forces it.
#include "structures.h"

#if defined(__x86_64__) || defined(_M_X64)
#define ET_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define ET_ARM 1
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace edgetune {

// ---- instruction sets of this CPU and its operating system ----

#ifdef ET_X86
static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4]) {
#if defined(_MSC_VER)
    int registers[4];
    __cpuidex(registers, int(leaf), int(subleaf));
    for (int i = 0; i < 4; i++) out[i] = uint32_t(registers[i]);
#else
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
#endif
}

static bool bits(uint32_t word, uint32_t mask) { return (word & mask) == mask; }

// Return XCR0: the registers that the operating system saves when it switches threads. A CPU may have wide registers that an
// old kernel does not save.
static uint64_t saved_registers() {
    uint32_t r[4];
    cpuid(1, 0, r);
    if (!bits(r[2], 1u << 27)) return 0;  // OSXSAVE
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t(high) << 32) | low;
#endif
}

// Return register `which` (0 EAX to 3 EDX) of CPUID leaf 7, or 0 if this CPU has no such leaf.
static uint32_t leaf7(int subleaf, int which) {
    uint32_t r[4];
    cpuid(0, 0, r);
    if (r[0] < 7) return 0;
    cpuid(7, 0, r);
    if (subleaf > 0 && r[0] < uint32_t(subleaf)) return 0;
    if (subleaf > 0) cpuid(7, uint32_t(subleaf), r);
    return r[which];
}

static bool has_avx2() {
    uint32_t r[4];
    cpuid(1, 0, r);
    uint32_t wanted = (1u << 12) | (1u << 28) | (1u << 29);  // FMA, AVX, F16C
    return bits(r[2], wanted) && (saved_registers() & 0x6) == 0x6 && bits(leaf7(0, 1), 1u << 5);
}
static bool has_avx_vnni() { return has_avx2() && bits(leaf7(1, 0), 1u << 4); }
static bool has_avx512() {
    uint32_t wanted = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
    return has_avx2() && (saved_registers() & 0xe6) == 0xe6 && bits(leaf7(0, 1), wanted);
}
static bool has_avx512_bf16() {
    uint32_t wanted = (1u << 1) | (1u << 11);  // VBMI, VNNI
    return has_avx512() && bits(leaf7(0, 2), wanted) && bits(leaf7(1, 0), 1u << 5);
}

// Linux grants AMX only on request, once for the process, since tiles make a thread's saved state 8 KiB larger.
static bool has_amx() {
    uint32_t wanted = (1u << 22) | (1u << 24) | (1u << 25);  // AMX-BF16, AMX-TILE, AMX-INT8
    if (!has_avx512_bf16() || (saved_registers() & 0x60000) != 0x60000 || !bits(leaf7(0, 3), wanted)) return false;
#if defined(__linux__)
    const int request_permission = 0x1023, tile_data = 18;
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
#else
    return false;
#endif
}
#endif

#ifdef ET_ARM
static bool has_neon() { return true; }  // part of the 64-bit architecture
static bool has_neon_dot() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    return true;  // every Mac with an ARM CPU
#else
    return false;
#endif
}
static bool has_neon_i8mm() {
#if defined(__linux__)
    unsigned long wanted = (1ul << 13) | (1ul << 14);  // HWCAP2_I8MM, HWCAP2_BF16
    return (getauxval(AT_HWCAP2) & wanted) == wanted;
#elif defined(__APPLE__)
    int i8mm = 0, bf16 = 0;
    size_t size = sizeof(int);
    sysctlbyname("hw.optional.arm.FEAT_I8MM", &i8mm, &size, nullptr, 0);
    size = sizeof(int);
    sysctlbyname("hw.optional.arm.FEAT_BF16", &bf16, &size, nullptr, 0);
    return i8mm && bf16;
#else
    return false;
#endif
}
#endif

static bool always() { return true; }

namespace scalar { extern const Kernel table[]; }
#ifdef ET_X86
namespace avx2 { extern const Kernel table[]; }
namespace avx_vnni { extern const Kernel table[]; }
namespace avx512 { extern const Kernel table[]; }
namespace avx512_bf16 { extern const Kernel table[]; }
namespace amx { extern const Kernel table[]; }
#endif
#ifdef ET_ARM
namespace neon { extern const Kernel table[]; }
namespace neon_dot { extern const Kernel table[]; }
namespace neon_i8mm { extern const Kernel table[]; }
#endif

// In order of preference, best first. build.py defines ET_NO_... for what the compiler could not compile.
static const Isa isas[] = {
#ifdef ET_X86
#ifndef ET_NO_AMX
    {"amx", has_amx, amx::table},
#endif
#ifndef ET_NO_AVX512_BF16
    {"avx512_bf16", has_avx512_bf16, avx512_bf16::table},
#endif
#ifndef ET_NO_AVX512
    {"avx512", has_avx512, avx512::table},
#endif
#ifndef ET_NO_AVX_VNNI
    {"avx_vnni", has_avx_vnni, avx_vnni::table},
#endif
#ifndef ET_NO_AVX2
    {"avx2", has_avx2, avx2::table},
#endif
#endif
#ifdef ET_ARM
#ifndef ET_NO_NEON_I8MM
    {"neon_i8mm", has_neon_i8mm, neon_i8mm::table},
#endif
#ifndef ET_NO_NEON_DOT
    {"neon_dot", has_neon_dot, neon_dot::table},
#endif
#ifndef ET_NO_NEON
    {"neon", has_neon, neon::table},
#endif
#endif
    {"scalar", always, scalar::table},
};

}  // namespace edgetune

using namespace edgetune;

#include "layout.inl"

// Return the version that library.py compares with its own.
ET_EXPORT int et_abi() { return ET_ABI; }

// Write the index-th entry of layout.inl's list through the four pointers and return 1; return 0 past the last.
ET_EXPORT int et_layout(int index, const char** structure, const char** field, int64_t* offset, int64_t* size) {
    if (index < 0 || index >= int(sizeof layout / sizeof layout[0])) return 0;
    const LayoutEntry& entry = layout[index];
    *structure = entry.structure, *field = entry.field, *offset = entry.offset, *size = entry.size;
    return 1;
}

// Return the name of the index-th instruction set of this build, best first; null past the last.
ET_EXPORT const char* et_isa_name(int index) {
    return index >= 0 && index < int(sizeof isas / sizeof isas[0]) ? isas[index].name : nullptr;
}

ET_EXPORT int et_isa_supported(int index) { return et_isa_name(index) && isas[index].supported(); }

// Return the kernel of this name for the index-th instruction set or, if it lacks it, for the next best that has it and that
// this machine runs; null if there is none.
ET_EXPORT void* et_kernel(int index, const char* name) {
    if (!et_isa_supported(index)) return nullptr;
    for (; et_isa_name(index); index++) {
        if (!isas[index].supported()) continue;
        for (const Kernel* kernel = isas[index].kernels; kernel->name; kernel++)
            if (!strcmp(kernel->name, name)) return reinterpret_cast<void*>(kernel->function);
    }
    return nullptr;
}
