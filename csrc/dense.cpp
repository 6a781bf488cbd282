#include "dense.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "error.h"
#include "kv.h"
#include "mixers/attention.h"

namespace edgemoe {
namespace {

size_t quantized_bytes(int rows, int cols) {
  const size_t tiles = size_t(blocks(cols, kTileCols));
  return size_t(rows) * tiles * (kTileCols + (kScales + kSums) * sizeof(float));
}

/// The k highest of n values, best first; ties go to the lower one.
void highest(const float* values, int n, int k, int32_t* chosen) {
  for (int e = 0, count = 0; e < n; ++e) {
    if (count == k && !(values[e] > values[chosen[k - 1]])) continue;
    int at = count < k ? count++ : k - 1;
    for (; at > 0 && values[e] > values[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = e;
  }
}

/// Restricts the choice to the best groups: sets `values`, by which experts are chosen, to -infinity outside them.
void keep_groups(const RouteRule& rule, float* values) {
  const int size = rule.num_experts / rule.groups;
  std::vector<float> best(size_t(rule.groups));
  for (int g = 0; g < rule.groups; ++g) {
    int32_t two[2];
    const float* group = values + g * size;
    const bool sum = rule.group_by_two && size > 1;
    highest(group, size, sum ? 2 : 1, two);
    best[size_t(g)] = sum ? group[two[0]] + group[two[1]] : group[two[0]];
  }
  std::vector<int32_t> kept(size_t(rule.used_groups));
  highest(best.data(), rule.groups, rule.used_groups, kept.data());
  for (int g = 0; g < rule.groups; ++g) {
    if (std::find(kept.begin(), kept.end(), g) != kept.end()) continue;
    std::fill_n(values + g * size, size, -std::numeric_limits<float>::infinity());
  }
}

/// The gates of SparseMixer: each chosen expert's share in a softmax over those experts that are at most 2% below it
/// and were not chosen before it.
void mix_sparsely(const Kernels& k, const float* row, int E, int top_k, const int32_t* chosen, float* gates) {
  constexpr float kNear = 0.02f;
  thread_local std::vector<float> near;
  for (int i = 0; i < top_k; ++i) {
    const float best = row[chosen[i]];
    near.assign(1, best);
    for (int e = 0; e < E; ++e) {
      const bool is_far = (best - row[e]) / std::max(std::fabs(row[e]), best) > kNear;
      if (!is_far && std::find(chosen, chosen + i + 1, e) == chosen + i + 1) near.push_back(row[e]);
    }
    k.softmax(near.data(), int(near.size()));
    gates[i] = near[0];
  }
}

/// Chooses the best experts by one token's logits, which are replaced by the scores of all experts. Ties go to the
/// expert with the lower number. Where a logit is not finite, all scores and gates are NaN: its expert might not be
/// chosen, and nothing would show it.
void choose_of(const RouteRule& rule, const Router& router, float* row, int32_t* chosen, float* gates) {
  const Kernels& k = kernels();
  const float* choice_bias = router.choice_bias;
  const int top_k = rule.top_k, E = rule.num_experts;
  if (router.bias) k.add_scaled(router.bias, 1.0f, E, row);
  if (!std::all_of(row, row + E, [](float logit) { return std::isfinite(logit); })) {
    std::fill_n(row, E, std::numeric_limits<float>::quiet_NaN());
  }
  const auto score = [&] {
    if (rule.scoring == Scoring::kSigmoid) return k.sigmoid(row, E);
    k.softmax(row, E);
  };
  if (!choice_bias && rule.groups == 1) {  // logits have the same order as the scores
    highest(row, E, top_k, chosen);
    if (rule.scoring == Scoring::kSoftmaxTopK) {
      for (int i = 0; i < top_k; ++i) gates[i] = row[chosen[i]];
      k.softmax(gates, top_k);
      score();
    } else if (rule.scoring == Scoring::kSparseMixer) {
      mix_sparsely(k, row, E, top_k, chosen, gates);
      score();
    } else {
      score();
      for (int i = 0; i < top_k; ++i) gates[i] = row[chosen[i]];
    }
  } else {
    score();
    thread_local std::vector<float> values;
    values.assign(row, row + E);
    for (int e = 0; choice_bias && e < E; ++e) values[size_t(e)] += choice_bias[e];
    if (rule.groups > 1) keep_groups(rule, values.data());
    highest(values.data(), E, top_k, chosen);
    for (int i = 0; i < top_k; ++i) gates[i] = row[chosen[i]];
  }
  if (rule.renormalise && rule.scoring != Scoring::kSoftmaxTopK && rule.scoring != Scoring::kSparseMixer) {
    float sum = 0;
    for (int i = 0; i < top_k; ++i) sum += gates[i];
    for (int i = 0; sum > 0 && i < top_k; ++i) gates[i] /= sum;
  }
  for (int i = 0; rule.gate_scale != 1.0f && i < top_k; ++i) gates[i] *= rule.gate_scale;
}

/// Throws std::invalid_argument unless all sizes are small enough that their products do not overflow.
const WorkspaceShape& checked(int num_threads, const WorkspaceShape& s) {
  expect_within("threads", num_threads, 1, 1024);
  expect_within("Workspace max_rows", s.max_rows, 0, kMaxSize);
  expect_within("Workspace max_cols", s.max_cols, 0, kMaxSize);
  expect_within("Workspace max_hidden", s.max_hidden, 0, kMaxSize);
  expect_within("Workspace max_context", s.max_context, 0, kMaxContext);
  expect_within("Workspace head_dim", s.head_dim, 0, kMaxHeadDim);
  expect_within("Workspace num_heads", s.num_heads, 0, kMaxHeads);
  expect_within("Workspace blocks of attention", int64_t(s.num_heads) * blocks(s.max_context, kKeyBlock), 0, INT32_MAX);
  return s;
}

}  // namespace

Workspace::Workspace(int num_threads, const WorkspaceShape& shape)
    : shape_(checked(num_threads, shape)),
      activations_(quantized_bytes(std::max(shape.max_rows, kFfnRows), shape.max_cols)),
      hidden_(quantized_bytes(kFfnRows, shape.max_hidden)),
      gate_(size_t(kFfnRows) * shape.max_hidden * sizeof(float)),
      up_(size_t(kFfnRows) * shape.max_hidden * sizeof(float)),
      attention_(attention_floats(num_threads, shape) * sizeof(float)),
      pool(num_threads) {
  for (Memory* m : {&activations_, &hidden_, &gate_, &up_, &attention_}) m->touch();
}

size_t Workspace::bytes(int num_threads, const WorkspaceShape& shape) {
  checked(num_threads, shape);
  return quantized_bytes(std::max(shape.max_rows, kFfnRows), shape.max_cols) +
         kFfnRows * (quantized_bytes(1, shape.max_hidden) + 2 * size_t(shape.max_hidden) * sizeof(float)) +
         attention_floats(num_threads, shape) * sizeof(float);
}

void Workspace::begin_noting() {
  notes.begin();
  pool.refuse(true);
}

int Workspace::end_noting() {
  pool.refuse(false);
  return notes.end();
}

QuantizedRows Workspace::view(const Memory& memory, int n, int tiles, int8_t** codes, float** scales,
                              float** sums) const {
  *codes = reinterpret_cast<int8_t*>(memory.bytes());
  *scales = reinterpret_cast<float*>(memory.bytes() + size_t(n) * tiles * kTileCols);
  *sums = *scales + size_t(n) * tiles * kScales;
  return {*codes, *scales, *sums, tiles};
}

QuantizedRows Workspace::quantize(const float* x, const int32_t* rows, int n, int cols, int stride) {
  if (cols > shape_.max_cols || quantized_bytes(n, cols) > activations_.size()) {
    throw std::invalid_argument("Workspace: expected at most [" + std::to_string(shape_.max_rows) + ", " +
                                std::to_string(shape_.max_cols) + "] activations, got [" + std::to_string(n) + ", " +
                                std::to_string(cols) + "]");
  }
  int8_t* codes;
  float *scales, *sums;
  const int tiles = blocks(cols, kTileCols);
  const QuantizedRows q = view(activations_, n, tiles, &codes, &scales, &sums);
  const Kernels& k = kernels();
  pool.run(n, 8, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const size_t at = size_t(i) * tiles;
      k.quantize_row(x + size_t(rows ? rows[i] : i) * size_t(stride ? stride : cols), cols, codes + at * kTileCols,
                     scales + at * kScales, sums + at * kSums);
    }
  });
  return q;
}

RankRow* Workspace::ranks(size_t which, int n) {
  if (ranks_.size() <= which) ranks_.resize(which + 1);
  auto& of = ranks_[which];
  if (of.size() < size_t(n)) of.resize(size_t(n));
  return of.data();
}

std::vector<const RankRow*> Workspace::project(const std::vector<const NestedMatrix*>& matrices, const float* x,
                                               const int32_t* rows, int n, int stride) {
  std::vector<const RankRow*> out(matrices.size());
  std::vector<RankRow*> to(matrices.size());
  int count = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    if (!rank_of(*matrices[i])) continue;
    out[i] = to[i] = ranks(i, n);
    ++count;
  }
  if (!count) return out;
  // For few rows this takes less time than a loop over threads.
  pool.run(n, 8, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      Projection z;
      for (size_t j = 0; j < matrices.size(); ++j) {
        const NestedMatrix& w = *matrices[j];
        if (!rank_of(w)) continue;
        const float* row = x + size_t(rows ? rows[i] : i) * size_t(stride ? stride : w.cols);
        quantize_ranks(w, z.of(w, row), to[j] + i);
      }
    }
  });
  return out;
}

