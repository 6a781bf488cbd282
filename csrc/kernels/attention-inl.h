// Attention to one block of keys, for every instruction set and every pair of types of keys and values.
//
// Keys lie in tiles, 16 positions in one vector, so that nothing is summed across lanes. Products with keys in codes
// are of integers: the query is quantised to 8 bits too, like the activations of matrix products. Values are added as
// floats, in the order of their positions.
#pragma once

#include "kernels.h"
#include "packed-inl.h"

namespace edgemoe {
namespace {

template <class V>
void quantize_head(const float* x, int n, int8_t* codes, float* scales, int32_t* sums) {
  for (int g = 0; g < blocks(n, kKvGroup); ++g, codes += kKvGroup) {
    typename V::F v[2];
    auto top = V::zero(), poison = V::zero();
    for (int i = 0; i < 2; ++i) {
      const int start = g * kKvGroup + 16 * i, left = n - start;
      v[i] = left >= 16 ? V::load(x + start) : load_part<V>(x + start, left < 0 ? 0 : left, 0.0f);
      top = V::max(top, V::abs(v[i]));
      poison = V::fma(v[i], V::zero(), poison);  // not 0 where a value is not finite
    }
    const float poisoned = V::reduce_add(poison);
    alignas(64) uint16_t halves[16];
    alignas(64) float rounded[16];
    V::store_f16(halves, V::set(V::reduce_max(top) / 127.0f));
    V::store(rounded, V::load_f16(halves));
    const bool is_zero = !(rounded[0] > 0) || poisoned != 0;
    const auto inverse = V::set(is_zero ? 0.0f : 1.0f / rounded[0]);
    auto total = V::zero_ints();
    for (int i = 0; i < 2; ++i) {
      // With a scale that was rounded down, a value may come to 128.
      const auto whole = V::min(V::max(V::mul(v[i], inverse), V::set(-127.0f)), V::set(127.0f));
      const auto q = is_zero ? V::zero_ints() : V::round_to_int(whole);
      total = V::add_ints(total, q);
      V::store_i8(codes + 16 * i, q);
    }
    scales[g] = is_zero ? poisoned : rounded[0];
    sums[g] = V::reduce_ints(total);
  }
}

/// Prefetches the tile after the next two: tiles of codes are used up faster than hardware prefetchers look ahead.
inline void prefetch_tile(const uint8_t* tile, size_t bytes) {
  for (size_t at = 3 * bytes; at < 4 * bytes; at += 64) __builtin_prefetch(tile + at);
}

template <class V>
typename V::F load_cell(const uint16_t* p) {
  return V::load_f16(p);
}

template <class V>
typename V::F load_cell(const float* p) {
  return V::load(p);
}

/// Keys in float16 or float32.
template <KvType kType, class Cell>
struct PlainKeys {
  static constexpr KvType type = kType;

  /// Writes scores[i][s - base] for N queries and keys s in [begin, end). It works on whole tiles: scores outside the
  /// range are written too, and are either right or never read.
  template <class V, int N>
  static void score(const AttendQuery* queries, const uint8_t* head, int hs, float scale, int base, int begin,
                    int end) {
    constexpr int M = V::kKeyVectors;
    for (int s = begin / (16 * M) * (16 * M); s < end; s += 16 * M) {
      const auto* keys = reinterpret_cast<const Cell*>(head + s / 32 * kv_tile_bytes(type, hs)) + s % 32;
      typename V::F acc[N * M];
      for (auto& x : acc) x = V::zero();
      for (int c = 0; c < hs; ++c) {
        typename V::F k[M];
        for (int j = 0; j < M; ++j) k[j] = load_cell<V>(keys + 32 * c + 16 * j);
        for (int i = 0; i < N; ++i) {
          const auto q = V::set(queries[i].q[c]);
          for (int j = 0; j < M; ++j) acc[i * M + j] = V::fma(q, k[j], acc[i * M + j]);
        }
      }
      for (int i = 0; i < N; ++i) {
        for (int j = 0; j < M; ++j) {
          V::store(queries[i].scores + s + 16 * j - base, V::mul(acc[i * M + j], V::set(scale)));
        }
      }
    }
  }
};

/// Keys in codes, which are multiplied as integers with a query in 8 bits.
template <KvType kType>
struct CodedKeys {
  static constexpr KvType type = kType;
  static constexpr int kBits = kv_packed_bits(type);  ///< 0 for 8 bits

