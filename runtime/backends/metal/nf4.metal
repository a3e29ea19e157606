// NF4, and every other 16-value code of nf4.py, on Apple GPUs. nf4.py specifies the arithmetic. contract.py records the
// arguments of each kernel, and a test compares that record with this source.
//
// library.py compiles this file once for each VALUE (float, half, bfloat: the dense dtype), with two lines before it:
//     #define VALUE float
//     #define FEW_ROWS 8
// Integers are `long`, because torch binds a Python int as one.

#include <metal_stdlib>
using namespace metal;

// The specification rounds every operation: absmax = table * nested + offset must not become one fused operation.
#pragma METAL fp contract(off)

constant constexpr uint LANES = 32;
// Weights that a thread decodes at a time. 8 divides every block size, so that they share one absmax, and is even, so that no
// two threads share a byte.
constant constexpr uint SPAN = 8;

// The absmax of each block in fp32.
struct Scales {
  device const float* absmax;
  float of(uint block) const { return absmax[block]; }
};

// The absmax of each block after double quantisation: an 8-bit code each, and one fp32 absmax for `nested_size` codes.
struct NestedScales {
  device const uchar* codes;
  device const float* values;  // (256,): the value of each code
  device const float* absmax;
  float offset;
  uint nested_size;
  float of(uint block) const {
    float scaled = values[codes[block]] * absmax[block / nested_size];
    return scaled + offset;
  }
};

// Dequantise one thread's SPAN weights, or fewer at the very end. The weight is treated as flat: blocks may cross rows.
template <typename S>
void dequantize_span(device VALUE* out, device const uchar* packed, device const float* table, S scales, uint count,
                     uint block_size, uint span) {
  uint first = span * SPAN;
  float absmax = scales.of(first / block_size);
  for (uint j = 0; j < SPAN && first + j < count; ++j) {
    uchar byte = packed[(first + j) / 2];
    uint code = j % 2 == 0 ? byte >> 4 : byte & 15;  // the first of a pair is the high nibble
    out[first + j] = VALUE(table[code] * absmax);
  }
}

// Compute column `out` of y (rows, out_features) = x (rows, in_features) W^T in one simdgroup. A row of W is whole blocks.
// Weights are decoded once for all rows of x. The sums stay in registers, because loops over FEW_ROWS are unrolled.
template <typename S>
void multiply_row(device VALUE* y, device const VALUE* x, device const uchar* packed, device const float* table, S scales,
                  uint rows, uint in_features, uint out_features, uint block_size, uint out, uint lane) {
  float sums[FEW_ROWS] = {};
  device const uchar* codes = packed + size_t(out) * (in_features / 2);
  uint blocks = out * (in_features / block_size);
  for (uint k = lane * SPAN; k < in_features; k += LANES * SPAN) {
    float absmax = scales.of(blocks + k / block_size);
    float weights[SPAN];
    for (uint j = 0; j < SPAN; j += 2) {
      uchar byte = codes[(k + j) / 2];
      weights[j] = table[byte >> 4] * absmax;
      weights[j + 1] = table[byte & 15] * absmax;
    }
    for (uint r = 0; r < FEW_ROWS; ++r) {
      if (r < rows) {
        device const VALUE* values = x + size_t(r) * in_features + k;
        for (uint j = 0; j < SPAN; ++j) sums[r] = fma(weights[j], float(values[j]), sums[r]);
      }
    }
  }
  for (uint r = 0; r < FEW_ROWS; ++r) {
    if (r < rows) {
      float sum = simd_sum(sums[r]);
      if (lane == 0) y[size_t(r) * out_features + out] = VALUE(sum);
    }
  }
}

kernel void dequantize(
    device VALUE* out [[buffer(0)]],
    device const uchar* packed [[buffer(1)]],
    device const float* table [[buffer(2)]],
    device const float* absmax [[buffer(3)]],
    constant long& count [[buffer(4)]],
    constant long& block_size [[buffer(5)]],
    uint span [[thread_position_in_grid]]) {
  dequantize_span(out, packed, table, Scales{absmax}, uint(count), uint(block_size), span);
}

kernel void dequantize_nested(
    device VALUE* out [[buffer(0)]],
    device const uchar* packed [[buffer(1)]],
    device const float* table [[buffer(2)]],
    device const uchar* absmax_codes [[buffer(3)]],
    device const float* nested_table [[buffer(4)]],
    device const float* nested_absmax [[buffer(5)]],
    constant float& offset [[buffer(6)]],
    constant long& nested_size [[buffer(7)]],
    constant long& count [[buffer(8)]],
    constant long& block_size [[buffer(9)]],
    uint span [[thread_position_in_grid]]) {
  NestedScales scales{absmax_codes, nested_table, nested_absmax, offset, uint(nested_size)};
  dequantize_span(out, packed, table, scales, uint(count), uint(block_size), span);
}

// The grid is (LANES, out_features): a simdgroup is one row of threads, and computes one output for each row of x.
kernel void matvec(
    device VALUE* y [[buffer(0)]],
    device const VALUE* x [[buffer(1)]],
    device const uchar* packed [[buffer(2)]],
    device const float* table [[buffer(3)]],
    device const float* absmax [[buffer(4)]],
    constant long& rows [[buffer(5)]],
    constant long& in_features [[buffer(6)]],
    constant long& out_features [[buffer(7)]],
    constant long& block_size [[buffer(8)]],
    uint2 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  multiply_row(y, x, packed, table, Scales{absmax}, uint(rows), uint(in_features), uint(out_features), uint(block_size),
               position.y, lane);
}

kernel void matvec_nested(
    device VALUE* y [[buffer(0)]],
    device const VALUE* x [[buffer(1)]],
    device const uchar* packed [[buffer(2)]],
    device const float* table [[buffer(3)]],
    device const uchar* absmax_codes [[buffer(4)]],
    device const float* nested_table [[buffer(5)]],
    device const float* nested_absmax [[buffer(6)]],
    constant float& offset [[buffer(7)]],
    constant long& nested_size [[buffer(8)]],
    constant long& rows [[buffer(9)]],
    constant long& in_features [[buffer(10)]],
    constant long& out_features [[buffer(11)]],
    constant long& block_size [[buffer(12)]],
    uint2 position [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  NestedScales scales{absmax_codes, nested_table, nested_absmax, offset, uint(nested_size)};
  multiply_row(y, x, packed, table, scales, uint(rows), uint(in_features), uint(out_features), uint(block_size), position.y,
               lane);
}
