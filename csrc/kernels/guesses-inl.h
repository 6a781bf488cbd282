// What schedulers compute for all experts at once. Part of kernels-inl.h.
#pragma once

#include "kernels-inl.h"

namespace edgemoe {
namespace {

// ---------------------------------------------------------------- logarithms and powers
// Plain loops, which compilers vectorise: every lane does the same operations in the same order.

inline double of_bits(uint64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, 8);
  return x;
}

inline uint64_t bits_of_double(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  return bits;
}

constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;  // sum to log 2 (fdlibm)

/// log x = k log 2 + log m with m between the square roots of 1/2 and 2, and log m = 2 artanh((m - 1) / (m + 1)).
template <class V>
void logs(const double* x, int n, double* out) {
  constexpr uint64_t kRootOfHalf = 0x3fe6a09e667f3bcd, kOne = 0x3ff0000000000000, kFraction = 0x000fffffffffffff;
  for (int i = 0; i < n; ++i) {
    const uint64_t up = bits_of_double(x[i]) + (kOne - kRootOfHalf);
    const double k = of_bits((up >> 52) | 0x4330000000000000) - (4503599627370496.0 + 1023.0);
    const double m = of_bits((up & kFraction) + kRootOfHalf);
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double p = 2.0 / 21;
    p = p * z + 2.0 / 19;
    p = p * z + 2.0 / 17;
    p = p * z + 2.0 / 15;
    p = p * z + 2.0 / 13;
    p = p * z + 2.0 / 11;
    p = p * z + 2.0 / 9;
    p = p * z + 2.0 / 7;
    p = p * z + 2.0 / 5;
    p = p * z + 2.0 / 3;
    p = p * z;
    out[i] = k * kLn2High + (s * p + k * kLn2Low + 2.0 * s);
  }
}

/// e^x = 2^n e^r, and e^r by its series.
template <class V>
void powers(double* x, int n) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number
  constexpr double kMost = 20, kLeast = -700;
  for (int i = 0; i < n; ++i) {
    const double up_to = x[i] < kMost ? x[i] : kMost, at = up_to > kLeast ? up_to : kLeast;
    const double shifted = at * 1.44269504088896338700e+00 + kShift, whole = shifted - kShift;
    const double r = (at - whole * kLn2High) - whole * kLn2Low;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    x[i] = p * of_bits((bits_of_double(shifted) << 52) + 0x3ff0000000000000);
  }
}

// ---------------------------------------------------------------- rows of a layer's experts

template <class V>
void pass_token(const float* scores, int n, double left, double less, double* raw, double* logs_of) {
  constexpr double kTiny = 1e-9;  // keeps scores above 0
  double* __restrict to = raw + n;
  for (int i = 0; i < n; ++i) raw[i] *= left;
  for (int i = 0; i < n; ++i) logs_of[i] += less;
  for (int i = 0; i < n; ++i) to[i] = double(scores[i]) + kTiny;
  logs<V>(to, n, logs_of + n);
}

template <class V>
void weigh_rows(double* __restrict margin, double* __restrict average, const double* __restrict used,
                const double* __restrict frequency, int n, double base, double share, const double* weights,
                double* __restrict out) {
  const double one = weights[0], of_used = weights[1], of_frequency = weights[2], of_margin = weights[3],
               of_average = weights[4];
  for (int i = 0; i < n; ++i) {
    const double above = margin[i] - base, now = average[i] + (above - average[i]) * share;
    margin[i] = above;
    average[i] = now;
    out[i] = one + of_used * used[i] + of_frequency * frequency[i] + of_margin * above + of_average * now;
  }
}

template <class V>
void mix_odds(const double* __restrict habit, const float* __restrict text, int n, const double* weights,
              double* __restrict out) {
  const double one = weights[0], of_habit = weights[1], of_text = weights[2];
  for (int i = 0; i < n; ++i) out[i] = one + of_habit * habit[i] + of_text * double(text[i]);
}

