// The algorithms of every instruction set, over a vector type V: 16 floats (F), 16 ints (I), 64 bytes (B).
//
// An ISA file defines V in an anonymous namespace, includes this and fills its table. It may include nothing else of
// the standard library: an inline function compiled here with wide instructions could replace the baseline's copy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codes-inl.h"
#include "kernels.h"

namespace edgemoe {
namespace {

// ---------------------------------------------------------------- matrix products

/// A cursor over the tiles of a row block: pointers to each rung's tile, past the scales, and to the scales.
struct TileCursor {
  const uint8_t* rungs[kMaxRungs];
  size_t strides[kMaxRungs];
  const uint8_t* scales;
  const uint16_t* row_scales;
  int num_rungs;

  TileCursor(const NestedMatrix& w, int row_block, int groups) : num_rungs(w.num_rungs) {
    for (int r = 0; r < num_rungs; ++r) {
      strides[r] = tile_bytes(w.widths[r], r == 0);
      rungs[r] = tiles_of(w, r) + size_t(row_block) * groups * strides[r];
    }
    row_scales = reinterpret_cast<const uint16_t*>(row_scales_of(w)) + row_block * kTileRows;
    scales = rungs[0];
    rungs[0] += kScaleBytes;
  }

  void next() {
    for (int r = 0; r < num_rungs; ++r) rungs[r] += strides[r];
    scales += strides[0];
  }
};

/// The factors of the rows' sums at the end: the row scales, for a code of `bits` bits.
template <class V>
inline typename V::F row_scales(const TileCursor& tile, int bits) {
  return V::mul(V::load_f16(tile.row_scales), V::set(float(1 << (8 - bits)) / float(kScaleUnit)));
}

/// Scale and middle of a group for 16 rows such that w = row scale * (scale * (code + middle)), all but w exact.
template <class V>
inline void group_scales(const uint8_t* group, int bits, typename V::F* scale, typename V::F* middle) {
  const float step = float(kMiddleStep) / float(1 << (8 - bits));
  V::load_scales(group, step, 0.5f - float(1 << (bits - 1)) - 8 * step, scale, middle);
}

/// acc + x_scale * the share of two groups: sum of scale * (dot + middle * sum of x's codes).
template <class V>
inline typename V::F add_groups(typename V::F acc, const typename V::I* dots, const typename V::F* scales,
                                const typename V::F* middles, float x_scale, const float* x_sums) {
  const auto a = V::fma(middles[0], V::set(x_sums[0]), V::to_float(dots[0]));
  const auto b = V::fma(middles[1], V::set(x_sums[1]), V::to_float(dots[1]));
  return V::fma(V::set(x_scale), V::fma(scales[1], b, V::mul(scales[0], a)), acc);
}

/// The factor A of a matrix's correction; no steps where it has none.
struct Factor {
  const uint8_t* codes;
  int steps;  ///< of kRankStep columns, each 64 bytes for 16 rows

  explicit Factor(const NestedMatrix& w) : codes(nullptr), steps(rank_of(w) / kRankStep) {
    if (steps) codes = correction_of(w) + 2 * kMaxRank;
  }