  /// acc[i] = query i's codes times the numbers that the keys' codes stand for, over the 32 columns of the group from c
  /// on, for N queries.
  template <class V, int N>
  static void dots(const AttendQuery* queries, const uint8_t* tile, int hs, int c, typename V::I* acc) {
    const int g = c / kKvGroup;
    if constexpr (kBits == 0) {
      for (int i = 0; i < N; ++i) acc[i] = V::set_ints(-128 * queries[i].sums[g]);
      for (int d = c; d < c + kKvGroup && d < hs; d += 4) {
        const auto codes = V::load_bytes(tile + 16 * d);
        for (int i = 0; i < N; ++i) acc[i] = V::template dot<true>(acc[i], codes, queries[i].codes + d);
      }
    } else {
      for (int i = 0; i < N; ++i) acc[i] = V::zero_ints();
      dot_group<V, kBits, N>(queries, c, tile + kKvPlane<kBits> * g, acc);
      for (int i = 0; i < N; ++i) {
        if (Grid<kBits>::kStep == 2) acc[i] = V::add_ints(acc[i], acc[i]);
        acc[i] = V::add_ints(acc[i], V::set_ints(-Grid<kBits>::kLowest * queries[i].sums[g]));
      }
    }
  }

  /// Like `PlainKeys::score`.
  template <class V, int N>
  static void score(const AttendQuery* queries, const uint8_t* head, int hs, float scale, int base, int begin,
                    int end) {
    if (begin >= end) return;
    for (int s = begin / 16 * 16; s < end; s += 16) {
      const uint8_t* tile = head + s / 16 * kv_tile_bytes(type, hs);
      const auto* scales = reinterpret_cast<const uint16_t*>(tile + kv_codes_bytes(type, hs));
      if (queries[0].is_cold) prefetch_tile(tile, kv_tile_bytes(type, hs));
      typename V::F total[N];
      for (int i = 0; i < N; ++i) total[i] = V::zero();
      for (int c = 0, g = 0; c < hs; c += kKvGroup, ++g) {
        typename V::I acc[N];
        dots<V, N>(queries, tile, hs, c, acc);
        const auto k_scale = V::load_f16(scales + 16 * g);
        for (int i = 0; i < N; ++i) {
          total[i] = V::fma(k_scale, V::mul(V::set(queries[i].scales[g]), V::to_float(acc[i])), total[i]);
        }
      }
      const float* turns = queries[0].turns + size_t(s) * 2 * queries[0].half;
      for (int j = 0; j < queries[0].num_pairs; ++j) {
        const float* turn = turns + 32 * queries[0].pairs[j];
        const auto cos = V::load(turn), sin = V::load(turn + 16);
        for (int i = 0; i < N; ++i) {
          const float* lacking = queries[i].lacking + 2 * j;
          total[i] = V::fma(V::set(lacking[0]), cos, total[i]);
          total[i] = V::fma(V::set(lacking[1]), sin, total[i]);
        }
      }
      for (int i = 0; i < N; ++i) V::store(queries[i].scores + s - base, V::mul(total[i], V::set(scale)));
    }
  }
};

template <KvType kType, class Cell>
struct PlainValues {
  static constexpr KvType type = kType;

  /// part[i] += scores[i][s - base] * values[s] for N queries, columns [c, c + 16 * M) and s in [begin, end), in order.
  template <class V, int N, int M>
  static void add(const AttendQuery* queries, const uint8_t* head, int hs, int c, int base, int begin, int end) {
    const auto* values = reinterpret_cast<const Cell*>(head);
    typename V::F acc[N * M];
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < M; ++j) acc[i * M + j] = V::load(queries[i].part + c + 16 * j);
    }
    for (int s = begin; s < end; ++s) {
      typename V::F v[M];
      for (int j = 0; j < M; ++j) v[j] = load_cell<V>(values + size_t(s) * hs + c + 16 * j);
      for (int i = 0; i < N; ++i) {
        const auto p = V::set(queries[i].scores[s - base]);
        for (int j = 0; j < M; ++j) acc[i * M + j] = V::fma(p, v[j], acc[i * M + j]);
      }
    }
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < M; ++j) V::store(queries[i].part + c + 16 * j, acc[i * M + j]);
    }
  }
};

template <KvType kType>
struct CodedValues {
  static constexpr KvType type = kType;
  static constexpr int kBits = kv_packed_bits(type);  ///< 0 for 8 bits

