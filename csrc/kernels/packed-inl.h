// Keys and values in 2, 3 or 4 bits: how they are rounded, and how their codes are unpacked from planes.
//
// A group is 32 columns of 16 positions: eight steps of 64 codes, in planes of 4, 2 or 1 bits (3 bits are 2 and 1), so
// that a step is unpacked by the same shift and mask as weights are. In units of the scale, a code stands for a whole
// number. With 4 and 3 bits these start at -8 or -4 as in llama.cpp's q4_0, and the scale may have either sign, so that
// the largest number of a group is on the side that reaches further. With 2 bits they are -3, -1, 1 and 3, which rounds
// numbers around zero better.
#pragma once

#include "kernels.h"

namespace edgemoe {
namespace {

/// Codes of a step of a group.
template <class V, int Bits, int Step>
inline typename V::B packed_step(const uint8_t* group) {
  if constexpr (Bits == 3) {
    const auto high = plane_field<V, 2, Step>(group);
    return V::or_bytes(V::template shift_left<1>(high), plane_field<V, 1, Step>(group + kKvPlane<2>));
  } else {
    return plane_field<V, Bits, Step>(group);
  }
}

/// Codes of a step that is known only at run time, in one plane.
template <class V, int Width>
inline typename V::B plane_field_at(const uint8_t* plane, int step) {
  constexpr int per_vector = 8 / Width;
  const auto bytes = V::load_bytes(plane + 64 * (step / per_vector));
  return V::and_bytes(V::shift_right_by(bytes, step % per_vector * Width), V::set_bytes((1 << Width) - 1));
}

template <class V, int Bits>
inline typename V::B packed_step_at(const uint8_t* group, int step) {
  if constexpr (Bits == 3) {
    const auto high = plane_field_at<V, 2>(group, step);
    return V::or_bytes(V::template shift_left<1>(high), plane_field_at<V, 1>(group + kKvPlane<2>, step));
  } else {
    return plane_field_at<V, Bits>(group, step);
  }
}

/// The numbers that codes stand for, in units of the scale: kStep * code - kLowest.
template <int Bits>
struct Grid {
  static constexpr int kStep = Bits == 2 ? 2 : 1, kLowest = Bits == 2 ? 3 : 1 << (Bits - 1);
};

/// A table of these numbers plus kBias, for 16 codes, of which the first 2^Bits occur.
template <int Bits, int kBias>
struct Levels {
  static constexpr uint8_t of(int code) { return uint8_t(Grid<Bits>::kStep * code - Grid<Bits>::kLowest + kBias); }

