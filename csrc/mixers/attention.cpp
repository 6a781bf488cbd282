#include "mixers/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "error.h"
#include "kv.h"
#include "mixers/kv_store.h"

namespace edgemoe {
namespace {

constexpr int kGroupQueries = 32;  ///< queries of a prompt that pass over the keys together: a block stays in the cache

/// The layout of attention's scratch: first each thread's part, then what all threads share.
struct Layout {
  int stride;     ///< head_dim, rounded up
  size_t query;   ///< floats of a prepared query: the head, and the numbers of `lacking_of`
  size_t part;    ///< floats of a part
  size_t thread;  ///< floats of a thread: scores, prepared queries, their results, parts to merge, a sink's part
  int max_blocks;

  explicit Layout(const WorkspaceShape& shape)
      : stride(blocks(shape.head_dim, 16) * 16),
        query(QuantizedHead::floats(stride) + stride),
        part(size_t(stride) + kPartPadding),
        thread(kQueries * size_t(kKeyBlock) + kGroupQueries * (query + part) + (kQueries + 1) * part),
        max_blocks(blocks(shape.max_context, kKeyBlock)) {}

  size_t total(int num_threads, int num_heads) const {
    return num_threads * thread + num_heads * (query + max_blocks * part);
  }
};

/// One call of `attention`.
class Pass {
 public:
  Pass(Workspace& ws, int T, int pos, const AttentionParts& parts, const KvLayer& kv);

  /// Prepares q, k and v in place and stores k and v. Throws RangeError.
  void store(float* q, float* k, float* v);
  /// Stores and attends for a single token: all threads share the heads, and the blocks of all heads.
  void attend_one(float* q, float* k, float* v, float* out);
  /// Attends for a prompt. A piece of work has queries of one kv head, ordered by position and then by head.
  void attend_many(const float* q, float* out);

 private:
  void prepare(float* x, int num_heads, const float* bias, const float* norm, int t) const;
  void prepare_values(float* v, int first_head, int num_heads) const;
  void grow(float* q, int num_heads, int t) const;
  bool store_heads(const float* k, const float* v, int first_head, int num_heads, int t) const;
  bool store_alone(float* q, float* k, float* v, int kv_head) const;
  [[noreturn]] void refuse(int t, const float* k, const float* v) const;
  void attend_piece(int i, int first_block, int num_blocks) const;
  void merge(int head, int num_blocks, float* out) const;
  void attend_group(int kv_head, int start, const float* q, float* out);
  void forget() const;
  void fill(float* scratch, const float* q, int kv_head) const;
  void attend_block(int n, AttendQuery* queries, int kv_head, int base) const;
  AttendQuery query(float* scratch, int kv_head, float* scores, float* part) const;
  void give(float* part, int head, float* out) const;
  float* queries() const { return ws_.attention() + ws_.pool.size() * at_.thread; }  ///< of a single token, by head
  float* parts() const { return queries() + heads_ * at_.query; }                    ///< [block][head]
  float* mine() const { return ws_.attention() + ThreadPool::worker() * at_.thread; }
  int first_seen(int position) const {
    const AttentionShape& s = p_.shape;
    const int begin = s.chunk > 0 ? position / s.chunk * s.chunk : 0;
    return s.window > 0 ? std::max(begin, position + 1 - s.window) : begin;
  }