  /// Prefetches a row block's codes: they lie behind all tiles, where no hardware prefetcher expects them.
  [[gnu::always_inline]] void fetch(int block) const {
    for (int s = 0; s < steps; ++s) __builtin_prefetch(codes + 64 * (size_t(block) * steps + s), 0, 3);
  }
};

/// acc + A z of a row block, in steps of its rows' scales.
template <class V>
inline typename V::F add_ranks(typename V::F acc, const Factor& factor, int block, const RankRow& z) {
  auto dots = V::zero_ints();
  for (int s = 0; s < factor.steps; ++s) {
    const auto both = V::load_bytes(factor.codes + 64 * (size_t(block) * factor.steps + s));
    dots = V::template dot<false>(dots, field<V, 4, 0>(both), z.codes + kRankStep * s);
    dots = V::template dot<false>(dots, field<V, 4, 4>(both), z.codes + kRankStep * s + kRankStep / 2);
  }
  return V::fma(V::set(z.scale), V::sub(V::to_float(dots), V::set(7.5f * z.sum)), acc);
}

template <class V>
inline void store_rows(float* y, typename V::F value, int rows) {
  if (rows >= kTileRows) return V::store(y, value);
  alignas(64) float all[kTileRows];
  V::store(all, value);
  for (int i = 0; i < rows; ++i) y[i] = all[i];
}

/// Prefetches the tile that comes kAhead tiles later. Hardware prefetchers do not cross pages, and are slow to detect
/// the streams of several rungs. Always inlined, as GCC takes a function that only prefetches for one without an effect
/// and drops calls of it that it has not inlined early.
template <int Bits, int R = 0, int Before = 0>
[[gnu::always_inline]] inline void fetch_ahead(const TileCursor& tile) {
  if constexpr (Before < Bits) {
    constexpr int kAhead = 16, kWidths[] = {2, 1, 1, 2, 2}, kBytes = 128 * kWidths[R] + (R == 0 ? kScaleBytes : 0);
    const uint8_t* later = (R == 0 ? tile.scales : tile.rungs[R]) + kAhead * kBytes;
    for (int at = 0; at < kBytes; at += 64) __builtin_prefetch(later + at, 0, 2);
    fetch_ahead<Bits, R + 1, Before + kWidths[R]>(tile);
  }
}

/// One token: codes go from the planes straight into the dot product. z is used if the matrix has a correction.
template <class V, int Bits>
void matvec(const NestedMatrix& w, const QuantizedRows& x, const RankRow* z, int begin, int end, float* y) {
  const Factor factor(w);
  for (int block = begin; block < end; ++block) {
    factor.fetch(block);
    TileCursor tile(w, block, x.tiles);
    const auto row_scale = row_scales<V>(tile, Bits);
    auto acc = V::zero();
    for (int g = 0; g < x.tiles; ++g, tile.next()) {
      fetch_ahead<Bits>(tile);
      typename V::F scales[kSums], middles[kSums];
      typename V::I dots[kSums];
      dot_quarters<V, Ladder<Bits>, (Bits > 7)>(dots, tile.rungs, x.codes + g * kTileCols);
      for (int i = 0; i < kSums; ++i) group_scales<V>(tile.scales + kGroup * i, Bits, scales + i, middles + i);
      for (int i = 0; i < kScales; ++i) {
        acc = add_groups<V>(acc, dots + 2 * i, scales + 2 * i, middles + 2 * i, x.scales[kScales * g + i],
                            x.sums + kSums * g + 2 * i);
      }
    }
    if (factor.steps) acc = add_ranks<V>(acc, factor, block, *z);
    store_rows<V>(y + block * kTileRows, V::mul(row_scale, acc), w.rows - block * kTileRows);
  }
}

/// N tokens against one unpacked tile: acc[i] += token i's share, in the order of `add_groups`.
template <class V, int N, bool kWide>
inline void dot_tile(const uint8_t* tile, const typename V::F* scales, const typename V::F* middles,
                     const int8_t* const* x, const float* const* x_scales, const float* const* x_sums, float* acc) {
  typename V::F sums[N];
  for (int i = 0; i < N; ++i) sums[i] = V::load(acc + i * kTileRows);
  for (int half = 0; half < kScales; ++half) {
    typename V::I dots[N][2];
    for (int i = 0; i < N; ++i) dots[i][0] = dots[i][1] = V::zero_ints();
    for (int step = 8 * half, end = step + 4; step < end; ++step) {
      const auto first = V::load_bytes(tile + 64 * step), second = V::load_bytes(tile + 64 * (step + 4));
      for (int i = 0; i < N; ++i) {
        dots[i][0] = V::template dot<kWide>(dots[i][0], first, x[i] + 4 * step);
        dots[i][1] = V::template dot<kWide>(dots[i][1], second, x[i] + 4 * (step + 4));
      }
    }
    for (int i = 0; i < N; ++i) {
      sums[i] = add_groups<V>(sums[i], dots[i], scales + 2 * half, middles + 2 * half, x_scales[i][half],
                              x_sums[i] + 2 * half);
    }
  }
  for (int i = 0; i < N; ++i) V::store(acc + i * kTileRows, sums[i]);
}

template <int N>
struct Count {
  static constexpr int value = N;
};

/// Calls dot(Count<n>, codes, scales, sums, acc) for tile g of tokens [first, first + count): N tokens at once, the
/// remaining ones one by one. `acc` starts with the first token's sums.
template <int N, class Dot>
inline void over_tokens(const QuantizedRows& x, int first, int count, int g, float* acc, Dot dot) {
  for (int i = 0; i < count; i += N) {
    const int here = count - i < N ? count - i : N;
    const int8_t* rows[N];
    const float *scales[N], *sums[N];
    for (int j = 0; j < here; ++j) {
      const size_t at = size_t(first + i + j) * x.tiles + g;
      rows[j] = x.codes + at * kTileCols;
      scales[j] = x.scales + at * kScales;
      sums[j] = x.sums + at * kSums;
    }
    float* a = acc + i * kTileRows;
    if (here == N) {
      dot(Count<N>(), rows, scales, sums, a);
    } else {
      for (int j = 0; j < here; ++j) dot(Count<1>(), rows + j, scales + j, sums + j, a + j * kTileRows);
    }
  }
}

/// Many tokens: each tile is unpacked once for up to kTokens of them. Same sums as `matvec`, bit for bit.
template <class V, bool kWide, class Unpack>
void matmul_blocked(const NestedMatrix& w, const QuantizedRows& x, const RankRow* z, int n, int begin, int end,
                    float* y, size_t stride, Unpack unpack) {
  constexpr int kTokens = 64;  // their sums, 4 KiB, stay in the first-level cache
  constexpr int N = V::kTokensAtOnce;
  const int bits = bits_of(w);
  const Factor factor(w);
  alignas(64) uint8_t codes[kTileRows * kTileCols];
  alignas(64) float acc[kTokens * kTileRows];
  for (int block = begin; block < end; ++block) {
    factor.fetch(block);
    for (int first = 0; first < n; first += kTokens) {
      const int count = n - first < kTokens ? n - first : kTokens;
      for (int i = 0; i < count; ++i) V::store(acc + i * kTileRows, V::zero());
      TileCursor tile(w, block, x.tiles);
      const auto row_scale = row_scales<V>(tile, bits);
      for (int g = 0; g < x.tiles; ++g, tile.next()) {
        unpack(tile.rungs, codes);
        typename V::F scales[kSums], middles[kSums];
        for (int i = 0; i < kSums; ++i) group_scales<V>(tile.scales + kGroup * i, bits, scales + i, middles + i);
        over_tokens<N>(x, first, count, g, acc,
                       [&](auto n, const int8_t* const* rows, const float* const* x_scales, const float* const* x_sums,
                           float* sums) {
                         dot_tile<V, decltype(n)::value, kWide>(codes, scales, middles, rows, x_scales, x_sums, sums);
                       });
      }
      for (int i = 0; i < count; ++i) {
        auto sum = V::load(acc + i * kTileRows);
        if (factor.steps) sum = add_ranks<V>(sum, factor, block, z[first + i]);
        store_rows<V>(y + (first + i) * stride + block * kTileRows, V::mul(row_scale, sum), w.rows - block * kTileRows);
      }
    }
  }
}

template <class V, int Bits>
void matmul_known(const NestedMatrix& w, const QuantizedRows& x, const RankRow* z, int n, int begin, int end, float* y,
                  size_t stride) {
  if (n == 1) return matvec<V, Bits>(w, x, z, begin, end, y);
  matmul_blocked<V, (Bits > 7)>(w, x, z, n, begin, end, y, stride, [](const uint8_t* const* rungs, uint8_t* tile) {
    unpack<V, Ladder<Bits>>(rungs, tile);
  });
}

/// The prefixes of the default ladder have specialised code; any other ladder works, but slower.
template <class V>
void matmul_nested(const NestedMatrix& w, const QuantizedRows& x, const RankRow* z, int n, int begin, int end, float* y,
                   size_t stride) {
  constexpr uint8_t ladder[] = {2, 1, 1, 2, 2};
  bool known = w.num_rungs <= 5;
  for (int i = 0; known && i < w.num_rungs; ++i) known = w.widths[i] == ladder[i];
  if (known) {
    switch (w.num_rungs) {
      case 1:
        return matmul_known<V, 2>(w, x, z, n, begin, end, y, stride);
      case 2:
        return matmul_known<V, 3>(w, x, z, n, begin, end, y, stride);
      case 3:
        return matmul_known<V, 4>(w, x, z, n, begin, end, y, stride);
      case 4:
        return matmul_known<V, 6>(w, x, z, n, begin, end, y, stride);
      case 5:
        return matmul_known<V, 8>(w, x, z, n, begin, end, y, stride);
    }
  }
  const auto unpack = [&w](const uint8_t* const* rungs, uint8_t* tile) { unpack_any<V>(w, rungs, tile); };
  if (bits_of(w) > 7) return matmul_blocked<V, true>(w, x, z, n, begin, end, y, stride, unpack);
  matmul_blocked<V, false>(w, x, z, n, begin, end, y, stride, unpack);
}

template <class V>
void decode_nested(const NestedMatrix& w, int row, float* out) {
  const int bits = bits_of(w), lane = row % kTileRows, groups = blocks(w.cols, kTileCols);
  alignas(64) uint8_t codes[kTileRows * kTileCols];
  alignas(64) float scales[kTileRows], middles[kTileRows], of_rows[kTileRows];
  TileCursor tile(w, row / kTileRows, groups);
  V::store(of_rows, row_scales<V>(tile, bits));
  for (int g = 0; g < groups; ++g, tile.next()) {
    unpack_any<V>(w, tile.rungs, codes);
    for (int c = 0; c < kTileCols && g * kTileCols + c < w.cols; ++c) {
      if (c % kGroup == 0) {
        typename V::F scale, middle;
        group_scales<V>(tile.scales + c, bits, &scale, &middle);
        V::store(scales, scale);
        V::store(middles, middle);
      }
      const float code = float(codes[c / 4 * 64 + lane * 4 + c % 4]);
      out[g * kTileCols + c] = of_rows[lane] * (scales[lane] * (code + middles[lane]));
    }
  }
}

// ---------------------------------------------------------------- floats

/// The first n values of 16, the rest `fill`.
template <class V>
inline typename V::F load_part(const float* x, int n, float fill) {
  if (n >= 16) return V::load(x);
  alignas(64) float all[16];
  for (int i = 0; i < 16; ++i) all[i] = i < n ? x[i] : fill;
  return V::load(all);
}

template <class V>
inline void store_part(float* out, typename V::F value, int n) {
  if (n >= 16) return V::store(out, value);
  alignas(64) float all[16];
  V::store(all, value);
  for (int i = 0; i < n; ++i) out[i] = all[i];
}

template <class V>
void quantize_row(const float* x, int cols, int8_t* codes, float* scales, float* sums) {
  const int parts = blocks(cols, kTileCols) * kScales;
  for (int p = 0; p < parts; ++p, codes += kActivations, sums += kActivations / kGroup) {
    typename V::F v[2];
    auto top = V::zero(), poison = V::zero();
    for (int i = 0; i < 2; ++i) {
      const int start = p * kActivations + 16 * i, left = cols - start;
      v[i] = left >= 16 ? V::load(x + start) : load_part<V>(x + start, left < 0 ? 0 : left, 0.0f);
      top = V::max(top, V::abs(v[i]));
      poison = V::fma(v[i], V::zero(), poison);  // not 0 where a value is not finite
    }
    const float highest = V::reduce_max(top), poisoned = V::reduce_add(poison);
    // Below, 127 / highest would overflow; such a part is as good as zero.
    const bool is_zero = !(highest > 1e-30f) || poisoned != 0;
    const float inverse = is_zero ? 0.0f : 127.0f / highest;
    for (int i = 0; i < 2; ++i) {
      const auto q = is_zero ? V::zero_ints() : V::round_to_int(V::mul(v[i], V::set(inverse)));
      sums[i] = float(V::reduce_ints(q));
      V::store_i8(codes + 16 * i, q);
    }
    scales[p] = is_zero ? poisoned : highest / 127.0f;
  }
}

/// y[t][r] = w[r] · x[t] for N rows and T tokens at once, whose sums do not wait for each other; y's rows are `stride`
/// floats apart.
template <class V, int N, int T>
inline void dot_rows(const float* w, const float* x, int cols, float* y, size_t stride) {
  typename V::F acc[T][N];
  for (auto& of_token : acc) {
    for (auto& a : of_token) a = V::zero();
  }
  const auto step = [&](int c, int count) {
    typename V::F rows[N];
    for (int r = 0; r < N; ++r) rows[r] = load_part<V>(w + size_t(r) * cols + c, count, 0.0f);
    for (int t = 0; t < T; ++t) {
      const auto b = load_part<V>(x + size_t(t) * cols + c, count, 0.0f);
      for (int r = 0; r < N; ++r) acc[t][r] = V::fma(rows[r], b, acc[t][r]);
    }
  };
  int c = 0;
  for (; c + 16 <= cols; c += 16) step(c, 16);
  if (c < cols) step(c, cols - c);
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < N; ++r) y[t * stride + r] = V::reduce_add(acc[t][r]);
  }
}

