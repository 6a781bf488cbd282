// Quantisation of float weights to nested codes, one row per lane. Part of kernels-inl.h.
#pragma once

#include "kernels-inl.h"

namespace edgemoe {
namespace {

/// For each row, the sum over a group's columns and the levels of weight * importance * squared error. `x` are the
/// weights in steps of the 8-bit code, whose value q stands for q + 0.5.
template <class V>
inline typename V::F level_errors(const float* x, const float* importance, const FitLevel* levels, int num_levels) {
  const auto top = V::set(255.5f), half = V::set(-0.5f);
  auto error = V::zero();
  for (int i = 0; i < num_levels; ++i) {
    const auto step = V::set(levels[i].step), inverse = V::set(1.0f / levels[i].step);
    const auto middle = V::set(0.5f * levels[i].step);
    typename V::F sums[2] = {V::zero(), V::zero()};
    for (int c = 0; c < kGroup; ++c) {
      const auto value = V::load(x + c * kTileRows);
      const auto code = V::round(V::fma(V::min(V::max(value, V::zero()), top), inverse, half));
      const auto d = V::sub(V::fma(code, step, middle), value);
      sums[c % 2] = V::fma(V::mul(d, V::set(importance[c])), d, sums[c % 2]);
    }
    error = V::fma(V::add(sums[0], sums[1]), V::set(levels[i].weight), error);
  }
  return error;
}

/// A group of 16 rows, and the best scale and middle of each row so far.
template <class V>
struct GroupFit {
  const float* columns;     ///< [16, 16], the rows of a column together
  const float* importance;  ///< [16]
  const FitLevel* levels;
  int num_levels;
  typename V::F units;  ///< steps of a code with relative scale 1
  alignas(64) float errors[kTileRows];
  alignas(64) float scales[kTileRows];   ///< 0 to 15, as in the byte
  alignas(64) float middles[kTileRows];  ///< likewise

  void start() {
    for (int r = 0; r < kTileRows; ++r) {
      errors[r] = __builtin_inff();
      scales[r] = 0;
      middles[r] = 8;
    }
  }