  /// The numbers that the codes of columns [c, c + 16 * M) of a tile stand for: vector j of a position is `step` bytes
  /// after that of the position before and `next` bytes after vector j - 1. Packed ones are unpacked into `room`.
  template <class V, int M>
  static const int8_t* rows(const uint8_t* tile, int hs, int c, int8_t* room, int* step, int* next) {
    if constexpr (kBits == 0) {
      *step = hs;
      *next = 16;
      return reinterpret_cast<const int8_t*>(tile) + c;
    } else {
      *step = 16;
      *next = 256;
      const uint8_t* group = tile + kKvPlane<kBits> * (c / kKvGroup);
      for (int j = 0; j < M; j += 2, group += kKvPlane<kBits>) {
        if (M > 1 || c % kKvGroup == 0) unpack_values<V, kBits, 0>(group, room + 256 * j);
        if (M > 1) unpack_values<V, kBits, 1>(group, room + 256 * (j + 1));
        if (M == 1 && c % kKvGroup != 0) unpack_values<V, kBits, 1>(group, room);
      }
      return room;
    }
  }

  /// Like `PlainValues::add`; a score is multiplied by the scale of its position's group, and the product by the code's
  /// number. c is a multiple of 32 where M is more than 1.
  template <class V, int N, int M>
  static void add(const AttendQuery* queries, const uint8_t* head, int hs, int c, int base, int begin, int end) {
    constexpr int G = M > 1 ? M / 2 : 1;
    typename V::F acc[N * M];
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < M; ++j) acc[i * M + j] = V::load(queries[i].part + c + 16 * j);
    }
    for (int s = begin; s < end;) {
      const int first = s / 16 * 16, stop = first + 16 < end ? first + 16 : end;
      const uint8_t* tile = head + s / 16 * kv_tile_bytes(type, hs);
      const auto* scales = reinterpret_cast<const uint16_t*>(tile + kv_codes_bytes(type, hs)) + c / kKvGroup * 16;
      if (queries[0].is_cold) prefetch_tile(tile, kv_tile_bytes(type, hs));
      int step, next;
      alignas(64) int8_t room[kBits ? 256 * M : 1];
      const int8_t* codes = rows<V, M>(tile, hs, c, room, &step, &next);
      alignas(64) float weights[N][G][16];
      for (int g = 0; g < G; ++g) {
        const auto scale = V::load_f16(scales + 16 * g);
        for (int i = 0; i < N; ++i) {
          V::store(weights[i][g], V::mul(V::load(queries[i].scores + first - base), scale));
        }
      }
      for (; s < stop; ++s) {
        const int8_t* row = codes + (s - first) * step;
        typename V::F v[M];
        for (int j = 0; j < M; ++j) v[j] = V::load_i8(row + next * j);
        for (int i = 0; i < N; ++i) {
          for (int j = 0; j < M; ++j) {
            acc[i * M + j] = V::fma(V::set(weights[i][j / 2][s - first]), v[j], acc[i * M + j]);
          }
        }
      }
    }
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < M; ++j) V::store(queries[i].part + c + 16 * j, acc[i * M + j]);
    }
  }
};

/// The functions for N queries and the types of a layer's keys and values.
using ScoreKeys = void (*)(const AttendQuery* queries, const uint8_t* head, int hs, float scale, int base, int begin,
                           int end);
using AddValues = void (*)(const AttendQuery* queries, const uint8_t* head, int hs, int base, int begin, int end);

template <class V, int N>
ScoreKeys score_keys(KvType type) {
  switch (type) {
    case KvType::kF16:
      return PlainKeys<KvType::kF16, uint16_t>::score<V, N>;
    case KvType::kF32:
      return PlainKeys<KvType::kF32, float>::score<V, N>;
    case KvType::kQ8:
      return CodedKeys<KvType::kQ8>::score<V, N>;
    case KvType::kQ4:
      return CodedKeys<KvType::kQ4>::score<V, N>;
    case KvType::kQ3:
      return CodedKeys<KvType::kQ3>::score<V, N>;
    case KvType::kQ2:
      break;
  }
  return CodedKeys<KvType::kQ2>::score<V, N>;
}

