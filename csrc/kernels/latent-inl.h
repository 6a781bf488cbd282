// Attention to one block of keys whose leading columns are the values too, for every instruction set: latents of
// multi-head latent attention (arXiv 2405.04434, section 2.1), of which all heads share one per position.
//
// Keys lie as attention-inl.h says, 16 positions in one vector. So a value's column is summed over the positions of
// each lane first, in their order, and over the lanes at the end, in the order of `reduce_add`.
#pragma once

#include "attention-inl.h"

namespace edgemoe {
namespace {

/// Returns in lane i the sum of the lanes of vector i, for 16 vectors, each in the order of `reduce_add`.
template <class V>
inline typename V::F sums_of(typename V::F* x) {
  for (int i = 0; i < 8; ++i) x[i] = V::template fold<8>(x[i], x[i + 8]);
  for (int i = 0; i < 4; ++i) x[i] = V::template fold<4>(x[i], x[i + 4]);
  for (int i = 0; i < 2; ++i) x[i] = V::template fold<2>(x[i], x[i + 2]);
  return V::template fold<1>(x[0], x[1]);
}

/// Values in the keys' own tiles, in float16 or float32.
template <KvType kType, class Cell>
struct PlainLatents {
  static constexpr KvType type = kType;

  /// What each position's values are multiplied by: its score.
  template <class V>
  static const float* weights(const AttendQuery& query, const uint8_t*, int, int, int, int, float*) {
    return query.scores;
  }

  /// k[j] = column c + J + j of 16 positions from s on, for j < C. c is a multiple of 4.
  template <class V, int J, int C>
  static void load(const uint8_t* head, int hs, int c, int s, typename V::F* k) {
    const auto* cells = reinterpret_cast<const Cell*>(head + s / 32 * kv_tile_bytes(type, hs)) + 32 * (c + J) + s % 32;
    for (int j = 0; j < C; ++j) k[j] = load_cell<V>(cells + 32 * j);
  }
};

template <KvType kType>
struct CodedLatents {
  static constexpr KvType type = kType;
  static constexpr int kBits = kv_packed_bits(type);  ///< 0 for 8 bits

  /// What each position's codes are multiplied by, [kKeyBlock]: its score times the scale of the 32 columns from c on.
  template <class V>
  static const float* weights(const AttendQuery& query, const uint8_t* head, int hs, int c, int base, int stop,
                              float* out) {
    for (int s = base; s < stop; s += 16) {
      const uint8_t* tile = head + s / 16 * kv_tile_bytes(type, hs);
      const auto* scales = reinterpret_cast<const uint16_t*>(tile + kv_codes_bytes(type, hs)) + c / kKvGroup * 16;
      V::store(out + s - base, V::mul(V::load(query.scores + s - base), V::load_f16(scales)));
    }
    return out;
  }

  /// The numbers that the codes of columns [c, c + 4) of a tile stand for, plus 128.
  template <class V>
  static typename V::B bytes(const uint8_t* tile, int c) {
    if constexpr (kBits == 0) {
      return V::load_bytes(tile + 16 * c);
    } else {
      const uint8_t* group = tile + kKvPlane<kBits> * (c / kKvGroup);
      return V::lookup(Levels<kBits, 128>::kBytes, packed_step_at<V, kBits>(group, c % kKvGroup / 4));
    }
  }