/// The products of T tokens.
template <class V, int T>
inline void dot_tokens(const float* w, const float* x, int rows, int cols, int begin, int end, float* y) {
  constexpr int kRows = 4;
  int r = begin;
  for (; r + kRows <= end; r += kRows) dot_rows<V, kRows, T>(w + size_t(r) * cols, x, cols, y + r, size_t(rows));
  for (; r < end; ++r) dot_rows<V, 1, T>(w + size_t(r) * cols, x, cols, y + r, size_t(rows));
}

template <class V>
void matmul_f32(const float* w, const float* x, int n, int rows, int cols, int begin, int end, float* y) {
  constexpr int kTokens = V::kFloatTokens;  // whose sums of 4 rows fit the registers
  int i = 0;
  for (; i + kTokens <= n; i += kTokens) {
    dot_tokens<V, kTokens>(w, x + size_t(i) * cols, rows, cols, begin, end, y + size_t(i) * rows);
  }
  for (; i < n; ++i) dot_tokens<V, 1>(w, x + size_t(i) * cols, rows, cols, begin, end, y + size_t(i) * rows);
}

template <class V>
void rms_norm(const float* x, const float* weight, float eps, int cols, float* out) {
  auto acc = V::zero();
  int c = 0;
  for (; c + 16 <= cols; c += 16) {
    const auto v = V::load(x + c);
    acc = V::fma(v, v, acc);
  }
  if (c < cols) {
    const auto v = load_part<V>(x + c, cols - c, 0.0f);
    acc = V::fma(v, v, acc);
  }
  const float inverse = 1.0f / V::sqrt(V::reduce_add(acc) / float(cols) + eps);
  for (c = 0; c + 16 <= cols; c += 16) {
    V::store(out + c, V::mul(V::mul(V::load(x + c), V::set(inverse)), V::load(weight + c)));
  }
  for (; c < cols; ++c) out[c] = x[c] * inverse * weight[c];
}

