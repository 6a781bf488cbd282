// Attention to stored keys and values: blocks of kKeyBlock positions side by side, then merged in their order.
#pragma once

#include "heads.cuh"

namespace edgemoe {
namespace cuda {

constexpr int kHeadQueries = 8;  ///< that share each load of a key or value

/// What a block of threads shares: some queries of one kv head, and their scores.
struct Shared {
  float* query;   ///< [kHeadQueries, head_stride]
  float* scores;  ///< [kHeadQueries, kKeyBlock]
  int8_t* codes;  ///< the queries in 8 bits: [kHeadQueries, groups, 32]; these three for keys in kQ8
  float* scales;  ///< [kHeadQueries, groups]
  int* sums;
  int n;  ///< queries
};

template <KvType kType>
__device__ __forceinline__ float load_cell(const uint8_t* p, size_t i) {
  if constexpr (kType == KvType::kF16) return half_to_float(__ldg(reinterpret_cast<const uint16_t*>(p) + i));
  return __ldg(reinterpret_cast<const float*>(p) + i);
}

/// out[i] = query i times the key at position s.
template <KvType kType>
__device__ __forceinline__ void score(const Shared& with, const uint8_t* head, int hs, int s, float* out) {
  EDGEMOE_UNROLL
  for (int i = 0; i < kHeadQueries; ++i) out[i] = 0;
  if constexpr (kType != KvType::kQ8) {
    const uint8_t* tile = head + s / 32 * kv_tile_bytes(kType, hs);
    for (int c = 0; c < hs; ++c) {
      const float x = load_cell<kType>(tile, 32 * c + s % 32);
      EDGEMOE_UNROLL
      for (int i = 0; i < kHeadQueries; ++i) {
        if (i < with.n) out[i] = fmaf(with.query[i * hs + c], x, out[i]);
      }
    }
  } else {
    const int groups = blocks(hs, kKvGroup);
    const uint8_t* tile = head + s / 16 * kv_tile_bytes(kType, hs) + 4 * (s % 16);
    const uint8_t* scales = head + s / 16 * kv_tile_bytes(kType, hs) + 16 * hs;
    for (int g = 0; g < groups; ++g) {
      uint32_t key[kKvGroup / 4];
      EDGEMOE_UNROLL
      for (int d = 0; d < kKvGroup / 4; ++d) {
        const int c = g * kKvGroup + 4 * d;
        key[d] = c < hs ? __ldg(reinterpret_cast<const uint32_t*>(tile + 16 * c)) : 0;
      }
      const float key_scale = half_to_float(__ldg(reinterpret_cast<const uint16_t*>(scales) + g * 16 + s % 16));
      EDGEMOE_UNROLL
      for (int i = 0; i < kHeadQueries; ++i) {
        if (i >= with.n) break;
        const int* codes = reinterpret_cast<const int*>(with.codes + (i * groups + g) * kKvGroup);
        int dot = -128 * with.sums[i * groups + g];
        EDGEMOE_UNROLL
        for (int d = 0; d < kKvGroup / 4; ++d) dot = dot4(key[d], codes[d], dot);
        out[i] = fmaf(key_scale, with.scales[i * groups + g] * float(dot), out[i]);
      }
    }
  }
}

/// Sum over positions [from, to) of weights[s - from] times the values' column c.
template <KvType kType>
__device__ __forceinline__ float add_values(const float* weights, const uint8_t* head, int hs, int c, int from,
                                            int to) {
  float acc = 0;
  EDGEMOE_UNROLL_8
  for (int s = from; s < to; ++s) {
    if constexpr (kType != KvType::kQ8) {
      acc = fmaf(weights[s - from], load_cell<kType>(head, size_t(s) * hs + c), acc);
    } else {
      const uint8_t* tile = head + s / 16 * kv_tile_bytes(kType, hs);
      const auto* scales = reinterpret_cast<const uint16_t*>(tile + 16 * hs) + c / kKvGroup * 16;
      const float code = float(int8_t(__ldg(tile + s % 16 * hs + c)));
      acc = fmaf(weights[s - from] * half_to_float(__ldg(scales + s % 16)), code, acc);
    }
  }
  return acc;
}

__device__ __forceinline__ int first_seen(int window, int position) {
  return window > 0 ? max(0, position + 1 - window) : 0;
}

/// Grid: (blocks of positions, kv heads, tokens). A thread is a position for the scores and a column for the values.
template <KvType kKeys, KvType kValues>
__global__ void __launch_bounds__(kKeyBlock) attend(AttendCall call) {
  EDGEMOE_SHARED(float, query, kHeadQueries* kMostHeadDim);
  EDGEMOE_SHARED(float, scores, kHeadQueries* kKeyBlock);
  EDGEMOE_SHARED(float, whole, kHeadQueries * 2);  // the highest score, and the sum
  EDGEMOE_SHARED(int8_t, codes, kHeadQueries* kMostHeadDim);
  EDGEMOE_SHARED(float, scales, kHeadQueries* kMostHeadDim / kKvGroup);
  EDGEMOE_SHARED(int, sums, kHeadQueries* kMostHeadDim / kKvGroup);
  const AttentionShape& shape = call.shape;
  const int t = int(blockIdx.z), kv_head = int(blockIdx.y), thread = threadIdx.x, warp = thread / 32;
  const int position = call.pos + t, hs = call.kv.head_stride, hd = shape.head_dim, groups = blocks(hs, kKvGroup);
  const int per_kv = shape.num_heads / shape.num_kv_heads;
  const int base = (first_seen(shape.window, call.pos) / kKeyBlock + int(blockIdx.x)) * kKeyBlock;
  const int from = max(first_seen(shape.window, position), base), to = min(position + 1, base + kKeyBlock);
  if (from >= to) return;                                         // the whole block
  const int before = base / call.kv.capacity * call.kv.capacity;  // where a ring has the block: in earlier rounds
  const uint8_t* keys = call.kv.keys + kv_head * kv_head_bytes(kKeys, call.kv.capacity, hs);
  const uint8_t* values = call.kv.values + kv_head * kv_head_bytes(kValues, call.kv.capacity, hs);
  for (int h0 = 0; h0 < per_kv; h0 += kHeadQueries) {
    const int n = min(kHeadQueries, per_kv - h0), first_head = kv_head * per_kv + h0;
    const Shared with{query, scores, codes, scales, sums, n};
    for (int i = thread; i < n * hs; i += kKeyBlock) {
      const int c = i % hs;
      query[i] = c < hd ? call.q[(size_t(t) * shape.num_heads + first_head + i / hs) * hd + c] : 0.0f;
    }
    __syncthreads();
    if constexpr (kKeys == KvType::kQ8) {
      for (int i = warp; i < n * groups; i += kKeyBlock / 32) {
        const int c = i % groups * kKvGroup + thread % 32;
        const HeadPart part(c < hs ? query[i / groups * hs + c] : 0.0f);
        codes[i * kKvGroup + thread % 32] = int8_t(part.code);
        if (thread % 32 == 0) scales[i] = part.scale, sums[i] = part.sum;
      }
      __syncthreads();
    }
    if (base + thread >= from && base + thread < to) {
      float out[kHeadQueries];
      score<kKeys>(with, keys, hs, base + thread - before, out);
      EDGEMOE_UNROLL
      for (int i = 0; i < kHeadQueries; ++i) {
        if (i < n) scores[i * kKeyBlock + base + thread - from] = out[i] * shape.scale;
      }
    }
    __syncthreads();
    if (warp < n) {
      float top, sum;
      softmax(scores + warp * kKeyBlock, to - from, &top, &sum);
      if (thread % 32 == 0) whole[2 * warp] = top, whole[2 * warp + 1] = sum;
    }
    __syncthreads();
    for (int i = thread; i < n * hs; i += kKeyBlock) {
      const int q = i / hs, c = i % hs;
      float* part = call.parts + ((size_t(t) * gridDim.x + blockIdx.x) * shape.num_heads + first_head + q) * (hs + 2);
      part[c] = add_values<kValues>(scores + q * kKeyBlock, values, hs, c, from - before, to - before);
      if (c == 0) part[hs] = whole[2 * q], part[hs + 1] = whole[2 * q + 1];
    }
    __syncthreads();
  }
}

/// Grid: (heads, tokens); a thread is a column.
__global__ void __launch_bounds__(kMostHeadDim) merge_blocks(AttendCall call, int num_blocks) {
  const AttentionShape& shape = call.shape;
  const int head = int(blockIdx.x), t = int(blockIdx.y), c = threadIdx.x, hs = call.kv.head_stride;
  if (c >= shape.head_dim) return;
  const int position = call.pos + t, origin = first_seen(shape.window, call.pos) / kKeyBlock;
  const int first = first_seen(shape.window, position) / kKeyBlock - origin, last = position / kKeyBlock - origin;
  const size_t step = size_t(shape.num_heads) * (hs + 2);
  const float* part = call.parts + (size_t(t) * num_blocks + first) * step + size_t(head) * (hs + 2);
  float value = part[c], top = part[hs], sum = part[hs + 1];
  for (int b = first + 1; b <= last; ++b) {
    part += step;
    const float next = part[hs], highest = top > next ? top : next;
    const float mine = sum * exact_exp(top - highest), theirs = part[hs + 1] * exact_exp(next - highest);
    sum = mine + theirs;
    value = fmaf(part[c], theirs / sum, value * (mine / sum));
    top = highest;
  }
  if (call.out_bias) value = value + call.out_bias[head / (shape.num_heads / shape.num_kv_heads) * shape.head_dim + c];
  call.out[(size_t(t) * shape.num_heads + head) * shape.head_dim + c] = value;
}

}  // namespace cuda
}  // namespace edgemoe
