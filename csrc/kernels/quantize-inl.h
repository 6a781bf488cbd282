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

/// The same for the full search, which takes a level's code from the 8-bit code, and sums in another order. Of scales
/// that are equally good, the one that is chosen depends on such things; files are to keep their bytes.
template <class V>
inline typename V::F all_errors(const float* x, const float* importance, const FitLevel* levels, int num_levels) {
  const auto half = V::set(0.5f);
  typename V::F sums[kGroup];
  for (int c = 0; c < kGroup; ++c) {
    const auto value = V::load(x + c * kTileRows);
    const auto q = V::min(V::max(V::round(V::sub(value, half)), V::zero()), V::set(255));
    auto error = V::zero();
    for (int i = 0; i < num_levels; ++i) {
      const auto code = V::round(V::fma(V::add(q, half), V::set(1.0f / levels[i].step), V::set(-0.5f)));
      const auto d = V::sub(V::mul(V::add(code, half), V::set(levels[i].step)), value);
      error = V::fma(V::mul(d, V::set(levels[i].weight)), d, error);
    }
    sums[c] = V::mul(error, V::set(importance[c]));
  }
  for (int n = kGroup / 2; n > 0; n /= 2) {
    for (int c = 0; c < n; ++c) sums[c] = V::add(sums[c], sums[c + n]);
  }
  return sums[0];
}

/// A group of 16 rows, and the best scale and middle of each row so far. kThorough: for the full search.
template <class V, bool kThorough>
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
      errors[r] = kThorough ? -1 : __builtin_inff();  // the full search takes the first one in any case
      scales[r] = 0;
      middles[r] = 8;
    }
  }

  /// The least scale, 0 to 15, with which a group reaches from `low` to `high`, and as far from zero.
  void find_least(typename V::F low, typename V::F high, float* least) const {
    constexpr float kRelative[] = {4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48};  // all but the last
    constexpr float kReach = 127 + 7 * kMiddleStep;
    const auto range = V::sub(high, low), furthest = V::max(V::sub(V::zero(), low), high);
    for (int r = 0; r < kTileRows; ++r) least[r] = 0;
    if constexpr (kThorough) {
      alignas(64) float wide[kTileRows], far[kTileRows], unit[kTileRows];
      V::store(wide, range), V::store(far, furthest), V::store(unit, units);
      for (const float relative : kRelative) {
        for (int r = 0; r < kTileRows; ++r) {
          const float scale = unit[r] * relative;
          least[r] += scale * 255 >= wide[r] && scale * kReach >= far[r] ? 0.0f : 1.0f;
        }
      }
    } else {
      alignas(64) float wanted[kTileRows];
      V::store(wanted,
               V::div(V::max(V::mul(range, V::set(1.0f / 255)), V::mul(furthest, V::set(1.0f / kReach))), units));
      for (const float relative : kRelative) {
        for (int r = 0; r < kTileRows; ++r) least[r] += wanted[r] > relative ? 1.0f : 0.0f;
      }
    }
  }

  /// The middle next to `centre`; the full search stays within 0 to 15, so that all middles around it differ.
  typename V::F middle_of(typename V::F centre, typename V::F inverse) const {
    if constexpr (!kThorough) return V::round(V::fma(centre, V::mul(inverse, V::set(1.0f / kMiddleStep)), V::set(8)));
    const auto middle = V::add(V::div(V::mul(centre, inverse), V::set(kMiddleStep)), V::set(8));
    alignas(64) float within[kTileRows];
    V::store(within, V::add(V::min(V::max(middle, V::zero()), V::set(15)), V::set(0.5f)));
    for (float& x : within) x = float(int(x));
    return V::load(within);
  }

  /// Tries one scale for each row, with the middles up to `around` away from the one nearest to `centre`.
  void attempt(const float* index, typename V::F centre, int around) {
    uint8_t bytes[kTileRows];
    for (int r = 0; r < kTileRows; ++r) bytes[r] = uint8_t(int(index[r]));
    typename V::F relative, unused;
    V::load_scales(bytes, 0, 0, &relative, &unused);
    const auto scale = V::mul(relative, units), inverse = V::div(V::set(1), scale);
    const auto nearest = middle_of(centre, inverse);
    for (int m = -around; m <= around; ++m) {
      const auto middle = V::min(V::max(V::add(nearest, V::set(float(m))), V::zero()), V::set(15));
      const auto offset = V::fma(middle, V::set(-float(kMiddleStep)), V::set(128 + 8 * kMiddleStep));
      alignas(64) float x[kGroup * kTileRows], found[kTileRows], tried[kTileRows];
      for (int at = 0; at < kGroup * kTileRows; at += kTileRows) {
        V::store(x + at, V::fma(V::load(columns + at), inverse, offset));
      }
      const auto error = kThorough ? all_errors<V>(x, importance, levels, num_levels)
                                   : level_errors<V>(x, importance, levels, num_levels);
      V::store(found, V::mul(V::mul(scale, scale), error));
      V::store(tried, middle);
      for (int r = 0; r < kTileRows; ++r) {
        const bool is_better = (errors[r] < 0) | (found[r] < errors[r]);
        errors[r] = is_better ? found[r] : errors[r];
        scales[r] = is_better ? index[r] : scales[r];
        middles[r] = is_better ? tried[r] : middles[r];
      }
    }
  }
};