  template <class V, int J, int C>
  static void load(const uint8_t* head, int hs, int c, int s, typename V::F* k) {
    const auto codes = bytes<V>(head + s / 16 * kv_tile_bytes(type, hs), c);
    k[0] = V::template byte_of<J>(codes);
    if constexpr (C > 1) {
      k[1] = V::template byte_of<1>(codes);
      k[2] = V::template byte_of<2>(codes);
      k[3] = V::template byte_of<3>(codes);
    }
  }
};

/// sums[i][c % 16 + J + j] = what the positions of each lane add up to in column c + J + j, for N queries and j < C.
template <class V, class Latents, int N, int J, int C>
inline void add_columns(const float* const* weights, const uint8_t* head, int hs, int c, int base, int stop,
                        typename V::F (*sums)[16]) {
  typename V::F acc[N * C];
  for (auto& x : acc) x = V::zero();
  for (int s = base; s < stop; s += 16) {
    typename V::F k[C];
    Latents::template load<V, J, C>(head, hs, c, s, k);
    for (int i = 0; i < N; ++i) {
      const auto w = V::load(weights[i] + s - base);
      for (int j = 0; j < C; ++j) acc[i * C + j] = V::fma(w, k[j], acc[i * C + j]);
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < C; ++j) sums[i][c % 16 + J + j] = acc[i * C + j];
  }
}

template <class V, class Latents, int N>
void add_latents(const AttendQuery* queries, const KvLayer& kv, int base, int stop) {
  alignas(64) float scratch[N][kKeyBlock];
  const float* weights[N] = {};
  typename V::F sums[N][16];
  for (int c = 0; c < kv.value_stride; c += 16) {
    for (int i = 0; c % kKvGroup == 0 && i < N; ++i) {
      weights[i] = Latents::template weights<V>(queries[i], kv.keys, kv.head_stride, c, base, stop, scratch[i]);
    }
    for (int d = c; d < c + 16; d += 4) {
      const auto add = [&](auto kernel) { kernel(weights, kv.keys, kv.head_stride, d, base, stop, sums); };
      if constexpr (V::kHeadVectors == 4) {
        add(add_columns<V, Latents, N, 0, 4>);
      } else {
        add(add_columns<V, Latents, N, 0, 1>);
        add(add_columns<V, Latents, N, 1, 1>);
        add(add_columns<V, Latents, N, 2, 1>);
        add(add_columns<V, Latents, N, 3, 1>);
      }
    }
    // Positions that a query does not see add zeros, which may change a zero's sign: here every zero becomes +0.
    for (int i = 0; i < N; ++i) V::store(queries[i].part + c, V::add(sums_of<V>(sums[i]), V::zero()));
  }
}

template <class V, class Keys, class Latents, int N>
void attend_latents(const AttendQuery* queries, const KvLayer& kv, float scale, int base) {
  int begin = queries[0].begin, end = queries[0].end;
  for (int i = 1; i < N; ++i) {
    begin = queries[i].begin < begin ? queries[i].begin : begin;
    end = queries[i].end > end ? queries[i].end : end;
  }
  const int stop = blocks(end, 16) * 16;
  Keys::template score<V, N>(queries, kv.keys, kv.head_stride, scale, base, begin, end);
  for (int i = 0; i < N; ++i) {
    const AttendQuery& q = queries[i];
    float* part = q.part + kv.value_stride;
    softmax<V>(q.scores + q.begin - base, q.end - q.begin, part, part + 1);
    for (int s = base; s < q.begin; ++s) q.scores[s - base] = 0;
    for (int s = q.end; s < stop; ++s) q.scores[s - base] = 0;
  }
  add_latents<V, Latents, N>(queries, kv, base, stop);
}

template <class V, class Keys, class Latents>
void attend_latents_of(int n, const AttendQuery* queries, const KvLayer& kv, float scale, int base) {
  static_assert(kQueries == 4, "a case for each number of queries");
  switch (n) {
    case 1:
      return attend_latents<V, Keys, Latents, 1>(queries, kv, scale, base);
    case 2:
      return attend_latents<V, Keys, Latents, 2>(queries, kv, scale, base);
    case 3:
      return attend_latents<V, Keys, Latents, 3>(queries, kv, scale, base);
    case 4:
      return attend_latents<V, Keys, Latents, 4>(queries, kv, scale, base);
  }
}

template <class V, KvType kType>
void attend_coded(int n, const AttendQuery* queries, const KvLayer& kv, float scale, int base) {
  attend_latents_of<V, CodedKeys<kType>, CodedLatents<kType>>(n, queries, kv, scale, base);
}

template <class V>
void attend_latent(int n, const AttendQuery* queries, const KvLayer& kv, float scale, int base) {
  switch (kv.key_type) {
    case KvType::kF16:
      return attend_latents_of<V, PlainKeys<KvType::kF16, uint16_t>, PlainLatents<KvType::kF16, uint16_t>>(
          n, queries, kv, scale, base);
    case KvType::kF32:
      return attend_latents_of<V, PlainKeys<KvType::kF32, float>, PlainLatents<KvType::kF32, float>>(n, queries, kv,
                                                                                                     scale, base);
    case KvType::kQ8:
      return attend_coded<V, KvType::kQ8>(n, queries, kv, scale, base);
    case KvType::kQ4:
      return attend_coded<V, KvType::kQ4>(n, queries, kv, scale, base);
    case KvType::kQ3:
      return attend_coded<V, KvType::kQ3>(n, queries, kv, scale, base);
    case KvType::kQ2:
      return attend_coded<V, KvType::kQ2>(n, queries, kv, scale, base);
  }
}

}  // namespace
}  // namespace edgemoe