/// e^x by range reduction and a polynomial of degree 6 (Cephes' coefficients). NaN stays NaN, so that no sigmoid or
/// softmax makes a number of it: where their second operand is NaN, min and max return it.
template <class V>
inline typename V::F exp(typename V::F x) {
  x = V::min(V::set(88.0f), V::max(V::set(-87.0f), x));
  const auto n = V::round(V::mul(x, V::set(1.44269504088896341f)));
  auto r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  auto p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(V::mul(p, r), r, V::add(r, V::set(1.0f)));
  return V::mul(p, V::power_of_two(n));
}

/// x * sigmoid(z)
template <class V>
inline typename V::F gated(typename V::F x, typename V::F z) {
  return V::div(x, V::add(V::set(1.0f), exp<V>(V::sub(V::zero(), z))));
}

template <class V, Activation kKind>
inline typename V::F activated(typename V::F gate, typename V::F up) {
  if constexpr (kKind == Activation::kSwiglu) return V::mul(gated<V>(gate, gate), up);
  if constexpr (kKind == Activation::kGeglu) {  // (1 + tanh(z / 2)) / 2 = sigmoid(z)
    constexpr float k = 1.5957691216057308f;    // 2 sqrt(2 / pi)
    const auto z = V::mul(V::fma(V::mul(gate, gate), V::set(k * 0.044715f), V::set(k)), gate);
    return V::mul(gated<V>(gate, z), up);
  }
  if constexpr (kKind == Activation::kClampedSwiglu) {
    // NaN stays NaN, as in `exp`.
    const auto g = V::min(V::set(7.0f), gate);
    const auto u = V::min(V::set(7.0f), V::max(V::set(-7.0f), up));
    return V::mul(gated<V>(g, V::mul(g, V::set(1.702f))), V::add(u, V::set(1.0f)));
  }
  const auto positive = V::max(V::zero(), up);
  return V::mul(positive, positive);
}