  Workspace& ws_;
  const Kernels& kn_;
  const int T_, pos_;
  const AttentionParts& p_;
  const KvLayer& kv_;
  const Layout at_;
  const int hd_, vd_, heads_, kv_heads_, per_kv_;
  const KeyConstants* constants_ = nullptr;  ///< left out of the stored keys; null for none
  const float *k_bias_, *v_bias_;            ///< included in what is stored
  const float* out_bias_ = nullptr;  ///< left out of the stored values and added to the result: weights sum to 1
};

Pass::Pass(Workspace& ws, int T, int pos, const AttentionParts& p, const KvLayer& kv)
    : ws_(ws),
      kn_(kernels()),
      T_(T),
      pos_(pos),
      p_(p),
      kv_(kv),
      at_(ws.shape()),
      hd_(p.shape.head_dim),
      vd_(kv.values ? hd_ : kv.value_stride),
      heads_(p.shape.num_heads),
      kv_heads_(p.shape.num_kv_heads),
      per_kv_(heads_ / kv_heads_),
      k_bias_(p.k_bias),
      v_bias_(p.v_bias) {
  check_positions(kv, p.shape.window, pos, T, ws.shape().max_context);
  if (heads_ > ws.shape().num_heads || hd_ > ws.shape().head_dim) {
    throw std::invalid_argument("attention: expected at most " + std::to_string(ws.shape().num_heads) + " heads of " +
                                std::to_string(ws.shape().head_dim) + ", got " + std::to_string(heads_) + " of " +
                                std::to_string(hd_));
  }
  if (kv_is_coded(kv.key_type) && p.constants && !p.constants->pairs.empty()) {
    constants_ = p.constants;
    k_bias_ = constants_->rest.data();
    if (!p.turns) throw std::invalid_argument("attention: keys without their biases need a Rope that keeps positions");
  }
  if (kv_is_coded(kv.value_type) && !(p.clip > 0) && !p.v_norm) std::swap(v_bias_, out_bias_);
}

void Pass::prepare(float* x, int num_heads, const float* bias, const float* norm, int t) const {
  const int width = num_heads * hd_, half = p_.shape.rope_dim / 2;
  const auto norm_heads = [&] {
    for (int h = 0; h < num_heads; ++h) kn_.rms_norm(x + h * hd_, norm, p_.norm_eps, hd_, x + h * hd_);
  };
  for (int i = 0; bias && i < width; ++i) x[i] += bias[i];
  if (norm && !p_.norm_per_head) {
    kn_.rms_norm(x, norm, p_.norm_eps, width, x);
  } else if (norm && !p_.norm_after_rope) {
    norm_heads();
  }
  for (int i = 0; p_.clip > 0 && i < width; ++i) x[i] = std::min(std::max(x[i], -p_.clip), p_.clip);
  for (int h = 0; h < num_heads; ++h) {
    kn_.rope(x + h * hd_, p_.cos + size_t(t) * half, p_.sin + size_t(t) * half, p_.shape.rope_dim);
  }
  if (norm && p_.norm_after_rope) norm_heads();
}

void Pass::prepare_values(float* v, int first_head, int num_heads) const {
  const int width = num_heads * hd_;
  const float* bias = v_bias_ ? v_bias_ + first_head * hd_ : nullptr;
  for (int i = 0; bias && i < width; ++i) v[i] += bias[i];
  for (int h = 0; p_.v_norm && h < num_heads; ++h) kn_.rms_norm(v + h * hd_, p_.v_norm, p_.norm_eps, hd_, v + h * hd_);
  for (int i = 0; p_.clip > 0 && i < width; ++i) v[i] = std::min(std::max(v[i], -p_.clip), p_.clip);
}

/// Scales queries up with their position, so that the softmax of long contexts does not get flat (arXiv 2501.19399).
void Pass::grow(float* q, int num_heads, int t) const {
  const double times = 1 + double(p_.growth) * std::log1p((pos_ + t + 1) / p_.grow_every);
  for (int i = 0; times != 1 && i < num_heads * hd_; ++i) q[i] *= float(times);
}

void Pass::store(float* q, float* k, float* v) {
  const size_t width = size_t(kv_heads_) * hd_;
  std::atomic<int> misfits{T_};  // the first row that cannot be stored
  const bool is_packed = kv_packed_bits(kv_.key_type) || kv_packed_bits(kv_.value_type);
  const int together = is_packed ? kStoredTogether : 4, ahead = pos_ % together;
  ws_.pool.run(blocks(ahead + T_, together), 1, [&](int begin, int end) {
    for (int t = std::max(begin * together - ahead, 0); t < std::min(end * together - ahead, T_); ++t) {
      prepare(q + size_t(t) * heads_ * hd_, heads_, p_.q_bias, p_.q_norm, t);
      if (p_.growth > 0) grow(q + size_t(t) * heads_ * hd_, heads_, t);
      float *kt = k + t * width, *vt = v ? v + t * width : nullptr;
      prepare(kt, kv_heads_, k_bias_, p_.k_norm, t);
      if (vt) prepare_values(vt, 0, kv_heads_);
      const bool fits = store_heads(kt, vt, 0, kv_heads_, t);
      for (int first = misfits; !fits && t < first && !misfits.compare_exchange_weak(first, t);) continue;
    }
  });
  if (misfits < T_) refuse(misfits, k, v);
}

/// Stores some kv heads of row t. k and v are those of the first one; v is null for latents. Returns whether all fit.
bool Pass::store_heads(const float* k, const float* v, int first_head, int num_heads, int t) const {
  const QuantizedHead scratch(mine(), kv_.head_stride);
  bool fits = true;
  for (int h = 0; h < num_heads; ++h) {
    fits &= store_head(kn_, kv_, true, first_head + h, pos_ + t, k + h * hd_, hd_, scratch);
    if (v) fits &= store_head(kn_, kv_, false, first_head + h, pos_ + t, v + h * hd_, hd_, scratch);
  }
  return fits;
}

/// Prepares a single token's query heads, key and value of one kv head and stores the latter two. q, k and v have all
/// heads. Returns whether they fit.
bool Pass::store_alone(float* q, float* k, float* v, int kv_head) const {
  const size_t at = size_t(kv_head) * hd_, q_at = at * per_kv_;
  prepare(q + q_at, per_kv_, p_.q_bias ? p_.q_bias + q_at : nullptr, p_.q_norm, 0);
  if (p_.growth > 0) grow(q + q_at, per_kv_, 0);
  prepare(k + at, 1, k_bias_ ? k_bias_ + at : nullptr, p_.k_norm, 0);
  prepare_values(v + at, kv_head, 1);
  return store_heads(k + at, v + at, kv_head, 1, 0);
}

/// Throws a RangeError that says what in row t could not be stored.
void Pass::refuse(int t, const float* k, const float* v) const {
  const size_t width = size_t(kv_heads_) * hd_;
  std::string what = misfit(k + t * width, int(width), kv_.key_type, true);
  if (!v) forget();
  if (what.empty()) what = misfit(v + t * width, int(width), kv_.value_type, false);
  throw RangeError("layer " + std::to_string(p_.layer) + ": " + what);
}

/// Zeroes the latents of this pass. Latents that a query does not see are multiplied by 0, and that has to give 0.
void Pass::forget() const {
  const QuantizedHead scratch(mine(), kv_.head_stride);
  const std::vector<float> nothing(size_t(hd_), 0.0f);
  for (int t = 0; t < T_; ++t) store_head(kn_, kv_, true, 0, pos_ + t, nothing.data(), hd_, scratch);
}

/// Attends with some queries of a kv head to the block that starts at position `base`, at its place in a ring.
void Pass::attend_block(int n, AttendQuery* queries, int kv_head, int base) const {
  const int before = base / kv_.capacity * kv_.capacity;  // positions in earlier rounds of the ring
  for (int i = 0; before > 0 && i < n; ++i) {
    queries[i].begin -= before;
    queries[i].end -= before;
    if (queries[i].turns) queries[i].turns += size_t(before) * 2 * queries[i].half;
  }
  kv_.values ? kn_.attend(n, queries, kv_, p_.shape.scale, kv_head, base - before)
             : kn_.attend_latent(n, queries, kv_, p_.shape.scale, base - before);
}

/// Prepares a head's query: pads it, and where keys are in codes quantises it and computes what such keys leave out.
void Pass::fill(float* scratch, const float* q, int kv_head) const {
  const QuantizedHead head(scratch, kv_.head_stride);
  head.pad(q, hd_, kv_.head_stride);
  if (kv_is_coded(kv_.key_type)) head.quantize(kn_, kv_.head_stride);
  if (constants_) lacking_of(*constants_, kv_head, q, p_.shape.rope_dim, scratch + at_.query - at_.stride);
}

/// Returns a query that was prepared, without the positions that it sees.
AttendQuery Pass::query(float* scratch, int kv_head, float* scores, float* part) const {
  const QuantizedHead head(scratch, kv_.head_stride);
  AttendQuery out{};
  out.q = head.padded;
  out.codes = head.codes;
  out.scales = head.scales;
  out.sums = head.sums;
  if (constants_) {
    out.lacking = scratch + at_.query - at_.stride;
    out.pairs = constants_->pairs.data() + constants_->begins[kv_head];
    out.num_pairs = constants_->count(kv_head);
    out.turns = p_.turns;
    out.half = p_.shape.rope_dim / 2;
  }
  out.scores = scores;
  out.part = part;
  return out;
}

/// Writes a head's result. A sink is a position whose value is zero, merged last.
void Pass::give(float* part, int head, float* out) const {
  const float* bias = out_bias_ ? out_bias_ + head / per_kv_ * hd_ : nullptr;
  for (int c = 0; bias && c < vd_; ++c) part[c] += bias[c];
  if (p_.sinks) {
    float* sink = mine() + at_.thread - at_.part;
    std::fill_n(sink, at_.stride, 0.0f);
    sink[kv_.value_stride] = p_.sinks[head];
    sink[kv_.value_stride + 1] = 1.0f;
    kn_.merge_parts(part, sink, kv_.value_stride);
  }
  std::copy_n(part, vd_, out);
}

/// Attends with up to kQueries queries of a kv head to one block. Piece i counts quads of queries first, then blocks,
/// then kv heads.
void Pass::attend_piece(int i, int first_block, int num_blocks) const {
  const int quads = blocks(per_kv_, kQueries), first = first_seen(pos_);
  const int quad = i % quads, kv_head = i / quads / num_blocks, block = i / quads % num_blocks;
  const int base = (first_block + block) * kKeyBlock, h = kv_head * per_kv_ + quad * kQueries;
  float* const scores = mine();
  AttendQuery together[kQueries];
  const int n = std::min(kQueries, (kv_head + 1) * per_kv_ - h);
  for (int j = 0; j < n; ++j) {
    together[j] = query(queries() + (h + j) * at_.query, kv_head, scores + j * kKeyBlock,
                        parts() + (block * heads_ + h + j) * at_.part);
    together[j].begin = std::max(first, base);
    together[j].end = std::min(pos_ + 1, base + kKeyBlock);
    together[j].is_cold = quad == 0;
  }
  attend_block(n, together, kv_head, base);
}

/// Merges the parts of all blocks into a head's result.
void Pass::merge(int head, int num_blocks, float* out) const {
  float* whole = parts() + head * at_.part;
  for (int b = 1; b < num_blocks; ++b) {
    kn_.merge_parts(whole, parts() + (b * heads_ + head) * at_.part, kv_.value_stride);
  }
  give(whole, head, out + head * vd_);
}

void Pass::attend_one(float* q, float* k, float* v, float* out) {
  const int first_block = first_seen(pos_) / kKeyBlock, num_blocks = pos_ / kKeyBlock + 1 - first_block;
  const int quads = blocks(per_kv_, kQueries), count = kv_heads_ * num_blocks * quads, threads = ws_.pool.size();
  // Where heads can be prepared one by one, threads share them and, with a single block, go on to attend with them.
  const bool by_head = kv_.values && kv_heads_ >= threads && (p_.norm_per_head || (!p_.q_norm && !p_.k_norm));
  const bool goes_on = by_head && num_blocks == 1;
  if (!by_head) store(q, k, v);
  std::atomic<bool> fits{true};
  ws_.pool.run(kv_heads_, by_head ? 1 : kv_heads_, [&](int begin, int end) {
    for (int kv_head = begin; kv_head < end; ++kv_head) {
      if (by_head && !store_alone(q, k, v, kv_head)) fits.store(false, std::memory_order_relaxed);
      const int head = kv_head * per_kv_, last = head + per_kv_;
      for (int h = head; h < last; ++h) fill(queries() + h * at_.query, q + size_t(h) * hd_, kv_head);
      for (int i = kv_head * quads; goes_on && i < (kv_head + 1) * quads; ++i) attend_piece(i, first_block, 1);
      for (int h = head; goes_on && h < last; ++h) merge(h, 1, out);
    }
  });
  if (!fits) refuse(0, k, v);
  if (goes_on) return;
  ws_.pool.run(count, grain_for(count, threads), [&](int begin, int end) {
    for (int i = begin; i < end; ++i) attend_piece(i, first_block, num_blocks);
  });
  ws_.pool.run(heads_, num_blocks > 1 ? grain_for(heads_, threads) : heads_, [&](int begin, int end) {
    for (int h = begin; h < end; ++h) merge(h, num_blocks, out);
  });
}

void Pass::attend_many(const float* q, float* out) {
  const int num_groups = blocks(T_ * per_kv_, kGroupQueries);
  ws_.pool.run(kv_heads_ * num_groups, 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {  // the longest groups first
      attend_group(i % kv_heads_, (num_groups - 1 - i / kv_heads_) * kGroupQueries, q, out);
    }
  });
}

/// Attends with the queries from `start` on of a kv head, which pass over the blocks together.
void Pass::attend_group(int kv_head, int start, const float* q, float* out) {
  float* scores = mine();
  float* queries = scores + kQueries * kKeyBlock;
  float* parts = queries + kGroupQueries * at_.query;
  float* next_parts = parts + kGroupQueries * at_.part;
  const int count = std::min(kGroupQueries, T_ * per_kv_ - start);
  const auto position = [&](int j) { return pos_ + (start + j) / per_kv_; };
  const auto place = [&](int j) {
    const size_t head = kv_head * per_kv_ + (start + j) % per_kv_;
    return size_t((start + j) / per_kv_) * heads_ + head;
  };
  for (int j = 0; j < count; ++j) fill(queries + j * at_.query, q + place(j) * hd_, kv_head);
  for (int base = first_seen(position(0)) / kKeyBlock * kKeyBlock; base <= position(count - 1); base += kKeyBlock) {
    for (int quad = 0; quad < count; quad += kQueries) {
      AttendQuery together[kQueries];
      int ids[kQueries], n = 0;
      bool is_later[kQueries];
      for (int j = quad; j < std::min(quad + kQueries, count); ++j) {
        const int first = first_seen(position(j));
        const int from = std::max(first, base), to = std::min(position(j) + 1, base + kKeyBlock);
        if (from >= to) continue;
        ids[n] = j;
        is_later[n] = from > first;
        float* part = is_later[n] ? next_parts + n * at_.part : parts + j * at_.part;
        together[n] = query(queries + j * at_.query, kv_head, scores + n * kKeyBlock, part);
        together[n].begin = from;
        together[n].end = to;
        together[n].is_cold = quad == 0;
        ++n;
      }
      if (n == 0) continue;
      attend_block(n, together, kv_head, base);
      for (int j = 0; j < n; ++j) {
        if (is_later[j]) kn_.merge_parts(parts + ids[j] * at_.part, next_parts + j * at_.part, kv_.value_stride);
      }
    }
  }
  for (int j = 0; j < count; ++j) {
    give(parts + j * at_.part, kv_head * per_kv_ + (start + j) % per_kv_, out + place(j) * vd_);
  }
}

}  // namespace

size_t attention_floats(int num_threads, const WorkspaceShape& shape) {
  return Layout(shape).total(num_threads, shape.num_heads);
}

void attention(Workspace& ws, float* q, float* k, float* v, int T, int pos, const AttentionParts& parts,
               const KvLayer& kv, float* out) {
  Pass pass(ws, T, pos, parts, kv);
  if (T == 1) return pass.attend_one(q, k, v, out);
  pass.store(q, k, v);
  pass.attend_many(q, out);
}

}  // namespace edgemoe
