// Corrections of low rank: y = W x + A (V x). Part of kernels-inl.h.
//
// V x is one small product per input, kept in floats. u, the scales of A's columns, are multiplied into it. The rest is
// a matrix of r columns, whose codes of 4 bits are multiplied with 8-bit activations as all codes are: `add_ranks`.
#pragma once

#include "kernels-inl.h"

namespace edgemoe {
namespace {

/// z[r] = basis[r] · x for N rows of V.
template <class V, int N>
inline void project_rows(const int8_t* basis, size_t stride, const float* x, int cols, float* z) {
  typename V::F acc[N];
  for (auto& a : acc) a = V::zero();
  int c = 0;
  for (; c + 16 <= cols; c += 16) {
    const auto b = V::load(x + c);
    for (int r = 0; r < N; ++r) acc[r] = V::fma(V::load_i8(basis + r * stride + c), b, acc[r]);
  }
  if (c < cols) {  // rows of V are padded with zeros
    const auto b = load_part<V>(x + c, cols - c, 0.0f);
    for (int r = 0; r < N; ++r) acc[r] = V::fma(V::load_i8(basis + r * stride + c), b, acc[r]);
  }
  for (int r = 0; r < N; ++r) z[r] = V::reduce_add(acc[r]);
}

template <class V>
void project(const int8_t* basis, int rank, const float* x, int cols, float* z) {
  constexpr int kRows = 4;  // whose sums every instruction set has registers for
  const size_t stride = basis_stride(cols);
  int r = 0;
  for (; r < rank; r += kRows) project_rows<V, kRows>(basis + r * stride, stride, x, cols, z + r);
  for (; r < kMaxRank; ++r) z[r] = 0;
}

template <class V>
void quantize_ranks(const uint16_t* u, const float* z, RankRow* out) {
  static_assert(kMaxRank == 32, "two vectors");
  const typename V::F v[] = {V::mul(V::load_f16(u), V::load(z)), V::mul(V::load_f16(u + 16), V::load(z + 16))};
  const auto poison = V::fma(v[1], V::zero(), V::mul(v[0], V::zero()));  // not 0 where a value is not finite
  const float highest = V::reduce_max(V::max(V::abs(v[0]), V::abs(v[1]))), poisoned = V::reduce_add(poison);
  const bool is_zero = !(highest > 1e-30f) || poisoned != 0;  // as in `quantize_row`
  const float inverse = is_zero ? 0.0f : 127.0f / highest;
  int32_t sum = 0;
  for (int i = 0; i < 2; ++i) {
    const auto q = is_zero ? V::zero_ints() : V::round_to_int(V::mul(v[i], V::set(inverse)));
    sum += V::reduce_ints(q);
    V::store_i8(out->codes + 16 * i, q);
  }
  out->scale = is_zero ? poisoned : highest / 127.0f;
  out->sum = float(sum);
}

template <class V>
void decode_correction(const NestedMatrix& w, int row, float* out) {
  const int rank = rank_of(w), block = row / kTileRows, lane = row % kTileRows;
  const size_t stride = basis_stride(w.cols);
  const uint8_t* correction = correction_of(w);
  const uint8_t* codes = correction + 2 * kMaxRank + size_t(block) * kTileRows * rank / 2;
  alignas(64) float scales[kTileRows], u[kMaxRank];
  const auto* of_rows = reinterpret_cast<const uint16_t*>(row_scales_of(w)) + block * kTileRows;
  V::store(scales, V::mul(V::load_f16(of_rows), V::set(float(1 << (8 - bits_of(w))) / float(kScaleUnit))));
  for (int i = 0; i < kMaxRank; i += 16) {
    V::store(u + i, V::load_f16(reinterpret_cast<const uint16_t*>(correction) + i));
  }
  for (int j = 0; j < rank; ++j) {
    const uint8_t both = codes[j / kRankStep * 64 + 4 * lane + j % 4];
    const int code = j % kRankStep < 4 ? both & 15 : both >> 4;
    const auto a = V::set(scales[lane] * u[j] * (float(code) - 7.5f));
    const int8_t* v = w.basis + j * stride;
    int c = 0;
    for (; c + 16 <= w.cols; c += 16) V::store(out + c, V::fma(a, V::load_i8(v + c), V::load(out + c)));
    if (c < w.cols) {
      const int n = w.cols - c;
      store_part<V>(out + c, V::fma(a, V::load_i8(v + c), load_part<V>(out + c, n, 0.0f)), n);
    }
  }
}

}  // namespace
}  // namespace edgemoe
