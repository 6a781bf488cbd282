// Products of matrices with tokens: shares of 32 columns in parallel, their sum in order.
//
// The CPU adds a row's shares of 32 columns one after the other. Here every thread of a block computes shares, leaves
// them in shared memory, and one thread for each row and token adds them in that order: K / 32 dependent fused
// multiply-adds, some hundred cycles that other blocks' loads hide. So a product has the CPU's bits on any grid.
#pragma once

#include <cstddef>
#include <type_traits>

#include "codes.cuh"
#include "device/device.h"

namespace edgemoe {
namespace cuda {

constexpr int kWarps = 4;     ///< of a block; each takes every fourth tile
constexpr int kSegment = 64;  ///< tiles whose shares are in shared memory at once
constexpr int kFewTokens = 4;
constexpr int kMostProducts = 16;  ///< per launch: they are a kernel argument, which may have at most 4 KiB
static_assert(kSegment % kWarps == 0, "walks go on over the end of a segment");

struct ProductList {
  Product of[kMostProducts];
};

/// A thread's place in its block.
struct Seat {
  int warp, half, row;

  __device__ __forceinline__ Seat() : warp(threadIdx.x >> 5), half((threadIdx.x >> 4) & 1), row(threadIdx.x & 15) {}
};

constexpr __host__ __device__ int shares_of(int tokens) { return tokens * kSegment * kScales * kTileRows; }

/// The sum of thread (row, token) of a block.
template <int T>
struct Sum {
  float acc = 0;

  /// Adds the shares of tiles [first, first + count) in order. All threads must call it.
  __device__ __forceinline__ void add(const QuantizedRows& x, int n, const float* shared, int first, int count) {
    __syncthreads();
    const int t = threadIdx.x / kTileRows;
    if (t < T && t < n) {
      const float* shares = shared + shares_of(t) + threadIdx.x % kTileRows;
      const float* scales = rows_from(x, t).scales + kScales * first;
      EDGEMOE_UNROLL_8
      for (int i = 0; i < kScales * count; ++i) acc = fmaf(__ldg(scales + i), shares[i * kTileRows], acc);
    }
    __syncthreads();
  }
};

/// A row's share of 32 columns without the activations' scale: `add_groups` of kernels-inl.h. All but its last
/// addition are exact.
__device__ __forceinline__ float nested_share(const int* dots, uint8_t byte0, uint8_t byte1, float2 sums, float step,
                                              float first) {
  // The bits of the float (4 + a % 4) * 2^(a / 4) are those of 4 plus a << 21.
  const float scale0 = __int_as_float(int(0x40800000u + ((byte0 & 15u) << 21)));
  const float scale1 = __int_as_float(int(0x40800000u + ((byte1 & 15u) << 21)));
  const float part0 = fmaf(fmaf(float(byte0 >> 4), step, first), sums.x, float(dots[0]));
  const float part1 = fmaf(fmaf(float(byte1 >> 4), step, first), sums.y, float(dots[1]));
  return fmaf(scale1, part1, scale0 * part0);
}

/// Finishes a row's sum for row `at` of the activations: adds the matrix's correction (`add_ranks` of kernels-inl.h),
/// multiplies by the row's scale and adds the bias.
__device__ __forceinline__ float finish_row(const Product& p, int at, int row, float row_scale, float sum) {
  const int steps = rank_of(p.w) / kRankStep;
  if (steps) {
    const uint8_t* factor =
        correction_of(p.w) + 2 * kMaxRank + size_t(row / kTileRows) * 64 * steps + 4 * (row % kTileRows);
    const RankRow* z = p.ranks + at;
    const int* codes = reinterpret_cast<const int*>(z->codes);
    int dot = 0;
    EDGEMOE_ROLLED
    for (int s = 0; s < steps; ++s) {
      const uint32_t both = load_word(factor + 64 * s);
      dot = dot4(both & 0x0f0f0f0fu, codes[2 * s], dot);
      dot = dot4(both >> 4 & 0x0f0f0f0fu, codes[2 * s + 1], dot);
    }
    sum = fmaf(z->scale, float(dot) - 7.5f * z->sum, sum);
  }
  const float value = row_scale * sum;
  return p.bias ? value + p.bias[row] : value;
}

/// A row's sum. Its value is `acc` times `unit` times the row's scale, or `acc` itself where `unit` is 0.
struct RowSum {
  float acc, unit;
};

/// Rows [16 * block, 16 * block + 16) of a nested product with n <= T tokens: the sum of this thread's row and token.
template <class Tiles, int T>
__device__ __forceinline__ RowSum nested_block(const NestedMatrix& w, const QuantizedRows& x, int n, int block,
                                               float* shared) {
  const Seat seat;
  Tiles at(w, block, x.tiles, seat.warp, kWarps, seat.half, seat.row);
  const float step = float(kMiddleStep) / float(1 << (8 - at.bits()));
  const float lowest = 0.5f - float(1 << (at.bits() - 1)) - 8 * step;
  Sum<T> sum;
  for (int first = 0; first < x.tiles; first += kSegment) {
    const int count = min(kSegment, x.tiles - first);
    for (int g = seat.warp; g < count; g += kWarps, at.next()) {
      uint32_t codes[kSteps];
      at.codes(codes);
      const uint8_t byte0 = __ldg(at.scales), byte1 = __ldg(at.scales + 16);
      EDGEMOE_UNROLL
      for (int t = 0; t < T; ++t) {
        if (t >= n) break;
        const size_t tile = size_t(t) * x.tiles + first + g;
        const Half half(x.codes + tile * kTileCols + seat.half * kActivations, x.sums + tile * kSums + 2 * seat.half);
        int dots[2] = {0, 0};
        EDGEMOE_UNROLL
        for (int s = 0; s < kSteps; ++s) dots[s / 4] = dot4(codes[s], half.x[s], dots[s / 4]);
        shared[shares_of(t) + (g * kScales + seat.half) * kTileRows + seat.row] =
            nested_share(dots, byte0, byte1, half.sums, step, lowest);
      }
    }
    sum.add(x, n, shared, first, count);
  }
  return {sum.acc, float(1 << (8 - at.bits())) / float(kScaleUnit)};
}

/// A rung of MWQ at a tile: scales come before every two tiles of the base, and before every four of a rung of signs.
template <int Width>
struct MwqRung {
  static constexpr int kTiles = Width == 1 ? 4 : 2;
  const uint8_t* scales;
  const uint8_t* codes;

