// Attention to stored keys and values: blocks of kKeyBlock positions side by side, then merged in their order.
#pragma once

#include "heads.cuh"

namespace edgemoe {
namespace cuda {

constexpr int kHeadQueries = 8;     ///< the most queries that share each load of a key or value
constexpr int kQueryFloats = 2048;  ///< floats of a block's queries; of wide heads fewer queries fit

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

/// The same for latents, whose leading columns are the values. A half warp sums column c, each lane over every 16th
/// position of [from, to).
template <KvType kType>
__device__ __forceinline__ float add_latents(const float* weights, const uint8_t* head, int hs, int c, int from,
                                             int to) {
  const int lane = threadIdx.x & 15;
  float acc = 0;
  for (int s = from / 16 * 16 + lane; s < to; s += 16) {
    if (s < from) continue;
    if constexpr (kType != KvType::kQ8) {
      const uint8_t* tile = head + s / 32 * kv_tile_bytes(kType, hs);
      acc = fmaf(weights[s - from], load_cell<kType>(tile, 32 * c + s % 32), acc);
    } else {
      const uint8_t* tile = head + s / 16 * kv_tile_bytes(kType, hs);
      const auto* scales = reinterpret_cast<const uint16_t*>(tile + 16 * hs) + c / kKvGroup * 16;
      const float code = float(int(__ldg(tile + 16 * (c / 4 * 4) + 4 * (s % 16) + c % 4)) - 128);
      acc = fmaf(weights[s - from] * half_to_float(__ldg(scales + s % 16)), code, acc);
    }
  }
  return reduce16(acc) + 0.0f;  // makes -0 +0, as on the CPU positions that are not seen add zeros
}

/// Grid: (blocks of positions, kv heads, tokens); for latents, whose one head all queries share, (blocks, groups of
/// queries, tokens). A thread computes the scores of a position, then columns of the values.
template <KvType kKeys, KvType kValues, bool kLatent>
__global__ void __launch_bounds__(kKeyBlock, 2) attend(AttendCall call) {
  EDGEMOE_SHARED(float, query, kQueryFloats);
  EDGEMOE_SHARED(float, scores, kHeadQueries* kKeyBlock);
  EDGEMOE_SHARED(float, whole, kHeadQueries * 2);  // the highest score, and the sum
  EDGEMOE_SHARED(int8_t, codes, kQueryFloats);
  EDGEMOE_SHARED(float, scales, kQueryFloats / kKvGroup);
  EDGEMOE_SHARED(int, sums, kQueryFloats / kKvGroup);
  const AttentionShape& shape = call.shape;
  const int t = int(blockIdx.z), thread = threadIdx.x, warp = thread / 32, pos = position_of(call), position = pos + t;
  const int hs = call.kv.head_stride, hd = shape.head_dim, groups = blocks(hs, kKvGroup);
  const int per_kv = shape.num_heads / shape.num_kv_heads, most = min(kHeadQueries, kQueryFloats / (groups * kKvGroup));
  const int kv_head = kLatent ? 0 : int(blockIdx.y);
  const int base = (first_seen(shape, pos) / kKeyBlock + int(blockIdx.x)) * kKeyBlock;
  const int from = max(first_seen(shape, position), base), to = min(position + 1, base + kKeyBlock);
  if (from >= to) return;                                         // the whole block
  const int before = base / call.kv.capacity * call.kv.capacity;  // positions in earlier rounds of a ring
  const uint8_t* keys = call.kv.keys + kv_head * kv_head_bytes(kKeys, call.kv.capacity, hs);
  const uint8_t* values = kLatent ? keys : call.kv.values + kv_head * kv_head_bytes(kValues, call.kv.capacity, hs);
  const int vs = call.kv.value_stride, first = kLatent ? int(blockIdx.y) * most : 0;
  const int last = kLatent ? min(first + most, per_kv) : per_kv;
  for (int h0 = first; h0 < last; h0 += most) {
    const int n = min(most, last - h0), first_head = kv_head * per_kv + h0;
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
    float* parts = call.parts + ((size_t(t) * gridDim.x + blockIdx.x) * shape.num_heads + first_head) * (vs + 2);
    if constexpr (kLatent) {
      for (int i = thread / 16; i < n * vs; i += kKeyBlock / 16) {  // vs is a multiple of 16: whole warps
        const int q = i / vs, c = i % vs;
        const float value = add_latents<kKeys>(scores + q * kKeyBlock, values, hs, c, from - before, to - before);
        if (thread % 16 == 0) parts[size_t(q) * (vs + 2) + c] = value;
      }
    } else {
      for (int i = thread; i < n * vs; i += kKeyBlock) {
        const int q = i / vs, c = i % vs;
        parts[size_t(q) * (vs + 2) + c] =
            add_values<kValues>(scores + q * kKeyBlock, values, hs, c, from - before, to - before);
      }
    }
    if (thread < 2 * n) parts[size_t(thread / 2) * (vs + 2) + vs + thread % 2] = whole[thread];
    __syncthreads();
  }
}

/// One column of a query's result over some blocks.
struct Merged {
  float value, top, sum;

  __device__ __forceinline__ void add(float next_value, float next_top, float next_sum) {
    const float highest = top > next_top ? top : next_top;
    const float mine = sum * exact_exp(top - highest), theirs = next_sum * exact_exp(next_top - highest);
    sum = mine + theirs;
    value = fmaf(next_value, theirs / sum, value * (mine / sum));
    top = highest;
  }
};

/// Grid: (heads, tokens). A sink is a position whose value is zero, merged last.
__global__ void __launch_bounds__(kKeyBlock) merge_blocks(AttendCall call, int num_blocks) {
  const AttentionShape& shape = call.shape;
  const int head = int(blockIdx.x), t = int(blockIdx.y), vs = call.kv.value_stride;
  const int cols = call.kv.values ? shape.head_dim : vs;
  const int pos = position_of(call), position = pos + t, origin = first_seen(shape, pos) / kKeyBlock;
  const int first = first_seen(shape, position) / kKeyBlock - origin, last = position / kKeyBlock - origin;
  const size_t step = size_t(shape.num_heads) * (vs + 2);
  const float* parts = call.parts + (size_t(t) * num_blocks + first) * step + size_t(head) * (vs + 2);
  const int kv_head = head / (shape.num_heads / shape.num_kv_heads);
  for (int c = threadIdx.x; c < cols; c += kKeyBlock) {
    const float* part = parts;
    Merged all{part[c], part[vs], part[vs + 1]};
    for (int b = first + 1; b <= last; ++b) {
      part += step;
      all.add(part[c], part[vs], part[vs + 1]);
    }
    if (call.out_bias) all.value = all.value + call.out_bias[kv_head * shape.head_dim + c];
    if (call.sinks) all.add(0.0f, call.sinks[head], 1.0f);
    call.out[(size_t(t) * shape.num_heads + head) * cols + c] = all.value;
  }
}

}  // namespace cuda
}  // namespace edgemoe
