#include "mixers/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "error.h"

namespace edgemoe {
namespace {

constexpr int kGroupQueries = 32;  ///< of a prompt, that pass over the keys together: a block stays in the cache

/// Where things lie in a workspace's floats: first each thread's, then what all share.
struct Layout {
  int stride;     ///< head_dim, rounded up
  size_t query;   ///< floats of a prepared query: q, scales, sums, codes
  size_t part;    ///< floats of a part
  size_t thread;  ///< floats of a thread: scores, prepared queries, their results, parts to merge
  int max_blocks;

  explicit Layout(const WorkspaceShape& shape)
      : stride(blocks(shape.head_dim, 16) * 16),
        query(round_up(stride + (2 + kKvGroup / sizeof(float)) * blocks(stride, kKvGroup), 16)),
        part(size_t(stride) + kPartPadding),
        thread(kQueries * size_t(kKeyBlock) + kGroupQueries * (query + part) + kQueries * part),
        max_blocks(blocks(shape.max_context, kKeyBlock)) {}

  size_t total(int num_threads, int num_heads) const {
    return num_threads * thread + num_heads * (query + max_blocks * part);
  }
};

/// A prepared query in its scratch.
struct Prepared {
  float* q;
  float* scales;
  int32_t* sums;
  int8_t* codes;

  Prepared(float* scratch, int stride) {
    const int groups = blocks(stride, kKvGroup);
    q = scratch;
    scales = q + stride;
    sums = reinterpret_cast<int32_t*>(scales + groups);
    codes = reinterpret_cast<int8_t*>(sums + groups);
  }

  /// Copies a head's query, padded, and quantises it where keys are quantised.
  void fill(const Kernels& kn, const float* x, int head_dim, const KvLayer& kv) const {
    std::copy_n(x, head_dim, q);
    std::fill(q + head_dim, q + kv.head_stride, 0.0f);
    if (kv.key_type == KvType::kQ8) kn.quantize_head(q, kv.head_stride, codes, scales, sums);
  }

  AttendQuery query(float* scores, float* part, int begin, int end, bool is_cold) const {
    return {q, codes, scales, sums, scores, part, begin, end, is_cold};
  }
};

/// Whether no number is infinite or none at all. An exponent of ones carries into the sign.
bool all_finite(const uint16_t* halves, int n) {
  unsigned seen = 0;
  for (int i = 0; i < n; ++i) seen |= (halves[i] & 0x7c00u) + 0x0400u;
  return !(seen & 0x8000u);
}

bool all_finite(const float* x, int n) {
  uint32_t seen = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    seen |= (bits & 0x7f800000u) + 0x00800000u;
  }
  return !(seen & 0x80000000u);
}

/// Stores one head's key or value at a position. Returns whether the type can hold it. scratch: of a prepared query.
bool store(const Kernels& kn, const float* x, int head_dim, KvType type, bool is_key, uint8_t* head, int pos,
           int stride, float* scratch) {
  const int rows = kv_tile_rows(type), lane = pos % rows;
  uint8_t* tile = head + pos / rows * kv_tile_bytes(type, stride);
  if (type == KvType::kF16) {
    auto* values = reinterpret_cast<uint16_t*>(tile);
    auto* halves = is_key ? reinterpret_cast<uint16_t*>(scratch) : values + lane * stride;
    kn.to_f16(x, head_dim, halves);
    for (int c = 0; is_key && c < head_dim; ++c) values[c * rows + lane] = halves[c];
    return all_finite(halves, head_dim);
  }
  if (type == KvType::kF32) {
    auto* values = reinterpret_cast<float*>(tile);
    for (int c = 0; c < head_dim; ++c) values[is_key ? c * rows + lane : lane * stride + c] = x[c];
    return all_finite(x, head_dim);
  }
  const Prepared row(scratch, stride);
  std::copy_n(x, head_dim, row.q);
  std::fill(row.q + head_dim, row.q + stride, 0.0f);
  kn.quantize_head(row.q, stride, row.codes, row.scales, row.sums);
  for (int c = 0; is_key && c < stride; c += 4) {
    uint32_t four;
    std::memcpy(&four, row.codes + c, 4);
    four ^= 0x80808080u;
    std::memcpy(tile + 16 * c + 4 * lane, &four, 4);
  }
  if (!is_key) std::memcpy(tile + lane * stride, row.codes, size_t(stride));
  auto* halves = reinterpret_cast<uint16_t*>(tile + rows * stride);
  bool fits = true;
  for (int g = 0; g < blocks(stride, kKvGroup); ++g) {
    kn.to_f16(row.scales + g, 1, halves + g * rows + lane);
    fits = fits && all_finite(halves + g * rows + lane, 1);
  }
  return fits;
}

/// Says which number of a position's keys or values does not fit; empty if all do.
std::string misfit(const float* x, int n, KvType type, bool is_key) {
  const char *name = is_key ? "key" : "value", *flag = is_key ? "-ctk" : "-ctv";
  const float most = type == KvType::kF16 ? 65504.0f : 127 * 65504.0f;
  float top = 0;
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return std::string("a ") + name + " is not a finite number: the computation broke down";
    top = std::max(top, std::fabs(x[i]));
  }
  if (type == KvType::kF32 || top <= most) return "";
  char text[200];
  std::snprintf(text, sizeof text,
                "a %s of %g does not fit the KV cache in %s, which ends at %g; f32 holds it (%s f32)", name,
                double(top), type == KvType::kF16 ? "f16" : "q8_0", double(most), flag);
  return text;
}

}  // namespace

