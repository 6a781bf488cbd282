// What works on whole rows of floats: activations in 8 bits, norms, the router's products, sums.
#pragma once

#include "exact.cuh"

namespace edgemoe {
namespace cuda {

constexpr int kRowThreads = 256;

/// Quantises 32 values, one for each lane: part `part` of a row.
__device__ __forceinline__ void quantize_part(float v, int part, int8_t* codes, float* scales, float* sums) {
  const int lane = threadIdx.x & 31;
  const float highest = warp_max(fabsf(v));
  const bool poisoned = any_poisoned(v);
  // Below, 127 / highest would overflow.
  const bool is_zero = !(highest > 1e-30f) || poisoned;
  const float inverse = is_zero ? 0.0f : 127.0f / highest;
  const int q = is_zero ? 0 : int(rintf(v * inverse));
  int sum = q;
  EDGEMOE_UNROLL
  for (int d = 8; d > 0; d >>= 1) sum += __shfl_down_sync(kAllLanes, sum, d, 16);
  codes[part * 32 + lane] = int8_t(q);
  if ((lane & 15) == 0) sums[2 * part + lane / 16] = float(sum);
  if (lane == 0) scales[part] = poisoned ? __int_as_float(0x7fc00000) : is_zero ? 0.0f : highest / 127.0f;
}

/// Grid: (groups of 8 parts, rows).
__global__ void __launch_bounds__(kRowThreads)
    quantize_rows(const float* x, const float* up, const int32_t* rows, int cols, int tiles, int8_t* codes,
                  float* scales, float* sums) {
  const int part = int(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32, column = part * 32 + (threadIdx.x & 31);
  if (part >= tiles * kScales) return;
  const size_t to = blockIdx.y, from = size_t(rows ? rows[to] : int(to)) * cols;
  float v = column < cols ? x[from + column] : 0.0f;
  if (up && column < cols) v = silu_mul(v, up[from + column]);
  const size_t at = to * tiles;
  quantize_part(v, part, codes + at * kTileCols, scales + at * kScales, sums + at * kSums);
}

/// Grid: rows. x = x + scale * added first, if given.
__global__ void __launch_bounds__(kRowThreads)
    norm_rows(float* x, const float* added, float scale, const float* weight, float eps, int cols, float* out) {
  EDGEMOE_SHARED(float, total, 1);
  const size_t at = size_t(blockIdx.x) * cols;
  float* mine = x + at;
  if (added) {
    for (int c = threadIdx.x; c < cols; c += kRowThreads) mine[c] = fmaf(added[at + c], scale, mine[c]);
    __syncthreads();
  }
  if (threadIdx.x < 32) {
    const float sum = dot16(mine, mine, cols);
    if (threadIdx.x == 0) total[0] = sum;
  }
  __syncthreads();
  const float inverse = 1.0f / sqrtf(total[0] / float(cols) + eps);
  for (int c = threadIdx.x; c < cols; c += kRowThreads) out[at + c] = mine[c] * inverse * weight[c];
}

/// Grid: (groups of 16 rows of w, rows of x); a half warp for each.
__global__ void __launch_bounds__(kRowThreads)
    matmul_f32(const float* w, const float* x, int rows, int cols, float* y) {
  const int r = int(blockIdx.x) * 16 + threadIdx.x / 16;
  const size_t i = blockIdx.y;
  const float sum = dot16(w + size_t(min(r, rows - 1)) * cols, x + i * cols, cols);
  if (r < rows && (threadIdx.x & 15) == 0) y[i * rows + r] = sum;
}

/// Grid: (groups of 256 columns, tokens).
__global__ void __launch_bounds__(kRowThreads)
    combine(const float* parts, const int32_t* rows, const float* gates, int K, int cols, float* out) {
  const int column = int(blockIdx.x) * kRowThreads + threadIdx.x;
  const size_t t = blockIdx.y;
  if (column >= cols) return;
  float acc = 0;
  for (int k = 0; k < K; ++k) {
    const int row = rows[t * K + k];
    if (row >= 0) acc = fmaf(parts[size_t(row) * cols + column], gates[t * K + k], acc);
  }
  out[t * cols + column] = acc;
}

/// Grid: rows.
__global__ void __launch_bounds__(kRowThreads)
    add_rows(const float* x, float scale, const float* gate_weight, const float* gate_input, int cols, float* out) {
  EDGEMOE_SHARED(float, gate, 1);
  const size_t at = size_t(blockIdx.x) * cols;
  if (gate_weight) {
    if (threadIdx.x < 32) {
      const float logit = dot16(gate_weight, gate_input + at, cols);
      if (threadIdx.x == 0) gate[0] = sigmoid(logit);
    }
    __syncthreads();
    scale = scale * gate[0];
  }
  for (int c = threadIdx.x; c < cols; c += kRowThreads) out[at + c] = fmaf(x[at + c], scale, out[at + c]);
}

/// Grid: rows.
__global__ void __launch_bounds__(kRowThreads) add_bias(const float* bias, int cols, float* out) {
  const size_t at = size_t(blockIdx.x) * cols;
  for (int c = threadIdx.x; c < cols; c += kRowThreads) out[at + c] = out[at + c] + bias[c];
}

/// Grid: groups of 256 values.
__global__ void __launch_bounds__(kRowThreads) scale_all(float factor, size_t n, float* out) {
  const size_t i = size_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i < n) out[i] = out[i] * factor;
}

}  // namespace cuda
}  // namespace edgemoe
