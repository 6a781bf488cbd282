// Kernels on whole rows of floats: quantisation of activations, norms, the router's products, sums.
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

/// Where a thread quantises: one value of a part of a row. Rows are on the grid's first axis: there is one for each
/// token and head, which can be more than the 65535 of the other axes.
struct QuantizeSeat {
  int part, column;
  size_t row;

  __device__ __forceinline__ QuantizeSeat()
      : part(int(blockIdx.y) * (kRowThreads / 32) + int(threadIdx.x) / 32),
        column(part * 32 + int(threadIdx.x & 31)),
        row(blockIdx.x) {}
  __device__ __forceinline__ void put(float v, const QuantizedBuffer& out) const {
    const size_t at = row * out.tiles;
    quantize_part(v, part, out.codes + at * kTileCols, out.scales + at * kScales, out.sums + at * kSums);
  }
};

/// Grid: (rows, groups of 8 parts).
__global__ void __launch_bounds__(kRowThreads) quantize_rows(RowsCall x, QuantizedBuffer out) {
  const QuantizeSeat seat;
  if (seat.part >= out.tiles * kScales) return;
  seat.put(seat.column < x.cols ? x.x[x.at(int(seat.row)) + seat.column] : 0.0f, out);
}

/// The same for the activation of gate and up.
template <Activation kKind>
__global__ void __launch_bounds__(kRowThreads)
    quantize_hidden(const float* gate, const float* up, int cols, QuantizedBuffer out, float* hidden) {
  const QuantizeSeat seat;
  if (seat.part >= out.tiles * kScales) return;
  float v = 0;
  if (seat.column < cols) {
    const size_t at = seat.row * cols + seat.column;
    v = activated<kKind>(kKind == Activation::kRelu2 ? 0.0f : gate[at], up[at]);
    if (hidden) hidden[at] = v;
  }
  seat.put(v, out);
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
    const int row = rows ? rows[t * K + k] : int(t) * K + k;
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

/// Grid: 1. What it sends arrives in the host's memory before the number that says so.
__global__ void __launch_bounds__(kRowThreads) post(PostCall call) {
  const uint32_t number = threadIdx.x == 0 ? *static_cast<const volatile uint32_t*>(call.number) : 0;
  uint32_t* to = call.to;
  EDGEMOE_UNROLL
  for (int i = 0; i < kMostPosted; ++i) {
    for (int c = threadIdx.x; c < call.sizes[i]; c += kRowThreads) to[c] = call.from[i][c];
    to += call.sizes[i];
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) *static_cast<volatile uint32_t*>(call.turn) = number;
}

/// Grid: groups of 256 values.
__global__ void __launch_bounds__(kRowThreads) multiply(const float* factors, size_t size, size_t n, float* out) {
  const size_t i = size_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i < n) out[i] = out[i] * factors[i % size];
}

/// Grid: rows.
__global__ void __launch_bounds__(kRowThreads) weigh(const float* x, const float* gates, int cols, float* out) {
  const size_t at = size_t(blockIdx.x) * cols;
  const float gate = gates[blockIdx.x];
  for (int c = threadIdx.x; c < cols; c += kRowThreads) out[at + c] = x[at + c] * gate;
}

}  // namespace cuda
}  // namespace edgemoe