template <class V, Activation kKind>
void activate_as(const float* gate, const float* up, int n, float* out) {
  constexpr bool has_gate = kKind != Activation::kRelu2;
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    V::store(out + i, activated<V, kKind>(has_gate ? V::load(gate + i) : V::zero(), V::load(up + i)));
  }
  if (i < n) {
    const auto g = has_gate ? load_part<V>(gate + i, n - i, 0.0f) : V::zero();
    store_part<V>(out + i, activated<V, kKind>(g, load_part<V>(up + i, n - i, 0.0f)), n - i);
  }
}

template <class V>
void activate(Activation kind, const float* gate, const float* up, int n, float* out) {
  switch (kind) {
    case Activation::kSwiglu:
      return activate_as<V, Activation::kSwiglu>(gate, up, n, out);
    case Activation::kGeglu:
      return activate_as<V, Activation::kGeglu>(gate, up, n, out);
    case Activation::kClampedSwiglu:
      return activate_as<V, Activation::kClampedSwiglu>(gate, up, n, out);
    case Activation::kRelu2:
      return activate_as<V, Activation::kRelu2>(gate, up, n, out);
  }
}

template <class V>
void soft_cap(float* x, float cap, int n) {
  for (int i = 0; i < n; i += 16) {
    const int here = n - i < 16 ? n - i : 16;
    const auto v = load_part<V>(x + i, here, 0.0f);
    const auto e = exp<V>(V::mul(v, V::set(2.0f / cap)));  // tanh(y) = 1 - 2 / (1 + e^2y)
    const auto y = V::sub(V::set(cap), V::div(V::set(2 * cap), V::add(V::set(1.0f), e)));
    store_part<V>(x + i, V::fma(v, V::zero(), y), here);
  }
}