/// Tries the least scale of a group that reaches all its weights, with 3 middles, and the next one, with 5. The full
/// search tries two scales on either side as well, all with 5 middles. Of the best of these 25 candidates, 98% are
/// among the eight; the others would save 0.2% of the error (benchmarks/LOG.md).
template <class V, bool kThorough>
void fit_all_scales(const float* columns, int groups, const float* importance, const FitLevel* levels, int num_levels,
                    const float* units, uint8_t* bytes, float* errors) {
  constexpr int kBelow = kThorough ? 2 : 0, kAbove = kThorough ? 2 : 1;
  GroupFit<V, kThorough> fit{columns, importance, levels, num_levels, V::load(units), {}, {}, {}};
  auto total = V::zero();
  for (int g = 0; g < groups; ++g, fit.columns += kGroup * kTileRows, fit.importance += kGroup, bytes += kTileRows) {
    auto low = V::load(fit.columns), high = low;
    for (int c = 1; c < kGroup; ++c) {
      const auto value = V::load(fit.columns + c * kTileRows);
      low = V::min(low, value);
      high = V::max(high, value);
    }
    alignas(64) float least[kTileRows], index[kTileRows];
    fit.find_least(low, high, least);
    fit.start();
    const auto centre = V::fma(low, V::set(0.5f), V::mul(high, V::set(0.5f)));
    for (int more = -kBelow; more <= kAbove; ++more) {
      V::store(index, V::min(V::max(V::add(V::load(least), V::set(float(more))), V::zero()), V::set(15)));
      fit.attempt(index, centre, kThorough ? 2 : 1 + more);
    }
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
void fit_scales(const float* columns, int groups, const float* importance, const FitLevel* levels, int num_levels,
                const float* units, bool is_thorough, uint8_t* bytes, float* errors) {
  (is_thorough ? fit_all_scales<V, true> : fit_all_scales<V, false>)(columns, groups, importance, levels, num_levels,
                                                                     units, bytes, errors);
}

/// The codes below 16 positions that are moved by `by`; 0 for NaN, as when a gradient overflows.
template <class V>
inline void codes_at(const float* positions, float by, int* codes) {
  alignas(64) float within[kTileRows];
  const auto moved = V::add(V::load(positions), V::set(by));
  V::store(within, V::min(V::max(moved, V::zero()), V::set(255)));  // max returns its second operand for NaN
  for (int r = 0; r < kTileRows; ++r) codes[r] = int(within[r]);
}

/// The search of `best_codes`, with a row in each lane. Its loops over rows become vector instructions.
///
/// The best code lies between the lowest and the highest target. For each code of the last level but one, the parent,
/// the best code of the last level is known, so only those are tried: outwards from the last level's target to either
/// side, until the last level's error alone is too large.
struct CodeSearch {
  const CodeLevel* levels;
  int num_levels;
  const float* weights;
  const float* targets;
  int last, shift;  ///< by which a code is shifted at the last level, and at the one before it
  int nearest[kTileRows], parents[kTileRows], codes[kTileRows];
  float of_last[kTileRows], errors[kTileRows];  ///< the last level's error, and that of all levels

  /// Finds the best code of each row's parent, and its errors.
  void attempt() {
    const int n = num_levels - 1, bits = levels[n].bits, deeper = shift - last;
    const float* const target = targets + n * kTileRows;
    const float* const weight = weights + n * kTileRows;
    for (int r = 0; r < kTileRows; ++r) {
      const int from = parents[r] * (1 << deeper), to = from + (1 << deeper) - 1;
      const int at_least = nearest[r] < from ? from : nearest[r];
      codes[r] = (at_least > to ? to : at_least) * (1 << last);
      const float d = target[r] - position_of(codes[r], bits);
      of_last[r] = weight[r] * (d * d);
      errors[r] = 0;
    }
    for (int i = 0; i < n; ++i) {
      for (int r = 0; r < kTileRows; ++r) {
        const float d = targets[i * kTileRows + r] - position_of(codes[r], levels[i].bits);
        errors[r] += weights[i * kTileRows + r] * (d * d);
      }
    }
    for (int r = 0; r < kTileRows; ++r) errors[r] += of_last[r];
  }
};

template <class V>
void best_codes(const CodeLevel* levels, int num_levels, const float* weights, const float* targets, int* codes) {
  CodeSearch s;
  s.levels = levels, s.num_levels = num_levels, s.weights = weights, s.targets = targets;
  s.last = 8 - levels[num_levels - 1].bits;
  s.shift = num_levels > 1 ? 8 - levels[num_levels - 2].bits : 8;  // without an earlier level: all codes at once
  int first[kTileRows], end[kTileRows], middle[kTileRows];
  float low[kTileRows], high[kTileRows], least[kTileRows];
  for (int r = 0; r < kTileRows; ++r) low[r] = high[r] = targets[r];
  for (int i = 1; i < num_levels; ++i) {
    for (int r = 0; r < kTileRows; ++r) {
      const float target = targets[i * kTileRows + r];
      low[r] = target < low[r] ? target : low[r];
      high[r] = high[r] < target ? target : high[r];
    }
  }
  codes_at<V>(low, -1, first);
  codes_at<V>(high, 1, end);
  codes_at<V>(targets + (num_levels - 1) * kTileRows, 0, s.nearest);
  for (int r = 0; r < kTileRows; ++r) {
    first[r] >>= s.shift;
    end[r] >>= s.shift;
    s.nearest[r] >>= s.last;  // of the last level, in its own units
    const int parent = s.nearest[r] >> (s.shift - s.last), at_least = parent < first[r] ? first[r] : parent;
    s.parents[r] = middle[r] = at_least > end[r] ? end[r] : at_least;
  }
  s.attempt();
  for (int r = 0; r < kTileRows; ++r) {
    codes[r] = s.codes[r];
    least[r] = s.errors[r];
  }
  for (int step = -1; step <= 1; step += 2) {
    int is_open[kTileRows], any = 0;
    for (int r = 0; r < kTileRows; ++r) {
      s.parents[r] = middle[r] + step;
      is_open[r] = (s.parents[r] >= first[r]) & (s.parents[r] <= end[r]);
      any |= is_open[r];
    }
    while (any) {
      s.attempt();
      any = 0;
      for (int r = 0; r < kTileRows; ++r) {
        const int is_worth_it = is_open[r] & !(s.of_last[r] > least[r]);
        const int is_better = is_worth_it & ((s.errors[r] < least[r]) | ((step < 0) & (s.errors[r] == least[r])));
        least[r] = is_better ? s.errors[r] : least[r];
        codes[r] = is_better ? s.codes[r] : codes[r];
        s.parents[r] += step;
        is_open[r] = is_worth_it & (s.parents[r] >= first[r]) & (s.parents[r] <= end[r]);
        any |= is_open[r];
      }
    }
  }
}

template <class V>
unsigned descend_group(const CodeLevel* levels, int num_levels, int cols, int first, int count, unsigned skipped,
                       const float* gradients, uint8_t* codes, float* moves) {
  alignas(64) float slopes[8][kGroup][kTileRows], weights[8][kTileRows], targets[8][kTileRows];
  int code[kTileRows], best[kTileRows];
  for (int i = 0; i < num_levels; ++i) {
    for (int r = 0; r < kTileRows; ++r) {
      const float* const row = gradients + (size_t(i) * kTileRows + r) * cols + first;
      for (int c = 0; c < count; ++c) slopes[i][c][r] = row[c];
    }
  }
  unsigned changed = 0;
  for (int c = 0; c < count; ++c) {
    const size_t diagonal = size_t(first + c) * cols + first + c;
    for (int r = 0; r < kTileRows; ++r) code[r] = codes[size_t(r) * cols + first + c];
    for (int i = 0; i < num_levels; ++i) {
      // A level's mean square over the first level's, which is the unit of the weights.
      const float inverse = 1 / levels[i].moments[diagonal];
      const float share =
          levels[i].moments == levels[0].moments ? 1 : levels[i].moments[diagonal] * (1 / levels[0].moments[diagonal]);
      for (int r = 0; r < kTileRows; ++r) {
        targets[i][r] = position_of(code[r], levels[i].bits) - slopes[i][c][r] * inverse / levels[i].scales[r];
        weights[i][r] = levels[i].weights[r] * share;
      }
    }
    best_codes<V>(levels, num_levels, weights[0], targets[0], best);
    for (int r = 0; r < kTileRows; ++r) {
      if (skipped >> r & 1) best[r] = code[r];
      changed |= unsigned(best[r] != code[r]) << r;
      codes[size_t(r) * cols + first + c] = uint8_t(best[r]);
    }
    for (int i = 0; i < num_levels; ++i) {
      alignas(64) float moved[kTileRows];
      int any = 0;
      for (int r = 0; r < kTileRows; ++r) {
        const float steps = position_of(best[r], levels[i].bits) - position_of(code[r], levels[i].bits);
        moved[r] = steps != 0 ? steps * levels[i].scales[r] : 0;
        any |= steps != 0;
        moves[(i * kTileRows + r) * kGroup + c] = moved[r];
      }
      if (!any) continue;
      const auto by = V::load(moved);
      const float* const products = levels[i].moments + size_t(first + c) * cols + first;
      for (int later = c + 1; later < count; ++later) {
        float* const to = slopes[i][later];
        V::store(to, V::fma(V::set(products[later]), by, V::load(to)));
      }
    }
  }
  return changed;
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
