// The inputs of low-rank corrections: V x of a row, times u, in 8 bits (kernels/correction-inl.h).
#pragma once

#include "codes.cuh"
#include "device/device.h"
#include "rows.cuh"

namespace edgemoe {
namespace cuda {

constexpr int kMostRanks = 16;  ///< per launch: they are a kernel argument

struct RanksList {
  RanksCall of[kMostRanks];
};

/// Grid: (rows, calls). A half warp has a row of V.
__global__ void __launch_bounds__(kRowThreads) ranks(RanksList list) {
  EDGEMOE_SHARED(float, z, kMaxRank);
  const RanksCall& call = list.of[blockIdx.y];
  const int row = int(blockIdx.x), lane = threadIdx.x & 15, cols = call.x.cols;
  if (row >= call.x.n) return;  // the whole block
  const float* x = call.x.x + call.x.at(row);
  for (int r = threadIdx.x / 16; r < kMaxRank; r += kRowThreads / 16) {
    float sum = 0;
    if (r < call.rank) {  // the same for both halves of a warp
      const int8_t* v = call.basis + r * basis_stride(cols);
      float acc = 0;
      EDGEMOE_UNROLL_8
      for (int c = lane; c < cols; c += 16) acc = fmaf(float(v[c]), x[c], acc);
      if (cols % 16 && lane >= cols % 16) acc = fmaf(0.0f, 0.0f, acc);
      sum = reduce16(acc);
    }
    if (lane == 0) z[r] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int j = threadIdx.x;
  const float v = load_f16(call.u, j) * z[j], other = __shfl_down_sync(kAllLanes, v, 16, 32);
  const float highest = warp_max(fabsf(v));
  const float poisoned = __shfl_sync(kAllLanes, reduce16(fmaf(other, 0.0f, v * 0.0f)), 0);
  const bool is_zero = !(highest > 1e-30f) || any_poisoned(v);
  const int q = is_zero ? 0 : int(rintf(v * (127.0f / highest)));
  int sum = q;
  EDGEMOE_UNROLL
  for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, d);
  RankRow& out = call.out[row];
  out.codes[j] = int8_t(q);
  if (j == 0) out.scale = is_zero ? poisoned : highest / 127.0f, out.sum = float(sum);
}

}  // namespace cuda
}  // namespace edgemoe