/// x[i] = exp(x[i] - max x) / sum for n >= 1; returns max x and the sum.
template <class V>
inline void softmax(float* x, int n, float* top, float* sum) {
  auto most = load_part<V>(x, n < 16 ? n : 16, x[0]);
  int i = 16;
  for (; i + 16 <= n; i += 16) most = V::max(most, V::load(x + i));
  if (i < n) most = V::max(most, load_part<V>(x + i, n - i, x[0]));
  const float highest = V::reduce_max(most);
  const auto all = V::set(highest);
  auto acc = V::zero();
  i = 0;
  for (; i + 16 <= n; i += 16) {
    const auto e = exp<V>(V::sub(V::load(x + i), all));
    acc = V::add(acc, e);
    V::store(x + i, e);
  }
  if (i < n) {
    store_part<V>(x + i, exp<V>(V::sub(load_part<V>(x + i, n - i, highest), all)), n - i);
    acc = V::add(acc, load_part<V>(x + i, n - i, 0.0f));
  }
  *top = highest;
  *sum = V::reduce_add(acc);
  const float inverse = 1.0f / *sum;
  for (i = 0; i < n; ++i) x[i] *= inverse;
}

template <class V>
void softmax(float* x, int n) {
  float top, sum;
  softmax<V>(x, n, &top, &sum);
}

template <class V>
void add_scaled(const float* x, float scale, int n, float* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) V::store(out + i, V::fma(V::load(x + i), V::set(scale), V::load(out + i)));
  if (i < n) {
    store_part<V>(out + i, V::fma(load_part<V>(x + i, n - i, 0.0f), V::set(scale), load_part<V>(out + i, n - i, 0.0f)),
                  n - i);
  }
}

/// The sums of one stretch of N vectors, which stay in registers for all rows.
template <class V, int N>
inline void add_scaled_stretch(const float* x, size_t stride, const uint8_t* rows, const float* scales, int count,
                               float* out) {
  typename V::F sums[N];
  for (int j = 0; j < N; ++j) sums[j] = V::load(out + 16 * j);
  for (int k = 0; k < count; ++k) {
    const float* row = x + rows[k] * stride;
    const auto scale = V::set(scales[k]);
    for (int j = 0; j < N; ++j) sums[j] = V::fma(V::load(row + 16 * j), scale, sums[j]);
  }
  for (int j = 0; j < N; ++j) V::store(out + 16 * j, sums[j]);
}

