// Matrices in the scheme MWQ: a base and planes of signs, each rung with its own scales. Part of kernels-inl.h.
//
// Each rung is a matrix product of its own over the codes, so that this takes as many dot products as there are rungs;
// a float is added per rung, 16 rows and 32 columns, where the scales of weights and of activations are both constant.
#pragma once

#include "kernels-inl.h"

namespace edgemoe {
namespace {

/// A cursor over the tiles of a row block: pointers to each rung's codes, and the scales of the tile's group.
template <class V>
struct MwqCursor {
  const uint8_t* rungs[kMaxRungs];
  const uint16_t* signs[kMaxRungs];  ///< the group's scales in a rung of signs
  size_t strides[kMaxRungs];
  int num_rungs;
  /// A weight's share of the sum is scale * code; a plane's code is 0 or 1, so that its scale is twice the sign's.
  typename V::F scale[kMaxRungs];
  typename V::F lowest;  ///< what a weight is with all codes 0

  MwqCursor(const NestedMatrix& w, int row_block) : num_rungs(w.num_rungs), lowest(V::zero()) {
    scale[0] = V::zero();  // until `enter`
    for (int r = 0; r < num_rungs; ++r) {
      strides[r] = tile_bytes(w.widths[r], false);
      rungs[r] = w.rungs[r] + row_block * mwq_block_bytes(w.cols, w.widths[r], r == 0);
    }
  }

  /// Loads the scales before tile `g`, if there are any. Must be called for every tile in turn, before its codes are
  /// used.
  void enter(int g) {
    constexpr int kTiles = kMwqGroup / kTileCols;
    if (g % kTiles) return;
    const uint16_t* base = take(0);
    scale[0] = V::load_f16(base);
    lowest = V::load_f16(base + kTileRows);
    for (int r = 1; r < num_rungs; ++r) {
      signs[r] = g % (2 * kTiles) ? signs[r] + kTileRows : take(r);
      const auto sign = V::load_f16(signs[r]);
      scale[r] = V::add(sign, sign);
      lowest = V::sub(lowest, sign);
    }
  }

  void next() {
    for (int r = 0; r < num_rungs; ++r) rungs[r] += strides[r];
  }

