// Every number that decides something in the kernels: what it is, its unit, and where it comes from. Numbers that follow from
// a format or an instruction (tile sizes, shuffle tables) stand where they are used.
//
// LOG.md is tests/benchmarks/LOG.md.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace {

// ---- memory ----

// Bytes in a cache line, in an AVX-512 register and in a row of an AMX tile. All scratch starts at a multiple of it; the
// Python side aligns what it hands over (decode.py, attention.py).
constexpr int64_t ALIGNMENT = 64;

// Bytes that decoding prefetches ahead in each of the streams it reads. Chosen by hand.
constexpr int64_t PREFETCH_BYTES = 2048;

// ---- how work is shared among threads ----

// A thread's share begins at a multiple of its grain.
constexpr int64_t ROW_GRAIN = 4;         // rows of a norm or a rotation; chosen by hand
constexpr int64_t DEQUANT_GRAIN = 4096;  // weights to dequantise, rounded down to whole blocks; chosen by hand
constexpr int64_t RANK_GRAIN = 4;        // rows of lora_A: decoding multiplies four rows together (matvec.inl, dense_range)

// Parts into which an elementwise job is cut for each thread, so that one that loses its processor keeps an eighth of its work
// from the others. Chosen by hand.
constexpr int64_t PIECES_PER_THREAD = 8;

// Multiplications in a piece of a large product (project.inl), a millisecond's work of one core: 128 columns of 512 rows of 2048
// with vector instructions, twice as many with AMX, which is ten times as fast but reads the rows from a slower cache for every
// piece. Chosen by hand.
#if defined(ET_USE_AMX)
constexpr int64_t PIECE_PRODUCTS = int64_t(1) << 28;
#else
constexpr int64_t PIECE_PRODUCTS = int64_t(1) << 27;
#endif

// Polls of a thread that waits (team.cpp) before it blocks: some ten microseconds, which is longer than threads differ by when
// each has a processor of its own.
constexpr int POLLS = 1000;

// Bytes of stack for a thread of the team. Kernels keep a few squares of 32 x 32 numbers there. Chosen by hand.
constexpr size_t THREAD_STACK_BYTES = 2 << 20;

// ---- bit patterns of fp32 and bf16 ----

constexpr uint32_t MAGNITUDE_BITS = 0x7fffffff;  // everything but the sign
constexpr uint32_t INFINITY_BITS = 0x7f800000;   // larger magnitudes are NaN
constexpr uint32_t MINUS_INFINITY_BITS = 0xff800000;
constexpr uint16_t BF16_NAN = 0x7fc0;  // the NaN that torch writes

// 1.5 * 2^23. Adding it to a small number rounds that to the nearest integer, ties to even, and leaves the integer in the low
// bits of the sum: between 2^23 and 2^24 an fp32 has no fraction.
constexpr float ROUNDING_SHIFT = 12582912.0f;

// ---- NF4 and adapters ----

constexpr int64_t QUANT_BLOCK = 64;      // weights that share one absmax where decoding has a fused product (forms.inl)
constexpr int64_t ABSMAX_GROUP = 16;     // blocks whose absmax is expanded together: one AVX-512 register of fp32
constexpr int64_t CROSSING_PIECE = 512;  // weights expanded to the stack at once where blocks cross rows; chosen by hand

// Tokens that one product of decoding takes at most; decode.py's MAX_TOKENS. Chosen by hand.
constexpr int MAX_TOKENS = 8;

// Rows of lora_B that lie together, and the grain in which threads share rows of a product; decode.py lays lora_B out with the
// same number. Chosen by hand.
constexpr int64_t LORA_PANEL = 32;

// Keys or values that decoding brings to fp32 at a time; a multiple of every LANES. Chosen by hand.
constexpr int64_t DECODE_TILE = 16;

// ---- 8-bit integers ----

constexpr float INT8_LARGEST = 127.0f;  // codes run from -127 to 127: symmetric, so that a sign can be moved between factors

// The NF4 table's largest value as an 8-bit integer. Not 127: at 124.1 NF4's values fall nearest to integers, and the error of
// the rounded table over normally distributed weights is 4.7e-3 instead of 5.9e-3.
constexpr float NF4_INT8_SCALE = 124.1f;

// Largest relative error (root mean square) that rounding x to 8 bits may cause; above it the product is computed in bf16.
// LOG.md, "8-bit products on real outliers".
constexpr float INT8_ERROR_LIMIT = 0.03f;

// Smallest numbers that are divided by, so that a row or block of (almost) zeros gives zeros and never inf or NaN.
constexpr float SMALLEST_ROW_SCALE = 1e-38f;      // of a dense row in 8 bits; runtime/int8.py clamps at the same number
constexpr float SMALLEST_ACTIVATION = 1e-30f;     // the largest magnitude of a block of decoding's activations
constexpr float SMALLEST_PRODUCT_SCALE = 1e-37f;  // of a row of x or dy in project.inl; 1 / it is still finite

// ---- products of many rows (gemm.inl, project.inl) ----

constexpr int64_t STRIP_BYTES = 16384;  // of a strip: two strips, a panel and its sums fit AMX's first cache of 48 KB
constexpr int64_t SUM_COLUMNS = 512;  // with SUM_ROWS: fp32 sums kept at a time, 1 MiB: they fit the second cache
constexpr int64_t SUM_ROWS = 512;     // also the rows of x that are packed at a time
constexpr int64_t CHUNK = 64;         // weights dequantised at once: one row of a square, and never of two blocks

// ---- attention ----

// Chosen by hand: squares of 32 keys that the forward and the backward take at a time, squares of 32 columns whose packed form
// the backward keeps at hand, and the number of tasks up to which the backward splits groups of heads.
constexpr int64_t KEY_SQUARES = 4;
constexpr int64_t BACK_KEY_SQUARES = 4;
constexpr int64_t BACK_COLUMN_SQUARES = 4;
constexpr int64_t BACK_TASKS = 16;

constexpr float HIDDEN_SCORE = -3e38f;   // the score of a key that a query may not see: about the lowest fp32
constexpr float NO_MAXIMUM = -1e30f;     // a query's running maximum before it has seen a key; far above HIDDEN_SCORE
constexpr float NO_PROBABILITY = 1e30f;  // log-sum-exp of a column past the end: 2^(score - it) is 0

// Powers of two by which a score may rise above the running maximum before sums are rescaled. 2^8 is no danger to fp32,
// and most rescaling never happens.
constexpr float MAXIMUM_SLACK = 8.0f;

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

}  // namespace