const float* Projection::of(const NestedMatrix& w, const float* x) {
  const int rank = rank_of(w);
  if (w.basis == basis_ && rank <= rank_) return z_;
  kernels().project(w.basis, rank, x, w.cols, z_);
  basis_ = w.basis;
  rank_ = rank;
  return z_;
}

void quantize_ranks(const NestedMatrix& w, const float* z, RankRow* out) {
  kernels().quantize_ranks(reinterpret_cast<const uint16_t*>(correction_of(w)), z, out);
}

QuantizedRows Workspace::hidden_rows(int n, int hidden) const {
  int8_t* codes;
  float *scales, *sums;
  return view(hidden_, n, blocks(hidden, kTileCols), &codes, &scales, &sums);
}

void Workspace::quantize_hidden(int begin, int end, int n, int hidden) {
  int8_t* codes;
  float *scales, *sums;
  const int tiles = blocks(hidden, kTileCols);
  view(hidden_, n, tiles, &codes, &scales, &sums);
  const Kernels& k = kernels();
  for (int i = begin; i < end; ++i) {
    const size_t at = size_t(i) * tiles, h = size_t(i) * hidden;
    k.quantize_row(gate() + h, hidden, codes + at * kTileCols, scales + at * kScales, sums + at * kSums);
  }
}