 private:
  const uint16_t* take(int r) {
    const auto* scales = reinterpret_cast<const uint16_t*>(rungs[r]);
    rungs[r] += kScaleBytes;
    return scales;
  }
};

/// A part's first addend, the share of `lowest`: the sums are of 16 columns each.
template <class V>
inline typename V::F mwq_start(typename V::F lowest, const float* x_sums) {
  return V::mul(lowest, V::set(x_sums[0] + x_sums[1]));
}

/// One token and one rung of W bits: parts[i] += scale * dot over the columns of each scale of activations.
template <class V, int W>
inline void mwq_add_rung(typename V::F* parts, typename V::F scale, const uint8_t* rung, const int8_t* x) {
  // Hardware prefetchers lose track as rungs take turns: with four rungs, this doubles the speed.
  constexpr int kAhead = 8;  // tiles
  for (int at = 0; at < 128 * W; at += 64) __builtin_prefetch(rung + kAhead * 128 * W + at);
  typename V::I dots[kSums];
  dot_quarters<V, Plain<W>, false>(dots, &rung, x);
  for (int i = 0; i < kScales; ++i) {
    parts[i] = V::fma(scale, V::to_float(V::add_ints(dots[2 * i], dots[2 * i + 1])), parts[i]);
  }
}

template <class V, int Base>
void matvec_mwq(const NestedMatrix& w, const QuantizedRows& x, int begin, int end, float* y) {
  for (int block = begin; block < end; ++block) {
    MwqCursor<V> tile(w, block);
    auto acc = V::zero();
    for (int g = 0; g < x.tiles; ++g, tile.next()) {
      tile.enter(g);
      const int8_t* codes = x.codes + g * kTileCols;
      typename V::F parts[kScales];
      for (int i = 0; i < kScales; ++i) parts[i] = mwq_start<V>(tile.lowest, x.sums + kSums * g + 2 * i);
      mwq_add_rung<V, Base>(parts, tile.scale[0], tile.rungs[0], codes);
      for (int r = 1; r < w.num_rungs; ++r) mwq_add_rung<V, 1>(parts, tile.scale[r], tile.rungs[r], codes);
      for (int i = 0; i < kScales; ++i) acc = V::fma(V::set(x.scales[kScales * g + i]), parts[i], acc);
    }
    store_rows<V>(y + block * kTileRows, acc, w.rows - block * kTileRows);
  }
}

/// N tokens against an unpacked tile [num_rungs, 1024]: the same sums in the same order as one token's.
template <class V, int N>
inline void mwq_dot_tile(const uint8_t* codes, const MwqCursor<V>& tile, const int8_t* const* x,
                         const float* const* x_scales, const float* const* x_sums, float* acc) {
  for (int half = 0; half < kScales; ++half) {
    typename V::F parts[N];
    for (int i = 0; i < N; ++i) parts[i] = mwq_start<V>(tile.lowest, x_sums[i] + 2 * half);
    const uint8_t* rung = codes;
    for (int r = 0; r < tile.num_rungs; ++r, rung += kTileRows * kTileCols) {
      typename V::I dots[N];
      for (int i = 0; i < N; ++i) dots[i] = V::zero_ints();
      for (int step = 8 * half, end = step + 8; step < end; ++step) {
        const auto field = V::load_bytes(rung + 64 * step);
        for (int i = 0; i < N; ++i) dots[i] = V::template dot<false>(dots[i], field, x[i] + 4 * step);
      }
      for (int i = 0; i < N; ++i) parts[i] = V::fma(tile.scale[r], V::to_float(dots[i]), parts[i]);
    }
    for (int i = 0; i < N; ++i) {
      float* a = acc + i * kTileRows;
      V::store(a, V::fma(V::set(x_scales[i][half]), parts[i], V::load(a)));
    }
  }
}

template <class V, int Base>
inline void mwq_unpack(const MwqCursor<V>& tile, uint8_t* codes) {
  unpack<V, Plain<Base>>(&tile.rungs[0], codes);
  for (int r = 1; r < tile.num_rungs; ++r) {
    unpack<V, Plain<1>>(&tile.rungs[r], codes + r * kTileRows * kTileCols);
  }
}

template <class V, int Base>
void matmul_mwq_blocked(const NestedMatrix& w, const QuantizedRows& x, int n, int begin, int end, float* y,
                        size_t stride) {
  constexpr int kTokens = 64;  // their sums, 4 KiB, stay in the first-level cache
  constexpr int N = V::kTokensAtOnce;
  alignas(64) uint8_t codes[kMaxRungs * kTileRows * kTileCols];
  alignas(64) float acc[kTokens * kTileRows];
  for (int block = begin; block < end; ++block) {
    for (int first = 0; first < n; first += kTokens) {
      const int count = n - first < kTokens ? n - first : kTokens;
      for (int i = 0; i < count; ++i) V::store(acc + i * kTileRows, V::zero());
      MwqCursor<V> tile(w, block);
      for (int g = 0; g < x.tiles; ++g, tile.next()) {
        tile.enter(g);
        mwq_unpack<V, Base>(tile, codes);
        over_tokens<N>(
            x, first, count, g, acc,
            [&](auto n, const int8_t* const* rows, const float* const* x_scales, const float* const* x_sums,
                float* sums) { mwq_dot_tile<V, decltype(n)::value>(codes, tile, rows, x_scales, x_sums, sums); });
      }
      for (int i = 0; i < count; ++i) {
        store_rows<V>(y + (first + i) * stride + block * kTileRows, V::load(acc + i * kTileRows),
                      w.rows - block * kTileRows);
      }
    }
  }
}

template <class V, int Base>
void matmul_mwq_based(const NestedMatrix& w, const QuantizedRows& x, int n, int begin, int end, float* y,
                      size_t stride) {
  if (n == 1) return matvec_mwq<V, Base>(w, x, begin, end, y);
  matmul_mwq_blocked<V, Base>(w, x, n, begin, end, y, stride);
}

template <class V>
void matmul_mwq(const NestedMatrix& w, const QuantizedRows& x, int n, int begin, int end, float* y, size_t stride) {
  if (w.widths[0] == 2) return matmul_mwq_based<V, 2>(w, x, n, begin, end, y, stride);
  matmul_mwq_based<V, 5>(w, x, n, begin, end, y, stride);
}

template <class V>
void decode_mwq(const NestedMatrix& w, int row, float* out) {
  const int lane = row % kTileRows, tiles = blocks(w.cols, kTileCols);
  alignas(64) uint8_t codes[kMaxRungs * kTileRows * kTileCols];
  alignas(64) float scales[kMaxRungs * kTileRows], lowest[kTileRows];
  MwqCursor<V> tile(w, row / kTileRows);
  for (int g = 0; g < tiles; ++g, tile.next()) {
    tile.enter(g);
    if (w.widths[0] == 2) {
      mwq_unpack<V, 2>(tile, codes);
    } else {
      mwq_unpack<V, 5>(tile, codes);
    }
    V::store(lowest, tile.lowest);
    for (int r = 0; r < w.num_rungs; ++r) V::store(scales + r * kTileRows, tile.scale[r]);
    for (int c = 0; c < kTileCols && g * kTileCols + c < w.cols; ++c) {
      float sum = lowest[lane];
      for (int r = 0; r < w.num_rungs; ++r) {
        sum += scales[r * kTileRows + lane] * float(codes[r * kTileRows * kTileCols + c / 4 * 64 + lane * 4 + c % 4]);
      }
      out[g * kTileCols + c] = sum;
    }
  }
}

}  // namespace
}  // namespace edgemoe