  /// Tries one scale for each row, with the middles up to `around` away from the one nearest to `centre`.
  void attempt(const float* index, typename V::F centre, int around) {
    uint8_t bytes[kTileRows];
    for (int r = 0; r < kTileRows; ++r) bytes[r] = uint8_t(int(index[r]));
    typename V::F relative, unused;
    V::load_scales(bytes, 0, 0, &relative, &unused);
    const auto scale = V::mul(relative, units), inverse = V::div(V::set(1), scale);
    const auto nearest = V::round(V::fma(centre, V::mul(inverse, V::set(1.0f / float(kMiddleStep))), V::set(8)));
    for (int m = -around; m <= around; ++m) {
      const auto middle = V::min(V::max(V::add(nearest, V::set(float(m))), V::zero()), V::set(15));
      const auto offset = V::fma(middle, V::set(-float(kMiddleStep)), V::set(128 + 8 * kMiddleStep));
      alignas(64) float x[kGroup * kTileRows], found[kTileRows], tried[kTileRows];
      for (int at = 0; at < kGroup * kTileRows; at += kTileRows) {
        V::store(x + at, V::fma(V::load(columns + at), inverse, offset));
      }
      const auto error = level_errors<V>(x, importance, levels, num_levels);
      V::store(found, V::mul(V::mul(scale, scale), error));
      V::store(tried, middle);
      for (int r = 0; r < kTileRows; ++r) {
        const bool is_better = found[r] < errors[r];
        errors[r] = is_better ? found[r] : errors[r];
        scales[r] = is_better ? index[r] : scales[r];
        middles[r] = is_better ? tried[r] : middles[r];
      }
    }
  }
};

/// Tries the least scale of a group that reaches all its weights, with 3 middles, and the next one, with 5. Of the best
/// of 25 candidates, 98% are among these eight; the others would save 0.2% of the error (benchmarks/LOG.md).
template <class V>
void fit_scales(const float* columns, int groups, const float* importance, const FitLevel* levels, int num_levels,
                const float* units, uint8_t* bytes, float* errors) {
  constexpr float kRelative[] = {4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48};  // all but the last
  GroupFit<V> fit{columns, importance, levels, num_levels, V::load(units), {}, {}, {}};
  auto total = V::zero();
  for (int g = 0; g < groups; ++g, fit.columns += kGroup * kTileRows, fit.importance += kGroup, bytes += kTileRows) {
    auto low = V::load(fit.columns), high = low;
    for (int c = 1; c < kGroup; ++c) {
      const auto value = V::load(fit.columns + c * kTileRows);
      low = V::min(low, value);
      high = V::max(high, value);
    }
    const auto range = V::mul(V::sub(high, low), V::set(1.0f / 255));
    const auto reach = V::mul(V::max(V::sub(V::zero(), low), high), V::set(1.0f / (127 + 7 * kMiddleStep)));
    alignas(64) float wanted[kTileRows], least[kTileRows] = {}, next[kTileRows];
    V::store(wanted, V::div(V::max(range, reach), fit.units));
    for (const float relative : kRelative) {
      for (int r = 0; r < kTileRows; ++r) least[r] += wanted[r] > relative ? 1.0f : 0.0f;
    }
    for (int r = 0; r < kTileRows; ++r) next[r] = least[r] < 15 ? least[r] + 1 : 15;
    fit.start();
    const auto centre = V::fma(low, V::set(0.5f), V::mul(high, V::set(0.5f)));
    fit.attempt(least, centre, 1);
    fit.attempt(next, centre, 2);
    for (int r = 0; r < kTileRows; ++r) {
      const bool is_zero = !(units[r] > 0);  // the row is all zero, and its errors are NaN
      bytes[r] = is_zero ? 0x80 : uint8_t(int(fit.scales[r]) + 16 * int(fit.middles[r]));
      fit.errors[r] = is_zero ? 0 : fit.errors[r];
    }
    total = V::add(total, V::load(fit.errors));
  }
  V::store(errors, total);
}

template <class V>
void round_codes(const float* columns, int groups, const float* units, const uint8_t* bytes, uint8_t* codes) {
  for (int g = 0; g < groups; ++g, bytes += kTileRows) {
    typename V::F scale, offset;
    V::load_scales(bytes, -float(kMiddleStep), 128 + 8 * kMiddleStep, &scale, &offset);
    alignas(64) float inverse[kTileRows];
    V::store(inverse, V::mul(scale, V::load(units)));
    for (int r = 0; r < kTileRows; ++r) inverse[r] = inverse[r] > 0 ? 1 / inverse[r] : 0;
    for (int c = 0; c < kGroup; c += 4, columns += 4 * kTileRows, codes += 64) {
      int8_t rows[4][kTileRows];
      for (int j = 0; j < 4; ++j) {
        const auto x = V::fma(V::load(columns + j * kTileRows), V::load(inverse), offset);
        const auto code = V::min(V::max(V::round(V::sub(x, V::set(0.5f))), V::zero()), V::set(255));
        V::store_i8(rows[j], V::round_to_int(V::sub(code, V::set(128))));
      }
      for (int r = 0; r < kTileRows; ++r) {
        for (int j = 0; j < 4; ++j) codes[4 * r + j] = uint8_t(rows[j][r] ^ 0x80);
      }
    }
  }
}

/// A rung's share of a tile of codes [16, 64]: the `width` bits from `shift` on.
template <class V>
void pack_rung(const uint8_t* tile, int width, int shift, uint8_t* out) {
  for (int w = 8; w >= 1; w /= 2) {
    if (!(width & w)) continue;
    width -= w;
    const int per_vector = 8 / w, down = shift + width;
    const auto mask = V::set_bytes((1 << w) - 1);
    for (int v = 0; v < 16; v += per_vector, out += 64) {
      auto all = V::zero_bytes();
      for (int i = 0; i < per_vector; ++i) {
        const auto field = V::and_bytes(V::shift_right_by(V::load_bytes(tile + 64 * (v + i)), down), mask);
        all = V::or_bytes(all, V::shift_left_by(field, w * i));
      }
      V::store_bytes(out, all);
    }
  }
}

}  // namespace
}  // namespace edgemoe
