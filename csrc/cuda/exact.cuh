// Float arithmetic in the CPU's order: 16 lanes and a tree of 8, 4, 2, 1 (kernels/kernels-inl.h).
#pragma once

#include "kernels/kernels.h"
#include "portability.h"

namespace edgemoe {
namespace cuda {

// fmaxf and fminf treat NaN differently.
__device__ __forceinline__ float max_of(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float min_of(float a, float b) { return a < b ? a : b; }

/// The higher of a number and x, which may be NaN and then stays NaN; where there is an instruction for it, without the
/// registers that a comparison takes.
__device__ __forceinline__ float at_least(float least, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(least), "f"(x));
  return x;
#else
  return max_of(least, x);
#endif
}

/// The same for the lower.
__device__ __forceinline__ float at_most(float most, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(most), "f"(x));
  return x;
#else
  return min_of(most, x);
#endif
}

/// e^x; NaN stays NaN.
__device__ __forceinline__ float exact_exp(float x) {
  x = at_most(88.0f, at_least(-87.0f, x));
  const float n = rintf(x * 1.44269504088896341f);
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p * r, r, r + 1.0f);
  return p * __int_as_float((__float2int_rz(n) + 127) << 23);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exact_exp(0.0f - x)); }

/// x * sigmoid(z)
__device__ __forceinline__ float gated(float x, float z) { return x / (1.0f + exact_exp(0.0f - z)); }

__device__ __forceinline__ float silu_mul(float gate, float up) { return gated(gate, gate) * up; }

/// log(1 + e^x)
__device__ __forceinline__ float softplus(float x) {
  const float y = exact_exp(0.0f - fabsf(x)), s = y / (2.0f + y), z = s * s;
  float p = 2.0f / 17;
  p = fmaf(p, z, 2.0f / 15);
  p = fmaf(p, z, 2.0f / 13);
  p = fmaf(p, z, 2.0f / 11);
  p = fmaf(p, z, 2.0f / 9);
  p = fmaf(p, z, 2.0f / 7);
  p = fmaf(p, z, 2.0f / 5);
  p = fmaf(p, z, 2.0f / 3);
  p = fmaf(p, z, 2.0f);
  return fmaf(s, p, max_of(x, 0.0f));
}

/// The activation of a gate and an up, as by `Kernels::activate`.
template <Activation kKind>
__device__ __forceinline__ float activated(float gate, float up) {
  if constexpr (kKind == Activation::kSwiglu) return silu_mul(gate, up);
  if constexpr (kKind == Activation::kGeglu) {
    constexpr float k = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    return gated(gate, fmaf(gate * gate, k * 0.044715f, k) * gate) * up;
  }
  if constexpr (kKind == Activation::kClampedSwiglu) {
    const float g = min_of(7.0f, gate), u = min_of(7.0f, max_of(-7.0f, up));
    return gated(g, g * 1.702f) * (u + 1.0f);
  }
  const float positive = max_of(0.0f, up);
  return positive * positive;
}

/// Sum of the 16 lanes of a half warp, in its first lane.
__device__ __forceinline__ float reduce16(float v) {
  EDGEMOE_UNROLL
  for (int d = 8; d > 0; d >>= 1) v = v + __shfl_down_sync(kAllLanes, v, d, 16);
  return v;
}

/// Sum over columns of a[c] * b[c] by a half warp, in its first lane.
__device__ __forceinline__ float dot16(const float* a, const float* b, int cols) {
  const int lane = threadIdx.x & 15;
  float acc = 0;
  EDGEMOE_UNROLL_8
  for (int c = lane; c < cols; c += 16) acc = fmaf(a[c], b[c], acc);
  if (cols % 16 && lane >= cols % 16) acc = fmaf(0.0f, 0.0f, acc);  // the CPU's padding, which turns -0 into +0
  return reduce16(acc);
}

/// Highest of a warp's lanes; not for NaN.
__device__ __forceinline__ float warp_max(float v) {
  EDGEMOE_UNROLL
  for (int d = 16; d > 0; d >>= 1) v = max_of(v, __shfl_xor_sync(kAllLanes, v, d));
  return v;
}

/// Whether any lane's value is infinite or NaN.
__device__ __forceinline__ bool any_poisoned(float v) { return __any_sync(kAllLanes, !(v * 0.0f == 0.0f)); }

/// Replaces x [n] by its softmax, by one warp, of which 16 lanes sum. Sets `top` to the highest x and `sum` to the sum
/// of e^(x - top).
__device__ __forceinline__ void softmax(float* x, int n, float* top, float* sum) {
  const int lane = threadIdx.x & 31;
  // In the CPU's order, which matters where a score is NaN: within each lane in turn, then by halves.
  float most = x[0];
  if (lane < 16) {
    if (lane < n) most = x[lane];
    for (int i = lane + 16; i < (n + 15) / 16 * 16; i += 16) most = max_of(most, i < n ? x[i] : x[0]);
  }
  EDGEMOE_UNROLL
  for (int d = 8; d > 0; d >>= 1) most = max_of(most, __shfl_down_sync(kAllLanes, most, d, 16));
  const float highest = __shfl_sync(kAllLanes, most, 0);
  float acc = 0;
  if (lane < 16) {
    for (int i = lane; i < n; i += 16) {
      const float e = exact_exp(x[i] - highest);
      acc = acc + e;
      x[i] = e;
    }
  }
  const float total = __shfl_sync(kAllLanes, reduce16(acc), 0), inverse = 1.0f / total;
  __syncwarp();
  for (int i = lane; i < n; i += 32) x[i] = x[i] * inverse;
  __syncwarp();
  *top = highest;
  *sum = total;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

/// acc + the product of four codes below 256 and four signed activations.
__device__ __forceinline__ int dot4(uint32_t codes, int x, int acc) {
#ifdef __CUDA_ARCH__
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(acc) : "r"(codes), "r"(x));
#else
  for (int j = 0; j < 4; ++j) acc += int(codes >> (8 * j) & 255) * int(int8_t(uint32_t(x) >> (8 * j)));
#endif
  return acc;
}

}  // namespace cuda
}  // namespace edgemoe