void linear(Workspace& ws, const float* x, int T, const std::vector<const NestedMatrix*>& matrices,
            const std::vector<float*>& outs) {
  const QuantizedRows q = ws.quantize(x, nullptr, T, matrices[0]->cols);
  const Kernels& k = kernels();
  int total = 0;
  for (const NestedMatrix* m : matrices) total += blocks(m->rows, kTileRows);
  const std::vector<const RankRow*> z = ws.project(matrices, x, nullptr, T);
  const int grain = grain_for(total, ws.pool.size());
  ws.order.begin(matrices[0]->rungs[0], T,
                 [&](int thread) { return ahead_of(matrices, ws.pool.first(total, grain, thread)); });
  ws.pool.run(total, grain, [&](int begin, int end) {
    int first = 0;
    for (size_t i = 0; i < matrices.size(); ++i) {
      const NestedMatrix& m = *matrices[i];
      const int count = blocks(m.rows, kTileRows);
      const int a = std::max(begin - first, 0), b = std::min(end - first, count);
      if (a < b) matmul(k, m, q, z[i], T, a, b, outs[i], size_t(m.rows));
      first += count;
    }
  });
}

void project(Workspace& ws, const float* x, int T, const int8_t* basis, int rank, int cols, float* out) {
  const Kernels& k = kernels();
  ws.pool.run(T, 8, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) k.project(basis, rank, x + size_t(t) * cols, cols, out + size_t(t) * kMaxRank);
  });
}

void linear_f32(Workspace& ws, const float* x, int T, const float* matrix, int rows, int cols, float* out) {
  const Kernels& k = kernels();
  const int grain = std::max(4, grain_for(rows, ws.pool.size()));
  ws.order.begin(matrix, T,
                 [&](int thread) { return ahead_of(matrix, rows, cols, ws.pool.first(rows, grain, thread)); });
  ws.pool.run(rows, grain, [&](int begin, int end) { k.matmul_f32(matrix, x, T, rows, cols, begin, end, out); });
}

void linear_heads(Workspace& ws, const HeadRows& x, const NestedMatrix& w, int T, int heads, float* out,
                  int out_stride) {
  const Kernels& k = kernels();
  std::vector<int32_t> rows(size_t(T) * heads);  // ordered by head, so that the rows of a head lie together
  for (int h = 0; h < heads; ++h) {
    for (int t = 0; t < T; ++t) rows[size_t(h) * T + t] = t * heads + h;
  }
  const QuantizedRows q = ws.quantize(x.x, rows.data(), T * heads, w.cols, x.stride);
  const RankRow* z = ws.project({&w}, x.x, rows.data(), T * heads, x.stride)[0];
  const int per_head = w.rows / heads, count = per_head / kTileRows, total = heads * count;
  const int grain = grain_for(total, ws.pool.size());
  ws.order.begin(w.rungs[0], T, [&](int thread) { return ahead_of({&w}, ws.pool.first(total, grain, thread)); });
  ws.pool.run(total, grain, [&](int begin, int end) {
    for (int h = begin / count; h * count < end; ++h) {
      const int a = std::max(begin, h * count), b = std::min(end, (h + 1) * count);
      matmul(k, w, rows_from(q, h * T), z ? z + h * T : nullptr, T, a, b, out + size_t(h) * (out_stride - per_head),
             size_t(heads) * out_stride);
    }
  });
}