  __device__ __forceinline__ MwqRung(const uint8_t* rung, int cols, int block, int tile) {
    scales = rung + size_t(block) * mwq_block_bytes(cols, Width, Width != 1) + tile / kTiles * kScaleBytes +
             size_t(tile / kTiles * kTiles) * tile_bytes(Width, false);
    codes = scales + kScaleBytes + tile % kTiles * tile_bytes(Width, false);
  }
  /// A row's scale in a rung of signs.
  __device__ __forceinline__ float sign(int tile, int row) const {
    return load_f16(scales, tile / 2 % 2 * kTileRows + row);
  }
  /// part = part + scale * (the rung's codes times x), for each of n tokens.
  template <int T>
  __device__ __forceinline__ void add(const QuantizedRows& x, int n, int tile, const Seat& seat, float scale,
                                      float* parts) const {
    uint32_t fields[kSteps] = {};
    append_rung(codes, Width, seat.half, seat.row, fields);
    EDGEMOE_UNROLL
    for (int t = 0; t < T; ++t) {
      if (t >= n) break;
      const size_t at = size_t(t) * x.tiles + tile;
      const Half half(x.codes + at * kTileCols + seat.half * kActivations, x.sums + at * kSums + 2 * seat.half);
      int dot = 0;
      EDGEMOE_UNROLL
      for (int s = 0; s < kSteps; ++s) dot = dot4(fields[s], half.x[s], dot);
      parts[t] = fmaf(scale, float(dot), parts[t]);
    }
  }
};

/// `nested_block` for MWQ with a base of Base bits.
template <int Base, int T>
__device__ __forceinline__ RowSum mwq_block(const NestedMatrix& w, const QuantizedRows& x, int n, int block,
                                            float* shared) {
  const Seat seat;
  Sum<T> sum;
  for (int first = 0; first < x.tiles; first += kSegment) {
    const int count = min(kSegment, x.tiles - first);
    for (int g = seat.warp; g < count; g += kWarps) {
      const int tile = first + g;
      const MwqRung<Base> base(w.rungs[0], w.cols, block, tile);
      float lowest = load_f16(base.scales, kTileRows + seat.row);
      for (int r = 1; r < w.num_rungs; ++r) {
        lowest = lowest - MwqRung<1>(w.rungs[r], w.cols, block, tile).sign(tile, seat.row);
      }
      float parts[T];
      EDGEMOE_UNROLL
      for (int t = 0; t < T; ++t) {
        if (t >= n) break;
        const float* sums = x.sums + (size_t(t) * x.tiles + tile) * kSums + 2 * seat.half;
        parts[t] = lowest * (__ldg(sums) + __ldg(sums + 1));
      }
      base.template add<T>(x, n, tile, seat, load_f16(base.scales, seat.row), parts);
      for (int r = 1; r < w.num_rungs; ++r) {
        const MwqRung<1> rung(w.rungs[r], w.cols, block, tile);
        const float sign = rung.sign(tile, seat.row);
        rung.template add<T>(x, n, tile, seat, sign + sign, parts);
      }
      EDGEMOE_UNROLL
      for (int t = 0; t < T; ++t) {
        if (t < n) shared[shares_of(t) + (g * kScales + seat.half) * kTileRows + seat.row] = parts[t];
      }
    }
    sum.add(x, n, shared, first, count);
  }
  return {sum.acc, 0};
}

/// Whether the rungs are the first ones of the default ladder.
__device__ __forceinline__ bool is_default(const NestedMatrix& w) {
  constexpr uint32_t ladder = 0x22112;  // a digit for each rung, from the right
  bool yes = w.num_rungs <= 5;
  for (int r = 0; r < 5; ++r) yes = yes && (r >= w.num_rungs || w.widths[r] == (ladder >> (4 * r) & 15));
  return yes;
}

/// The sum of this thread's row and token, whatever rungs the matrix has.
template <int T>
__device__ __forceinline__ RowSum sum_of(const NestedMatrix& w, const QuantizedRows& x, int n, int block,
                                         float* shared) {
  if (w.scheme == Scheme::kMwq) {
    if (w.widths[0] == 2) return mwq_block<2, T>(w, x, n, block, shared);
    return mwq_block<5, T>(w, x, n, block, shared);
  }
  switch (is_default(w) ? w.num_rungs : 0) {
    case 1:
      return nested_block<LadderTiles<Rungs<2>>, T>(w, x, n, block, shared);
    case 2:
      return nested_block<LadderTiles<Rungs<2, 1>>, T>(w, x, n, block, shared);
    case 3:
      return nested_block<LadderTiles<Rungs<2, 1, 1>>, T>(w, x, n, block, shared);
    case 4:
      return nested_block<LadderTiles<Rungs<2, 1, 1, 2>>, T>(w, x, n, block, shared);
    case 5:
      return nested_block<LadderTiles<Rungs<2, 1, 1, 2, 2>>, T>(w, x, n, block, shared);
    default:
      return nested_block<AnyTiles, T>(w, x, n, block, shared);
  }
}

/// Rows [16 * block, 16 * block + 16) of a product with tokens [token, token + T). `shared` has `shares_of(T)` floats.
template <int T>
__device__ __forceinline__ void product_block(const Product& p, int block, int token, float* shared) {
  const NestedMatrix& w = p.w;
  const int n = min(p.n - token, T);
  if (block * kTileRows >= w.rows || n <= 0) return;  // the whole block
  const int head = p.heads > 1 ? block / (w.rows / kTileRows / p.heads) : 0, from = head * p.n + token;
  const RowSum sum = sum_of<T>(w, rows_from(p.x, from), n, block, shared);
  const int t = threadIdx.x / kTileRows, row = block * kTileRows + threadIdx.x % kTileRows;
  if (t >= T || t >= n || row >= w.rows) return;
  const float scale = sum.unit != 0 ? load_f16(row_scales_of(w), row) * sum.unit : 1;
  float* y = p.y + size_t(token) * p.stride + head * (p.head_stride - w.rows / p.heads);
  y[size_t(t) * p.stride + row] = finish_row(p, from + t, row, scale, sum.acc);
}

/// Grid: (row blocks of the largest product, products, tokens / T). Each product may have its own rungs. For several
/// tokens nvcc needs a launch bound: left to itself it uses so few registers that some spill. For one token it must not
/// have a bound: with one it uses more than 64 registers.
template <int T>
__global__ void __launch_bounds__(kWarps * 32, T == 1 ? 0 : 4) products(ProductList list) {
  EDGEMOE_SHARED(float, shared, shares_of(T));
  product_block<T>(list.of[blockIdx.y], int(blockIdx.x), int(blockIdx.z) * T, shared);
}

/// Grid: (row blocks, experts and parts). Which matrices these are is known only on the device.
__global__ void __launch_bounds__(kWarps * 32) chosen_products(ChosenCall call) {
  EDGEMOE_SHARED(float, shared, shares_of(1));
  EDGEMOE_SHARED(uint64_t, room, sizeof(Product) / sizeof(uint64_t));
  static_assert(sizeof(Product) % sizeof(uint64_t) == 0 && std::is_trivially_copyable<Product>::value,
                "it lies in words");
  constexpr int kWords = int(sizeof(NestedMatrix) / sizeof(uint64_t));
  static_assert(sizeof(NestedMatrix) % sizeof(uint64_t) == 0 && offsetof(Product, w) == 0, "it comes first");
  Product& p = *reinterpret_cast<Product*>(room);
  const int k = int(blockIdx.y) / call.parts, part = int(blockIdx.y) % call.parts, e = call.experts[k];
  // Copied word by word, each by a thread: copied as a whole it would lie on a stack.
  const auto* w = reinterpret_cast<const uint64_t*>(call.table + 3 * e + call.first + part);
  if (threadIdx.x < kWords) room[threadIdx.x] = w[threadIdx.x];
  if (threadIdx.x == 0) {
    const float* bias = part ? call.bias[1] : call.bias[0];
    p.x = rows_from(call.x, call.is_shared ? 0 : k);
    p.y = (part ? call.y[1] : call.y[0]) + size_t(k) * call.rows;
    p.n = 1;
    p.stride = call.rows;
    p.bias = bias ? bias + size_t(e) * call.rows : nullptr;
    p.ranks = nullptr;
    p.heads = 1;
    p.head_stride = 0;
  }
  __syncthreads();
  product_block<1>(p, int(blockIdx.x), 0, shared);
}

}  // namespace cuda
}  // namespace edgemoe