  alignas(16) static constexpr uint8_t kBytes[16] = {of(0), of(1), of(2),  of(3),  of(4),  of(5),  of(6),  of(7),
                                                     of(8), of(9), of(10), of(11), of(12), of(13), of(14), of(15)};
};

/// acc[i] += the sum of codes times query i's, over a group's steps from Step on, for 16 keys.
template <class V, int Bits, int N, int Step = 0>
inline void dot_group(const AttendQuery* queries, int column, const uint8_t* group, typename V::I* acc) {
  const auto codes = packed_step<V, Bits, Step>(group);
  for (int i = 0; i < N; ++i) acc[i] = V::template dot<false>(acc[i], codes, queries[i].codes + column + 4 * Step);
  if constexpr (Step < 7) dot_group<V, Bits, N, Step + 1>(queries, column, group, acc);
}

/// out [16 positions, 16] = the numbers that the codes of one half of a group's columns stand for.
template <class V, int Bits, int Half, int Step = 0>
inline void unpack_values(const uint8_t* group, int8_t* out) {
  const auto codes = packed_step<V, Bits, 4 * Half + Step>(group);
  V::store_bytes(reinterpret_cast<uint8_t*>(out) + 64 * Step, V::lookup(Levels<Bits, 0>::kBytes, codes));
  if constexpr (Step < 3) unpack_values<V, Bits, Half, Step + 1>(group, out);
}

// ---------------------------------------------------------------- rounding

constexpr int kTried = 8;

/// Scales to try for 2, 3 and 4 bits, relative to the one with which a group's largest number has the lowest code.
alignas(64) constexpr float kScaleShares[3][16] = {
    {1.0f, 0.9f, 0.8f, 0.7f, 0.85f, 0.75f, 0.65f, 0.95f},
    {1.0f, 0.9f, 0.84f, 1.08f, 0.94f, 1.22f, 0.78f, 1.04f},
    {1.0f, 0.94f, 1.1f, 0.98f, 1.02f, 0.92f, 1.14f, 0.96f},
};

/// Codes of 16 values, as floats. inverse: 1 / (step * scale).
template <class V, int Bits>
inline typename V::F packed_codes(typename V::F v, float inverse) {
  using G = Grid<Bits>;
  const auto nearest = V::round(V::fma(v, V::set(inverse), V::set(float(G::kLowest) / float(G::kStep))));
  return V::min(V::max(nearest, V::zero()), V::set(float((1 << Bits) - 1)));
}

/// Rounds a group of 32 values; `live` is 1 for values that count and 0 for padding. Writes the codes and returns the
/// scale with the least squared error.
template <class V, int Bits>
inline float pack_group(const typename V::F* v, const typename V::F* live, int8_t* codes) {
  using G = Grid<Bits>;
  auto most = V::zero(), least = V::zero(), poison = V::zero();
  for (int i = 0; i < 2; ++i) {
    most = V::max(most, v[i]);
    least = V::max(least, V::sub(V::zero(), v[i]));
    poison = V::fma(v[i], V::zero(), poison);  // not 0 where a value is not finite
  }
  const float poisoned = V::reduce_add(poison), high = V::reduce_max(most), low = V::reduce_max(least);
  alignas(64) uint16_t halves[16];
  alignas(64) float tried[16];
  const float fitting = (high >= low ? -high : low) / float(G::kLowest);
  V::store_f16(halves, V::mul(V::set(fitting), V::load(kScaleShares[Bits - 2])));
  V::store(tried, V::load_f16(halves));
  float best = 0, scale = tried[0];
  const bool is_known = poisoned != 0 || scale == 0 || scale * 0 != 0;  // there is nothing to choose
  const auto inverse_of = [](float s) { return s != 0 ? 1.0f / (float(G::kStep) * s) : 0.0f; };
  for (int t = 0; !is_known && t < kTried; ++t) {
    auto error = V::zero();
    for (int i = 0; i < 2; ++i) {
      const auto code = packed_codes<V, Bits>(v[i], inverse_of(tried[t]));
      const auto level = V::fma(code, V::set(float(G::kStep)), V::set(float(-G::kLowest)));
      const auto off = V::mul(V::fma(level, V::set(-tried[t]), v[i]), live[i]);
      error = V::fma(off, off, error);
    }
    const float sum = V::reduce_add(error);
    if (t == 0 || sum < best) best = sum, scale = tried[t];
  }
  for (int i = 0; i < 2; ++i) {
    const auto code = is_known ? V::zero() : V::mul(packed_codes<V, Bits>(v[i], inverse_of(scale)), live[i]);
    V::store_i8(codes + 16 * i, V::round_to_int(code));
  }
  return poisoned != 0 ? poisoned : scale;
}

template <class V>
void pack_head(const float* x, int n, int bits, int8_t* codes, float* scales) {
  alignas(64) float ones[16];
  for (float& one : ones) one = 1.0f;
  for (int g = 0; g < blocks(n, kKvGroup); ++g, codes += kKvGroup) {
    typename V::F v[2], live[2];
    for (int i = 0; i < 2; ++i) {
      const int start = g * kKvGroup + 16 * i, left = n - start < 0 ? 0 : n - start < 16 ? n - start : 16;
      v[i] = load_part<V>(x + start, left, 0.0f);
      live[i] = load_part<V>(ones, left, 0.0f);
    }
    scales[g] = bits == 4   ? pack_group<V, 4>(v, live, codes)
                : bits == 3 ? pack_group<V, 3>(v, live, codes)
                            : pack_group<V, 2>(v, live, codes);
  }
}

}  // namespace
}  // namespace edgemoe
