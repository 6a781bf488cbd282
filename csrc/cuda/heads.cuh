// Queries, keys and values of one head: bias, norm, clip and rotation, and storing keys and values in their cache.
#pragma once

#include "device/device.h"
#include "exact.cuh"

namespace edgemoe {
namespace cuda {

/// A group of 32 values of a head in 8 bits: this lane's code, and the group's scale and sum; see
/// `Kernels::quantize_head`.
struct HeadPart {
  int code, sum;
  float scale;

  __device__ __forceinline__ explicit HeadPart(float v) {
    const float highest = warp_max(fabsf(v));
    const bool poisoned = any_poisoned(v);
    const float rounded = half_to_float(float_to_half(highest / 127.0f));
    const bool is_zero = !(rounded > 0) || poisoned;
    const float inverse = is_zero ? 0.0f : 1.0f / rounded;
    // With a scale that was rounded down, a value may come to 128.
    code = is_zero ? 0 : int(rintf(min_of(max_of(v * inverse, -127.0f), 127.0f)));
    sum = code;
    EDGEMOE_UNROLL
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, d);
    scale = poisoned ? __int_as_float(0x7fc00000) : is_zero ? 0.0f : rounded;
  }
};

__device__ __forceinline__ bool is_finite_half(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

/// x [n] = its RMS norm, by one warp.
__device__ __forceinline__ void norm_head(float* x, const float* weight, float eps, int n) {
  const float sum = __shfl_sync(kAllLanes, dot16(x, x, n), 0), inverse = 1.0f / sqrtf(sum / float(n) + eps);
  __syncwarp();
  for (int i = threadIdx.x; i < n; i += 32) x[i] = x[i] * inverse * weight[i];
  __syncwarp();
}

/// Stores a head [n] at a position of its cache. Returns whether this lane's values fit.
__device__ __forceinline__ bool store_head(const KvLayer& kv, bool is_key, int head, int pos, const float* x, int n) {
  const KvType type = is_key ? kv.key_type : kv.value_type;
  const int rows = kv_tile_rows(type), place = pos % kv.capacity, at = place % rows;
  const int hs = kv.head_stride, lane = threadIdx.x;
  uint8_t* tile = (is_key ? kv.keys : kv.values) + head * kv_head_bytes(type, kv.capacity, hs) +
                  place / rows * kv_tile_bytes(type, hs);
  bool fits = true;
  if (type != KvType::kQ8) {
    for (int c = lane; c < n; c += 32) {
      const int cell = is_key ? c * rows + at : at * hs + c;
      if (type == KvType::kF16) {
        const uint16_t half = float_to_half(x[c]);
        reinterpret_cast<uint16_t*>(tile)[cell] = half;
        fits = fits && is_finite_half(half);
      } else {
        reinterpret_cast<float*>(tile)[cell] = x[c];
        fits = fits && x[c] * 0.0f == 0.0f;
      }
    }
    return fits;
  }
  for (int g = 0; g < blocks(hs, kKvGroup); ++g) {
    const int c = g * kKvGroup + lane;
    const HeadPart part(c < n ? x[c] : 0.0f);
    if (c < hs && is_key) tile[16 * (c / 4 * 4) + 4 * at + c % 4] = uint8_t(part.code ^ 0x80);
    if (c < hs && !is_key) tile[at * hs + c] = uint8_t(part.code);
    const uint16_t half = float_to_half(part.scale);
    if (lane == 0) reinterpret_cast<uint16_t*>(tile + rows * hs)[g * rows + at] = half;
    fits = fits && is_finite_half(half);
  }
  return fits;
}

/// If any lane's values of x [n] did not fit, lowers `lowest` to the code of `of` with the largest magnitude in x.
__device__ __forceinline__ void note_misfit(bool fits, Misfit of, const float* x, int n, uint64_t* lowest) {
  if (!__any_sync(kAllLanes, !fits)) return;
  for (int i = threadIdx.x; i < n; i += 32) {
    const uint32_t bits = uint32_t(__float_as_int(x[i])) & 0x7fffffffu;
    of.magnitude = bits > of.magnitude ? bits : of.magnitude;
  }
  atomicMin(reinterpret_cast<unsigned long long*>(lowest), static_cast<unsigned long long>(of.code()));
}

/// The position of a call's first token.
template <class Call>
__device__ __forceinline__ int position_of(const Call& call) {
  return call.pos + (call.now ? *call.now : 0);
}

/// Grid: (heads of q, of k, of v, tokens); a warp for each.
__global__ void __launch_bounds__(32) prepare_heads(HeadsCall call) {
  EDGEMOE_SHARED(float, x, kMostHeadDim);
  const int t = int(blockIdx.y), lane = threadIdx.x, hd = call.head_dim, half = call.rope_dim / 2;
  const int first_k = call.q.num_heads, first_v = first_k + call.k.num_heads, place = int(blockIdx.x);
  const HeadChange& change = place < first_k ? call.q : place < first_v ? call.k : call.v;
  const int head = place - (place < first_k ? 0 : place < first_v ? first_k : first_v);
  float* mine = change.x + (size_t(t) * change.num_heads + head) * hd;
  for (int i = lane; i < hd; i += 32) x[i] = change.bias ? mine[i] + change.bias[head * hd + i] : mine[i];
  __syncwarp();
  if (change.norm && !change.norm_last) norm_head(x, change.norm, call.norm_eps, hd);
  for (int i = lane; call.clip > 0 && i < hd; i += 32) {
    const float low = x[i] < -call.clip ? -call.clip : x[i];
    x[i] = call.clip < low ? call.clip : low;
  }
  __syncwarp();
  for (int i = lane; change.rotate && i < half; i += 32) {
    const float a = x[i], b = x[half + i], c = call.cos[size_t(t) * half + i], s = call.sin[size_t(t) * half + i];
    x[i] = a * c - b * s;
    x[half + i] = b * c + a * s;
  }
  __syncwarp();
  if (change.norm && change.norm_last) norm_head(x, change.norm, call.norm_eps, hd);
  const float grown = call.grown && place < first_k ? call.grown[t] : 1.0f;
  for (int i = lane; i < hd; i += 32) mine[i] = x[i] * grown;
  if (place < first_k) return;
  const bool is_value = place >= first_v;
  const bool fits = store_head(call.kv, !is_value, head, position_of(call) + t, x, hd);
  note_misfit(fits, {call.layer, t, is_value, 0}, x, hd, call.misfit);
}

/// Grid: (heads and the key, tokens); a warp for each.
__global__ void __launch_bounds__(32) prepare_latents(LatentsCall call) {
  const LatentShape& s = call.shape;
  const int t = int(blockIdx.y), head = int(blockIdx.x), lane = threadIdx.x, half = s.rope_dim / 2;
  const int width = s.latent_dim + s.rope_dim;
  const bool is_key = head == s.num_heads;
  float* mine = is_key ? call.keys + size_t(t) * width : call.absorbed + (size_t(t) * s.num_heads + head) * width;
  float* turned = mine + s.latent_dim;
  if (is_key) {
    norm_head(mine, call.norm, call.norm_eps, s.latent_dim);
  } else {
    const float* q = call.q + (size_t(t) * s.num_heads + head) * (s.nope_dim + s.rope_dim) + s.nope_dim;
    for (int i = lane; i < s.rope_dim; i += 32) turned[i] = q[i];
    __syncwarp();
  }
  for (int i = lane; s.rotates && i < half; i += 32) {
    const float a = turned[i], b = turned[half + i];
    const float c = call.cos[size_t(t) * half + i], sine = call.sin[size_t(t) * half + i];
    turned[i] = a * c - b * sine;
    turned[half + i] = b * c + a * sine;
  }
  __syncwarp();
  if (!is_key) {
    for (int i = lane; call.grown && i < width; i += 32) mine[i] = mine[i] * call.grown[t];
    return;
  }
  const bool fits = store_head(call.kv, true, 0, position_of(call) + t, mine, width);
  note_misfit(fits, {call.layer, t, false, 0}, mine, width, call.misfit);
}

}  // namespace cuda
}  // namespace edgemoe
