// Matrices of 4-bit floats, E2M1, with the scales that they are released with. Part of kernels-inl.h.
//
// A code stands for a number of halves, which plus 12 is an unsigned byte, so that dot products are of integers as for
// other codes. The sum of the activations times 12 is then subtracted.
#pragma once

#include "kernels-inl.h"

namespace edgemoe {
namespace {

/// Halves plus 12 of the codes 0 to 15: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below zero.
alignas(64) constexpr uint8_t kHalves[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr int kNoHalves = 12;

/// The form of a matrix: how many columns share a scale, and what comes before a row block.
struct Mxfp4 {
  static constexpr int kScaleCols = 32;
  static constexpr int kHeader = 0;  ///< bytes before a row block
};
struct Nvfp4 {
  static constexpr int kScaleCols = 16;
  static constexpr int kHeader = kTileRows * 4;
};

/// Half the scales of 16 rows, as codes count halves: E8M0, whose 0 is 2^-127, or E4M3.
template <class V, class Form>
inline typename V::F float_scales(const uint8_t* bytes) {
  alignas(64) uint32_t bits[kTileRows];
  alignas(64) float values[kTileRows];
  if constexpr (Form::kScaleCols == 32) {
    for (int r = 0; r < kTileRows; ++r) bits[r] = bytes[r] ? uint32_t(bytes[r]) << 23 : uint32_t(1) << 22;
    __builtin_memcpy(values, bits, sizeof bits);
    return V::mul(V::load(values), V::set(0.5f));
  } else {
    // Its fields as those of a float32 give a number 2^120 times too small, even where it is subnormal.
    for (int r = 0; r < kTileRows; ++r) bits[r] = uint32_t(bytes[r]) << 20;
    __builtin_memcpy(values, bits, sizeof bits);
    return V::mul(V::load(values), V::set(0x1p119f));
  }
}

/// A cursor over the tiles of a row block.
template <class V, class Form>
struct FloatCursor {
  const uint8_t* codes;
  typename V::F of_rows;  ///< by which all scales of a row are multiplied
  typename V::F scales[kTileCols / Form::kScaleCols];

  FloatCursor(const NestedMatrix& w, int row_block)
      : codes(w.rungs[0] + row_block * float4_block_bytes(w.scheme, w.cols)), of_rows(V::set(1)), scales_at_(nullptr) {
    for (auto& scale : scales) scale = V::zero();  // until `enter`
    if constexpr (Form::kHeader > 0) {
      alignas(64) float all[kTileRows];
      __builtin_memcpy(all, codes, sizeof all);
      of_rows = V::load(all);
      codes += Form::kHeader;
    }
  }

  /// Loads the scales of tile `g`. Must be called for every tile in turn, before its codes are used.
  void enter(int g) {
    constexpr int kBytes = kTileCols / Form::kScaleCols * kTileRows;  // of a tile
    if (g % (kScaleBytes / kBytes) == 0) {
      scales_at_ = codes;
      codes += kScaleBytes;
    }
    for (auto& scale : scales) {
      scale = float_scales<V, Form>(scales_at_);
      scales_at_ += kTileRows;
    }
  }

  void next() { codes += tile_bytes(4, false); }

 private:
  const uint8_t* scales_at_;
};

/// acc + x_scale * the share of 32 columns, of which `first` and `second` are the dot products of 16 each.
template <class V, class Form>
inline typename V::F float_add(typename V::F acc, typename V::I first, typename V::I second,
                               const typename V::F* scales, float x_scale, const float* x_sums) {
  const auto less = V::set(-float(kNoHalves));
  if constexpr (Form::kScaleCols == 32) {
    const auto sum = V::fma(less, V::set(x_sums[0] + x_sums[1]), V::to_float(V::add_ints(first, second)));
    return V::fma(V::set(x_scale), V::mul(scales[0], sum), acc);
  } else {
    const auto a = V::fma(less, V::set(x_sums[0]), V::to_float(first));
    const auto b = V::fma(less, V::set(x_sums[1]), V::to_float(second));
    return V::fma(V::set(x_scale), V::fma(scales[1], b, V::mul(scales[0], a)), acc);
  }
}

/// Unpacks two steps of a tile, whose codes are the 64 bytes at `both`.
template <class V>
inline void float_steps(const uint8_t* both, typename V::B* first, typename V::B* second) {
  const auto bytes = V::load_bytes(both);
  *first = V::lookup(kHalves, field<V, 4, 0>(bytes));
  *second = V::lookup(kHalves, field<V, 4, 4>(bytes));
}

template <class V, class Form>
void matvec_float4(const NestedMatrix& w, const QuantizedRows& x, int begin, int end, float* y) {
  constexpr int kScalesOfHalf = kActivations / Form::kScaleCols;
  for (int block = begin; block < end; ++block) {
    FloatCursor<V, Form> tile(w, block);
    auto acc = V::zero();
    for (int g = 0; g < x.tiles; ++g, tile.next()) {
      tile.enter(g);
      constexpr int kAhead = 8;  // tiles
      for (int at = 0; at < 512; at += 64) __builtin_prefetch(tile.codes + kAhead * 512 + at);
      for (int half = 0; half < kScales; ++half) {
        typename V::I dots[2] = {V::zero_ints(), V::zero_ints()};
        for (int pair = 0; pair < 4; ++pair) {
          typename V::B codes[2];
          float_steps<V>(tile.codes + 64 * (4 * half + pair), codes, codes + 1);
          const int8_t* at = x.codes + g * kTileCols + 32 * half + 8 * pair;
          for (int i = 0; i < 2; ++i) {
            dots[pair / 2] = V::template dot<false>(dots[pair / 2], codes[i], at + 4 * i);
          }
        }
        acc = float_add<V, Form>(acc, dots[0], dots[1], tile.scales + kScalesOfHalf * half,
                                 x.scales[kScales * g + half], x.sums + kSums * g + 2 * half);
      }
    }
    store_rows<V>(y + block * kTileRows, V::mul(tile.of_rows, acc), w.rows - block * kTileRows);
  }
}

/// N tokens against an unpacked tile: the same sums in the same order as one token's.
template <class V, class Form, int N>
inline void float_dot_tile(const uint8_t* codes, const typename V::F* scales, const int8_t* const* x,
                           const float* const* x_scales, const float* const* x_sums, float* acc) {
  constexpr int kScalesOfHalf = kActivations / Form::kScaleCols;
  for (int half = 0; half < kScales; ++half) {
    typename V::I dots[N][2];
    for (int i = 0; i < N; ++i) dots[i][0] = dots[i][1] = V::zero_ints();
    for (int step = 8 * half, end = step + 4; step < end; ++step) {
      const auto first = V::load_bytes(codes + 64 * step), second = V::load_bytes(codes + 64 * (step + 4));
      for (int i = 0; i < N; ++i) {
        dots[i][0] = V::template dot<false>(dots[i][0], first, x[i] + 4 * step);
        dots[i][1] = V::template dot<false>(dots[i][1], second, x[i] + 4 * (step + 4));
      }
    }
    for (int i = 0; i < N; ++i) {
      float* const a = acc + i * kTileRows;
      V::store(a, float_add<V, Form>(V::load(a), dots[i][0], dots[i][1], scales + kScalesOfHalf * half,
                                     x_scales[i][half], x_sums[i] + 2 * half));
    }
  }
}

template <class V>
inline void float_unpack(const uint8_t* plane, uint8_t* codes) {
  for (int pair = 0; pair < 8; ++pair) {
    typename V::B steps[2];
    float_steps<V>(plane + 64 * pair, steps, steps + 1);
    for (int i = 0; i < 2; ++i) V::store_bytes(codes + 64 * (2 * pair + i), steps[i]);
  }
}

template <class V, class Form>
void matmul_float4_blocked(const NestedMatrix& w, const QuantizedRows& x, int n, int begin, int end, float* y,
                           size_t stride) {
  constexpr int kTokens = 64;  // their sums, 4 KiB, stay in the first-level cache
  constexpr int N = V::kTokensAtOnce;
  alignas(64) uint8_t codes[kTileRows * kTileCols];
  alignas(64) float acc[kTokens * kTileRows];
  for (int block = begin; block < end; ++block) {
    for (int first = 0; first < n; first += kTokens) {
      const int count = n - first < kTokens ? n - first : kTokens;
      for (int i = 0; i < count; ++i) V::store(acc + i * kTileRows, V::zero());
      FloatCursor<V, Form> tile(w, block);
      for (int g = 0; g < x.tiles; ++g, tile.next()) {
        tile.enter(g);
        float_unpack<V>(tile.codes, codes);
        over_tokens<N>(x, first, count, g, acc,
                       [&](auto n, const int8_t* const* rows, const float* const* x_scales, const float* const* x_sums,
                           float* sums) {
                         float_dot_tile<V, Form, decltype(n)::value>(codes, tile.scales, rows, x_scales, x_sums, sums);
                       });
      }
      for (int i = 0; i < count; ++i) {
        store_rows<V>(y + (first + i) * stride + block * kTileRows, V::mul(tile.of_rows, V::load(acc + i * kTileRows)),
                      w.rows - block * kTileRows);
      }
    }
  }
}

template <class V, class Form>
void decode_float4_form(const NestedMatrix& w, int row, float* out) {
  const int lane = row % kTileRows, tiles = blocks(w.cols, kTileCols);
  alignas(64) uint8_t codes[kTileRows * kTileCols];
  alignas(64) float scales[kTileRows], of_rows[kTileRows];
  FloatCursor<V, Form> tile(w, row / kTileRows);
  V::store(of_rows, tile.of_rows);
  for (int g = 0; g < tiles; ++g, tile.next()) {
    tile.enter(g);
    float_unpack<V>(tile.codes, codes);
    for (int c = 0; c < kTileCols && g * kTileCols + c < w.cols; ++c) {
      V::store(scales, tile.scales[c / Form::kScaleCols]);
      const int halves = int(codes[c / 4 * 64 + lane * 4 + c % 4]) - kNoHalves;
      out[g * kTileCols + c] = of_rows[lane] * (scales[lane] * float(halves));
    }
  }
}

template <class V>
void matmul_float4(const NestedMatrix& w, const QuantizedRows& x, int n, int begin, int end, float* y, size_t stride) {
  if (w.scheme == Scheme::kMxfp4) {
    if (n == 1) return matvec_float4<V, Mxfp4>(w, x, begin, end, y);
    return matmul_float4_blocked<V, Mxfp4>(w, x, n, begin, end, y, stride);
  }
  if (n == 1) return matvec_float4<V, Nvfp4>(w, x, begin, end, y);
  matmul_float4_blocked<V, Nvfp4>(w, x, n, begin, end, y, stride);
}

template <class V>
void decode_float4(const NestedMatrix& w, int row, float* out) {
  if (w.scheme == Scheme::kMxfp4) return decode_float4_form<V, Mxfp4>(w, row, out);
  decode_float4_form<V, Nvfp4>(w, row, out);
}

}  // namespace
}  // namespace edgemoe