template <class V>
void add_scaled_rows(const float* x, size_t stride, const uint8_t* rows, const float* scales, int count, int n,
                     float* out) {
  int i = 0;
  for (; i + 64 <= n; i += 64) add_scaled_stretch<V, 4>(x + i, stride, rows, scales, count, out + i);
  for (; i + 16 <= n; i += 16) add_scaled_stretch<V, 1>(x + i, stride, rows, scales, count, out + i);
  if (i == n) return;
  for (int k = 0; k < count; ++k) add_scaled<V>(x + rows[k] * stride + i, scales[k], n - i, out + i);
}

template <class V>
void rope(float* x, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  int i = 0;
  for (; i + 16 <= half; i += 16) {
    const auto a = V::load(x + i), b = V::load(x + half + i), c = V::load(cos + i), s = V::load(sin + i);
    V::store(x + i, V::sub(V::mul(a, c), V::mul(b, s)));
    V::store(x + half + i, V::add(V::mul(b, c), V::mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

template <class V>
void to_f16(const float* x, int n, uint16_t* out) {
  alignas(64) uint16_t part[16];
  for (int i = 0; i < n; i += 16) {
    const int left = n - i;
    V::store_f16(part, left >= 16 ? V::load(x + i) : load_part<V>(x + i, left, 0.0f));
    for (int j = 0; j < 16 && j < left; ++j) out[i + j] = part[j];
  }
}

template <class V>
void from_f16(const uint16_t* x, int n, float* out) {
  alignas(64) uint16_t part[16] = {};
  for (int i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? n - i : 16;
    for (int j = 0; j < left; ++j) part[j] = x[i + j];
    store_part<V>(out + i, V::load_f16(part), left);
  }
}

template <class V>
uint8_t read_all(const uint8_t* bytes, size_t n) {
  constexpr int kStreams = 4;  // as many as a matrix at 6 bits has
  typename V::B acc[kStreams];
  for (auto& a : acc) a = V::zero_bytes();
  const size_t part = n / kStreams;
  for (size_t at = 0; at < part; at += 128) {
    for (int i = 0; i < kStreams; ++i) {
      const uint8_t* p = bytes + i * part + at;
      acc[i] = V::or_bytes(acc[i], V::or_bytes(V::load_bytes(p), V::load_bytes(p + 64)));
    }
  }
  uint8_t all[64];
  V::store_bytes(all, V::or_bytes(V::or_bytes(acc[0], acc[1]), V::or_bytes(acc[2], acc[3])));
  uint8_t some = 0;
  for (uint8_t b : all) some = uint8_t(some | b);
  return some;
}

}  // namespace
}  // namespace edgemoe

#include "attention-inl.h"
#include "correction-inl.h"
#include "float4-inl.h"
#include "guesses-inl.h"
#include "latent-inl.h"
#include "mwq-inl.h"
#include "packed-inl.h"
#include "quantize-inl.h"
#include "recurrent-inl.h"

namespace edgemoe {
namespace {

template <class V>
constexpr Kernels make_kernels(const char* name) {
  return Kernels{name,
                 fit_scales<V>,
                 best_codes<V>,
                 descend_group<V>,
                 round_codes<V>,
                 pack_rung<V>,
                 quantize_row<V>,
                 matmul_nested<V>,
                 decode_nested<V>,
                 project<V>,
                 quantize_ranks<V>,
                 decode_correction<V>,
                 matmul_mwq<V>,
                 decode_mwq<V>,
                 matmul_float4<V>,
                 decode_float4<V>,
                 matmul_f32<V>,
                 rms_norm<V>,
                 activate<V>,
                 soft_cap<V>,
                 softmax<V>,
                 add_scaled<V>,
                 add_scaled_rows<V>,
                 rope<V>,
                 to_f16<V>,
                 from_f16<V>,
                 read_all<V>,
                 quantize_head<V>,
                 pack_head<V>,
                 attend<V>,
                 attend_latent<V>,
                 merge_parts<V>,
                 delta_rule<V>,
                 mamba2<V>,
                 short_conv<V>,
                 sigmoid<V>,
                 sigmoid_mul<V>,
                 softplus<V>,
                 decays<V>,
                 matmul_rounded<V>,
                 logs<V>,
                 powers<V>,
                 pass_token<V>,
                 weigh_rows<V>,
                 mix_odds<V>,
                 moments<V>,
                 least<V>};
}

}  // namespace
}  // namespace edgemoe