template <class V>
void moments(const double* __restrict odds, int n, double round, double base, double* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = odds[i] * -round - base;
}

/// A bound that the `most` least of x do not exceed: lane j has the least of every kLanes-th number from j on, and
/// `most` of the lanes are not above the bound. Infinite where this gives none.
template <class V>
double bound_of_least(const double* x, int n, int most) {
  constexpr int kLanes = 32;
  double bound = __builtin_inf(), lanes[kLanes];
  if (n < kLanes || most > kLanes) return bound;
  for (int j = 0; j < kLanes; ++j) lanes[j] = bound;
  for (int first = 0; first + kLanes <= n; first += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = x[first + j] < lanes[j] ? x[first + j] : lanes[j];
  }
  int64_t below[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) below[j] += lanes[i] <= lanes[j];
  }
  for (int j = 0; j < kLanes; ++j) {
    if (below[j] >= most && lanes[j] < bound) bound = lanes[j];
  }
  return bound;
}

template <class V>
void least(const double* x, int n, int most, int32_t* out) {
  constexpr int kBlock = 16;  // numbers that one test can rule out together, which mostly happens
  int count = 0;
  const double bound = bound_of_least<V>(x, n, most);
  for (int first = 0; first < n && most > 0; first += kBlock) {
    const int end = first + kBlock < n ? first + kBlock : n;
    if (end - first == kBlock) {
      int64_t any = 0;
      for (int i = 0; i < kBlock; ++i) any |= x[first + i] <= bound;
      if (!any) continue;
    }
    for (int i = first; i < end; ++i) {
      if (!(x[i] <= bound) || (count == most && !(x[i] < x[out[most - 1]]))) continue;
      int at = count < most ? count++ : most - 1;
      for (; at > 0 && x[i] < x[out[at - 1]]; --at) out[at] = out[at - 1];
      out[at] = i;
    }
  }
  while (count < most) out[count++] = 0;  // in place of NaN
}

// ---------------------------------------------------------------- rows in 4 bits

/// N blocks of rows, whose codes lie one after the other.
template <class V, int N>
inline void rounded_blocks(const RoundedTiles& w, int block, const int8_t* x, float x_scale, float x_sum, float* out) {
  constexpr size_t kAhead = 4096;  // since their last use, a token's weights have evicted these rows from every cache
  const uint8_t* codes = w.codes + size_t(block) * size_t(w.steps) * 64;
  typename V::I low[N], high[N];
  for (int b = 0; b < N; ++b) low[b] = high[b] = V::zero_ints();
  for (int s = 0; s < w.steps; ++s) {
    for (int b = 0; b < N; ++b) {
      const uint8_t* line = codes + (size_t(b) * size_t(w.steps) + size_t(s)) * 64;
      __builtin_prefetch(line + kAhead);
      const auto both = V::load_bytes(line);
      low[b] = V::template dot<false>(low[b], field<V, 4, 0>(both), x + 8 * s);
      high[b] = V::template dot<false>(high[b], field<V, 4, 4>(both), x + 8 * s + 4);
    }
  }
  for (int b = 0; b < N; ++b) {
    const int row = (block + b) * kTileRows;
    const auto dots = V::to_float(V::add_ints(low[b], high[b]));
    const auto sum = V::mul(V::set(x_scale), V::sub(dots, V::set(7.5f * x_sum)));
    V::store(out + row, V::fma(V::load(w.scales + row), sum, V::load(w.bias + row)));
  }
}

template <class V>
void matmul_rounded(const RoundedTiles& w, const int8_t* x, float x_scale, float x_sum, float* out) {
  int block = 0;
  for (; block + 2 <= w.blocks; block += 2) rounded_blocks<V, 2>(w, block, x, x_scale, x_sum, out);
  if (block < w.blocks) rounded_blocks<V, 1>(w, block, x, x_scale, x_sum, out);
}

}  // namespace
}  // namespace edgemoe