template <class V, class Values, int N>
void add_values(const AttendQuery* queries, const uint8_t* head, int hs, int base, int begin, int end) {
  constexpr int M = V::kHeadVectors;
  if (begin >= end) return;
  int c = 0;
  for (; c + 16 * M <= hs; c += 16 * M) Values::template add<V, N, M>(queries, head, hs, c, base, begin, end);
  for (; c < hs; c += 16) Values::template add<V, N, 1>(queries, head, hs, c, base, begin, end);
}

template <class V, int N>
AddValues add_values_of(KvType type) {
  switch (type) {
    case KvType::kF16:
      return add_values<V, PlainValues<KvType::kF16, uint16_t>, N>;
    case KvType::kF32:
      return add_values<V, PlainValues<KvType::kF32, float>, N>;
    case KvType::kQ8:
      return add_values<V, CodedValues<KvType::kQ8>, N>;
    case KvType::kQ4:
      return add_values<V, CodedValues<KvType::kQ4>, N>;
    case KvType::kQ3:
      return add_values<V, CodedValues<KvType::kQ3>, N>;
    case KvType::kQ2:
      break;
  }
  return add_values<V, CodedValues<KvType::kQ2>, N>;
}

template <class V, int N>
void attend_block(const AttendQuery* queries, const KvLayer& kv, float scale, int kv_head, int base) {
  const int hs = kv.head_stride;
  const uint8_t* keys = kv.keys + kv_head * kv_head_bytes(kv.key_type, kv.capacity, hs);
  const uint8_t* values = kv.values + kv_head * kv_head_bytes(kv.value_type, kv.capacity, hs);
  const ScoreKeys score = score_keys<V, N>(kv.key_type), score_one = score_keys<V, 1>(kv.key_type);
  const AddValues add = add_values_of<V, N>(kv.value_type), add_one = add_values_of<V, 1>(kv.value_type);
  // Positions that all queries see are done for all at once, so that each key and value is loaded once; those before
  // and after, query by query.
  int begin = queries[0].begin, end = queries[0].end;
  for (int i = 1; i < N; ++i) {
    begin = queries[i].begin > begin ? queries[i].begin : begin;
    end = queries[i].end < end ? queries[i].end : end;
  }
  if (end < begin) end = begin;
  const auto before = [&](int i) { return begin < queries[i].end ? begin : queries[i].end; };
  const auto after = [&](int i) { return end > queries[i].begin ? end : queries[i].begin; };
  score(queries, keys, hs, scale, base, begin, end);
  for (int i = 0; i < N; ++i) {
    const AttendQuery& q = queries[i];
    score_one(&q, keys, hs, scale, base, q.begin, before(i));
    score_one(&q, keys, hs, scale, base, after(i), q.end);
    softmax<V>(q.scores + q.begin - base, q.end - q.begin, q.part + hs, q.part + hs + 1);
    for (int c = 0; c < hs; c += 16) V::store(q.part + c, V::zero());
    add_one(&q, values, hs, base, q.begin, before(i));
  }
  add(queries, values, hs, base, begin, end);
  for (int i = 0; i < N; ++i) add_one(queries + i, values, hs, base, after(i), queries[i].end);
}

template <class V>
void attend(int n, const AttendQuery* queries, const KvLayer& kv, float scale, int kv_head, int base) {
  static_assert(kQueries == 4, "a case for each number of queries");
  switch (n) {
    case 1:
      return attend_block<V, 1>(queries, kv, scale, kv_head, base);
    case 2:
      return attend_block<V, 2>(queries, kv, scale, kv_head, base);
    case 3:
      return attend_block<V, 3>(queries, kv, scale, kv_head, base);
    case 4:
      return attend_block<V, 4>(queries, kv, scale, kv_head, base);
  }
}

template <class V>
void merge_parts(float* into, const float* part, int hs) {
  const float a = into[hs], b = part[hs], top = a > b ? a : b;
  alignas(64) float pair[16] = {a - top, b - top};
  V::store(pair, exp<V>(V::load(pair)));
  const float sum_a = into[hs + 1] * pair[0], sum_b = part[hs + 1] * pair[1], sum = sum_a + sum_b;
  const auto share_a = V::set(sum_a / sum), share_b = V::set(sum_b / sum);
  for (int c = 0; c < hs; c += 16) {
    V::store(into + c, V::fma(V::load(part + c), share_b, V::mul(V::load(into + c), share_a)));
  }
  into[hs] = top;
  into[hs + 1] = sum;
}

}  // namespace
}  // namespace edgemoe