void route(Workspace& ws, const float* x, const Router& router, int T, int cols, const RouteRule& rule, float* scores,
           int32_t* experts, float* gates) {
  const int E = rule.num_experts;
  linear_f32(ws, x, T, router.weight, E, cols, scores);
  choose(ws, router, T, rule, scores, experts, gates);
}

void choose(Workspace& ws, const Router& router, int T, const RouteRule& rule, float* scores, int32_t* experts,
            float* gates) {
  ws.pool.run(T, 16, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const size_t at = size_t(t) * rule.top_k;
      choose_of(rule, router, scores + size_t(t) * rule.num_experts, experts + at, gates + at);
    }
  });
}

void slot_scores(Workspace& ws, const float* x, const SlotLayers& layers, const int32_t* experts, const float* gates,
                 int T, int top_k, float* scores) {
  const Kernels& k = kernels();
  const int n = layers.outputs, cols = layers.cols;
  ws.pool.run(T * top_k, 16, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const size_t row = size_t(experts[i]) * n;
      float* out = scores + size_t(i) * n;
      k.matmul_f32(layers.weight + row * cols, x + size_t(i / top_k) * cols, 1, n, cols, 0, n, out);
      for (int b = 0; b < n; ++b) out[b] += std::fma(gates[i], layers.gate_weight[row + b], layers.bias[row + b]);
    }
  });
}

void look_ahead(Workspace& ws, const float* x, const std::vector<NextRouter>& routers, int T, int cols, float eps,
                const RouteRule& rule, float* normed, float* scores, int32_t* experts, float* gates) {
  const Kernels& k = kernels();
  const int E = rule.num_experts, p = int(routers.size());
  for (int i = 0; i < p * T; ++i) {
    k.rms_norm(x + size_t(i % T) * cols, routers[i / T].norm, eps, cols, normed + size_t(i) * cols);
  }
  ws.pool.run(p * E, std::max(4, grain_for(p * E, ws.pool.size())), [&](int begin, int end) {
    for (int i = begin / E; i < p && i * E < end; ++i) {
      const int a = std::max(begin - i * E, 0), b = std::min(end - i * E, E);
      const size_t first = size_t(i) * T;
      k.matmul_f32(routers[i].router.weight, normed + first * cols, T, E, cols, a, b, scores + first * E);
    }
  });
  for (int i = 0; i < p * T; ++i) {
    const size_t at = size_t(i) * rule.top_k;
    choose_of(rule, routers[size_t(i / T)].router, scores + size_t(i) * E, experts + at, gates + at);
  }
}

void rms_norm(Workspace& ws, const float* x, const float* weight, float eps, int T, int cols, float* out) {
  const Kernels& k = kernels();
  ws.pool.run(T, 16, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) k.rms_norm(x + size_t(t) * cols, weight, eps, cols, out + size_t(t) * cols);
  });
}

void add_norm(Workspace& ws, const float* added, float scale, float* x, const float* weight, float eps, int T, int cols,
              float* out) {
  const Kernels& k = kernels();
  ws.pool.run(T, 16, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const size_t at = size_t(t) * cols;
      k.add_scaled(added + at, scale, cols, x + at);
      k.rms_norm(x + at, weight, eps, cols, out + at);
    }
  });
}

void add_bias(Workspace& ws, const float* bias, int T, int cols, float* out) {
  const Kernels& k = kernels();
  ws.pool.run(T, 16, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) k.add_scaled(bias, 1.0f, cols, out + size_t(t) * cols);
  });
}

void multiply(Workspace& ws, const Factors& factors, int T, int cols, float* out) {
  ws.pool.run(T, 16, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const float* f = factors.data + size_t(t) * factors.per_row;
      for (size_t i = 0; i < size_t(cols); ++i) out[size_t(t) * cols + i] *= f[i * factors.step];
    }
  });
}

void soft_cap(Workspace& ws, float cap, int64_t n, float* x) {
  constexpr int kPart = 4096;
  const Kernels& k = kernels();
  ws.pool.run(int((n + kPart - 1) / kPart), 1, [&](int begin, int end) {
    const int64_t first = int64_t(begin) * kPart;
    k.soft_cap(x + first, cap, int(std::min(int64_t(end) * kPart, n) - first));
  });
}

void add_rows(Workspace& ws, const float* x, float scale, const float* gate_weight, const float* gate_input, int T,
              int cols, float* out) {
  const Kernels& k = kernels();
  ws.pool.run(T, 16, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const size_t at = size_t(t) * cols;
      float s = scale;
      if (gate_weight) {
        float gate;
        k.matmul_f32(gate_weight, gate_input + at, 1, 1, cols, 0, 1, &gate);
        k.sigmoid(&gate, 1);
        s *= gate;
      }
      k.add_scaled(x + at, s, cols, out + at);
    }
  });
}

}  // namespace edgemoe