size_t attention_floats(int num_threads, const WorkspaceShape& shape) {
  return Layout(shape).total(num_threads, shape.num_heads);
}

void attention(Workspace& ws, float* q, float* k, float* v, int T, int pos, const AttentionParts& p, const KvLayer& kv,
               float* out) {
  const Kernels& kn = kernels();
  const int hd = p.shape.head_dim, half = p.shape.rope_dim / 2, heads = p.shape.num_heads,
            kv_heads = p.shape.num_kv_heads;
  if (pos < 0 || T < 1 || pos > kv.capacity - T || kv.capacity > ws.shape().max_context) {
    throw std::invalid_argument("attention: positions [" + std::to_string(pos) + ", " +
                                std::to_string(int64_t(pos) + T) + ") are outside the context of " +
                                std::to_string(kv.capacity));
  }
  if (heads > ws.shape().num_heads || hd > ws.shape().head_dim) {
    throw std::invalid_argument("attention: expected at most " + std::to_string(ws.shape().num_heads) + " heads of " +
                                std::to_string(ws.shape().head_dim) + ", got " + std::to_string(heads) + " of " +
                                std::to_string(hd));
  }
  const int stride = kv.head_stride, per_kv = heads / kv_heads, window = p.shape.window;
  const Layout at(ws.shape());
  const auto mine = [&] { return ws.attention() + ThreadPool::worker() * at.thread; };
  const size_t key_head = kv_head_bytes(kv.key_type, kv.capacity, stride);
  const size_t value_head = kv_head_bytes(kv.value_type, kv.capacity, stride);

  const auto prepare = [&](float* x, int num_heads, const float* bias, const float* norm, int t, bool rotate) {
    const int width = num_heads * hd;
    for (int i = 0; bias && i < width; ++i) x[i] += bias[i];
    const auto norm_heads = [&] {
      for (int h = 0; h < num_heads; ++h) kn.rms_norm(x + h * hd, norm, p.norm_eps, hd, x + h * hd);
    };
    if (norm && !p.norm_per_head) {
      kn.rms_norm(x, norm, p.norm_eps, width, x);
    } else if (norm && !p.norm_after_rope) {
      norm_heads();
    }
    for (int i = 0; p.clip > 0 && i < width; ++i) x[i] = std::min(std::max(x[i], -p.clip), p.clip);
    for (int h = 0; rotate && h < num_heads; ++h) {
      kn.rope(x + h * hd, p.cos + size_t(t) * half, p.sin + size_t(t) * half, p.shape.rope_dim);
    }
    if (norm && p.norm_after_rope) norm_heads();
  };
  std::atomic<int> misfits{T};  // the first row that cannot be stored
  ws.pool.run(T, 4, [&](int begin, int end) {
    float* scratch = mine();
    for (int t = begin; t < end; ++t) {
      prepare(q + size_t(t) * heads * hd, heads, p.q_bias, p.q_norm, t, true);
      float* kt = k + size_t(t) * kv_heads * hd;
      float* vt = v + size_t(t) * kv_heads * hd;
      prepare(kt, kv_heads, p.k_bias, p.k_norm, t, true);
      prepare(vt, kv_heads, p.v_bias, nullptr, t, false);
      bool fits = true;
      for (int h = 0; h < kv_heads; ++h) {
        fits &= store(kn, kt + h * hd, hd, kv.key_type, true, kv.keys + h * key_head, pos + t, stride, scratch);
        fits &= store(kn, vt + h * hd, hd, kv.value_type, false, kv.values + h * value_head, pos + t, stride, scratch);
      }
      for (int first = misfits; !fits && t < first && !misfits.compare_exchange_weak(first, t);) continue;
    }
  });
  if (const int t = misfits; t < T) {
    const int width = kv_heads * hd;
    std::string what = misfit(k + size_t(t) * width, width, kv.key_type, true);
    if (what.empty()) what = misfit(v + size_t(t) * width, width, kv.value_type, false);
    throw RangeError("layer " + std::to_string(p.layer) + ": " + what);
  }
  const auto first_seen = [&](int position) { return window > 0 ? std::max(0, position + 1 - window) : 0; };

  if (T == 1) {  // all threads share the blocks of all heads
    const int first = first_seen(pos), first_block = first / kKeyBlock, num_blocks = pos / kKeyBlock + 1 - first_block;
    float* queries = ws.attention() + ws.pool.size() * at.thread;
    float* parts = queries + heads * at.query;  // [block][head]
    for (int h = 0; h < heads; ++h) Prepared(queries + h * at.query, stride).fill(kn, q + h * hd, hd, kv);
    ws.pool.run(kv_heads * num_blocks, grain_for(kv_heads * num_blocks, ws.pool.size()), [&](int begin, int end) {
      float* scores = mine();
      for (int i = begin; i < end; ++i) {
        const int kv_head = i / num_blocks, block = i % num_blocks, base = (first_block + block) * kKeyBlock;
        const int from = std::max(first, base), to = std::min(pos + 1, base + kKeyBlock);
        for (int h = kv_head * per_kv; h < (kv_head + 1) * per_kv; h += kQueries) {
          AttendQuery block_queries[kQueries];
          const int n = std::min(kQueries, (kv_head + 1) * per_kv - h);
          for (int j = 0; j < n; ++j) {
            block_queries[j] = Prepared(queries + (h + j) * at.query, stride)
                                   .query(scores + j * kKeyBlock, parts + (block * heads + h + j) * at.part, from, to,
                                          h == kv_head * per_kv);
          }
          kn.attend(n, block_queries, kv, p.shape.scale, kv_head, base);
        }
      }
    });
    for (int h = 0; h < heads; ++h) {
      float* whole = parts + h * at.part;
      for (int b = 1; b < num_blocks; ++b) kn.merge_parts(whole, parts + (b * heads + h) * at.part, stride);
      std::copy_n(whole, hd, out + h * hd);
    }
    return;
  }

  // The queries of one kv head, by position and then by head; the long ones first.
  const int num_groups = blocks(T * per_kv, kGroupQueries);
  ws.pool.run(kv_heads * num_groups, 1, [&](int begin, int end) {
    float* scores = mine();
    float* queries = scores + kQueries * kKeyBlock;
    float* parts = queries + kGroupQueries * at.query;
    float* next_parts = parts + kGroupQueries * at.part;
    for (int i = begin; i < end; ++i) {
      const int kv_head = i % kv_heads, start = (num_groups - 1 - i / kv_heads) * kGroupQueries;
      const int count = std::min(kGroupQueries, T * per_kv - start);
      const auto position = [&](int j) { return pos + (start + j) / per_kv; };
      const auto place = [&](int j) {
        const size_t head = kv_head * per_kv + (start + j) % per_kv;
        return (size_t((start + j) / per_kv) * heads + head) * hd;
      };
      for (int j = 0; j < count; ++j) Prepared(queries + j * at.query, stride).fill(kn, q + place(j), hd, kv);
      for (int base = first_seen(position(0)) / kKeyBlock * kKeyBlock; base <= position(count - 1); base += kKeyBlock) {
        for (int quad = 0; quad < count; quad += kQueries) {
          AttendQuery block_queries[kQueries];
          int ids[kQueries], n = 0;
          bool is_later[kQueries];
          for (int j = quad; j < std::min(quad + kQueries, count); ++j) {
            const int first = first_seen(position(j));
            const int from = std::max(first, base), to = std::min(position(j) + 1, base + kKeyBlock);
            if (from >= to) continue;
            ids[n] = j;
            is_later[n] = from > first;
            float* part = is_later[n] ? next_parts + n * at.part : parts + j * at.part;
            block_queries[n] =
                Prepared(queries + j * at.query, stride).query(scores + n * kKeyBlock, part, from, to, quad == 0);
            ++n;
          }
          if (n == 0) continue;
          kn.attend(n, block_queries, kv, p.shape.scale, kv_head, base);
          for (int j = 0; j < n; ++j) {
            if (is_later[j]) kn.merge_parts(parts + ids[j] * at.part, next_parts + j * at.part, stride);
          }
        }
      }
      for (int j = 0; j < count; ++j) std::copy_n(parts + j * at.part, hd, out + place(j));
    }
  });
}

}  // namespace edgemoe
