#include "dense.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace edgemoe {
namespace {

size_t quantized_bytes(int rows, int cols) {
  const size_t groups = size_t(blocks(cols, kTileCols));
  return size_t(rows) * groups * (kTileCols + 2 * sizeof(float));
}

/// Pieces for a loop over `count` items: enough for balance, few enough that starting one costs nothing.
int grain_for(int count, int threads) { return std::max(1, count / (threads * 8)); }

size_t attention_floats(const WorkspaceShape& shape) {
  return size_t(shape.max_context) + 16 + 2 * round_up(size_t(shape.head_dim), 16);
}

/// Takes the best of one token's logits, which are overwritten. Ties go to the lower expert.
void choose(const RouteRule& rule, float* row, int32_t* chosen, float* gates) {
  const Kernels& k = kernels();
  const int top_k = rule.top_k;
  for (int e = 0, count = 0; e < rule.num_experts; ++e) {
    if (count == top_k && !(row[e] > row[chosen[top_k - 1]])) continue;
    int at = count < top_k ? count++ : top_k - 1;
    for (; at > 0 && row[e] > row[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = e;
  }
  if (!rule.softmax_over_top_k) k.softmax(row, rule.num_experts);
  for (int i = 0; i < top_k; ++i) gates[i] = row[chosen[i]];
  if (rule.softmax_over_top_k) {
    k.softmax(gates, top_k);
  } else if (rule.renormalise) {
    float sum = 0;
    for (int i = 0; i < top_k; ++i) sum += gates[i];
    for (int i = 0; i < top_k; ++i) gates[i] /= sum;
  }
}

}  // namespace

Workspace::Workspace(int num_threads, const WorkspaceShape& shape)
    : shape_(shape),
      activations_(quantized_bytes(std::max(shape.max_rows, kFfnRows), shape.max_cols)),
      hidden_(quantized_bytes(kFfnRows, shape.max_hidden)),
      gate_(size_t(kFfnRows) * shape.max_hidden * sizeof(float)),
      up_(size_t(kFfnRows) * shape.max_hidden * sizeof(float)),
      attention_(size_t(num_threads) * kQueries * attention_floats(shape) * sizeof(float)),
      pool(num_threads) {}

size_t Workspace::bytes(int num_threads, const WorkspaceShape& shape) {
  return quantized_bytes(std::max(shape.max_rows, kFfnRows), shape.max_cols) +
         kFfnRows * (quantized_bytes(1, shape.max_hidden) + 2 * size_t(shape.max_hidden) * sizeof(float)) +
         size_t(num_threads) * kQueries * attention_floats(shape) * sizeof(float);
}

float* Workspace::attention_scratch(int query) const {
  const size_t at = size_t(ThreadPool::worker()) * kQueries + size_t(query);
  return reinterpret_cast<float*>(attention_.bytes()) + at * attention_floats(shape_);
}

QuantizedRows Workspace::view(const Memory& memory, int n, int groups, int8_t** codes, float** scales,
                              float** sums) const {
  *codes = reinterpret_cast<int8_t*>(memory.bytes());
  *scales = reinterpret_cast<float*>(memory.bytes() + size_t(n) * groups * kTileCols);
  *sums = *scales + size_t(n) * groups;
  return {*codes, *scales, *sums, groups};
}

QuantizedRows Workspace::quantize(const float* x, const int32_t* rows, int n, int cols) {
  if (n > std::max(shape_.max_rows, kFfnRows) || cols > shape_.max_cols) {
    throw std::invalid_argument("Workspace: expected at most [" + std::to_string(shape_.max_rows) + ", " +
                                std::to_string(shape_.max_cols) + "] activations, got [" + std::to_string(n) + ", " +
                                std::to_string(cols) + "]");
  }
  int8_t* codes;
  float *scales, *sums;
  const int groups = blocks(cols, kTileCols);
  const QuantizedRows q = view(activations_, n, groups, &codes, &scales, &sums);
  const Kernels& k = kernels();
  pool.run(n, 8, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const size_t g = size_t(i) * groups;
      k.quantize_row(x + size_t(rows ? rows[i] : i) * cols, cols, codes + g * kTileCols, scales + g, sums + g);
    }
  });
  return q;
}

QuantizedRows Workspace::quantize_hidden(float* gate, const float* up, int n, int hidden) {
  int8_t* codes;
  float *scales, *sums;
  const int groups = blocks(hidden, kTileCols);
  const QuantizedRows q = view(hidden_, n, groups, &codes, &scales, &sums);
  const Kernels& k = kernels();
  pool.run(n, n >= 16 ? 4 : 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const size_t g = size_t(i) * groups, h = size_t(i) * hidden;
      k.silu_mul(gate + h, up + h, hidden, gate + h);
      k.quantize_row(gate + h, hidden, codes + g * kTileCols, scales + g, sums + g);
    }
  });
  return q;
}

void linear(Workspace& ws, const float* x, int T, const std::vector<const NestedMatrix*>& matrices,
            const std::vector<float*>& outs) {
  const QuantizedRows q = ws.quantize(x, nullptr, T, matrices[0]->cols);
  const Kernels& k = kernels();
  int total = 0;
  for (const NestedMatrix* m : matrices) total += blocks(m->rows, kTileRows);
  ws.pool.run(total, grain_for(total, ws.pool.size()), [&](int begin, int end) {
    int first = 0;
    for (size_t i = 0; i < matrices.size(); ++i) {
      const NestedMatrix& m = *matrices[i];
      const int count = blocks(m.rows, kTileRows);
      const int a = std::max(begin - first, 0), b = std::min(end - first, count);
      if (a < b) k.matmul_nested(m, q, T, a, b, outs[i], size_t(m.rows));
      first += count;
    }
  });
}

void attention(Workspace& ws, float* q, float* k, float* v, int T, int pos, const AttentionParts& p, const KvLayer& kv,
               float* out) {
  const Kernels& kn = kernels();
  const int hd = p.shape.head_dim, half = hd / 2, heads = p.shape.num_heads, kv_heads = p.shape.num_kv_heads;
  if (pos < 0 || T < 1 || pos + T > kv.capacity || kv.capacity > ws.max_context()) {
    throw std::invalid_argument("attention: positions [" + std::to_string(pos) + ", " + std::to_string(pos + T) +
                                ") are outside the context of " + std::to_string(kv.capacity));
  }
  const auto prepare = [&](float* x, int num_heads, const float* bias, const float* norm, int t, bool rotate) {
    const int width = num_heads * hd;
    for (int i = 0; bias && i < width; ++i) x[i] += bias[i];
    if (norm && p.norm_per_head) {
      for (int h = 0; h < num_heads; ++h) kn.rms_norm(x + h * hd, norm, p.norm_eps, hd, x + h * hd);
    } else if (norm) {
      kn.rms_norm(x, norm, p.norm_eps, width, x);
    }
    for (int i = 0; p.clip > 0 && i < width; ++i) x[i] = std::min(std::max(x[i], -p.clip), p.clip);
    for (int h = 0; rotate && h < num_heads; ++h) {
      kn.rope(x + h * hd, p.cos + size_t(t) * half, p.sin + size_t(t) * half, hd);
    }
  };
  ws.pool.run(T, 4, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      prepare(q + size_t(t) * heads * hd, heads, p.q_bias, p.q_norm, t, true);
      float* kt = k + size_t(t) * kv_heads * hd;
      float* vt = v + size_t(t) * kv_heads * hd;
      prepare(kt, kv_heads, p.k_bias, p.k_norm, t, true);
      prepare(vt, kv_heads, p.v_bias, nullptr, t, false);
      for (int h = 0; h < kv_heads; ++h) {
        const size_t at = (size_t(h) * kv.capacity + pos + t) * kv.head_stride;
        kn.to_f16(kt + h * hd, hd, kv.keys + at);
        kn.to_f16(vt + h * hd, hd, kv.values + at);
      }
    }
  });
  // The queries of one kv head, by position and then by head, in blocks that load each key and value once.
  const int per_kv = heads / kv_heads, per_block = kQueries, num_blocks = blocks(T * per_kv, per_block);
  const int stride = kv.head_stride;
  ws.pool.run(kv_heads * num_blocks, grain_for(kv_heads * num_blocks, ws.pool.size()), [&](int begin, int end) {
    AttendQuery queries[kQueries];
    for (int i = begin; i < end; ++i) {
      const int kv_head = i / num_blocks, start = i % num_blocks * per_block;
      const int n = std::min(per_block, T * per_kv - start);
      float* outs[kQueries];
      int firsts[kQueries] = {};
      for (int j = 0; j < n; ++j) {
        const int t = (start + j) / per_kv, head = kv_head * per_kv + (start + j) % per_kv;
        const size_t at = (size_t(t) * heads + head) * hd;
        float* scratch = ws.attention_scratch(j);
        std::memcpy(scratch, q + at, size_t(hd) * sizeof(float));
        std::fill(scratch + hd, scratch + stride, 0.0f);
        firsts[j] = p.shape.window > 0 ? std::max(0, pos + t + 1 - p.shape.window) : 0;
        queries[j] = {scratch, scratch + 2 * stride, scratch + stride, pos + t + 1 - firsts[j]};
        outs[j] = out + at;
      }
      if (firsts[0] == firsts[n - 1]) {
        kn.attend(n, queries, kv, p.shape.scale, kv_head, firsts[0]);
      } else {  // a sliding window starts elsewhere for each
        for (int j = 0; j < n; ++j) kn.attend(1, queries + j, kv, p.shape.scale, kv_head, firsts[j]);
      }
      for (int j = 0; j < n; ++j) std::memcpy(outs[j], queries[j].out, size_t(hd) * sizeof(float));
    }
  });
}

void route(Workspace& ws, const float* x, const float* router, int T, int cols, const RouteRule& rule, float* scores,
           int32_t* experts, float* gates) {
  const Kernels& k = kernels();
  const int E = rule.num_experts;
  ws.pool.run(E, std::max(4, grain_for(E, ws.pool.size())),
              [&](int begin, int end) { k.matmul_f32(router, x, T, E, cols, begin, end, scores); });
  ws.pool.run(T, 16, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const size_t at = size_t(t) * rule.top_k;
      choose(rule, scores + size_t(t) * E, experts + at, gates + at);
    }
  });
}

void look_ahead(Workspace& ws, const float* x, const std::vector<NextRouter>& routers, int cols, float eps,
                const RouteRule& rule, float* normed, float* scores, int32_t* experts, float* gates) {
  const Kernels& k = kernels();
  const int E = rule.num_experts, p = int(routers.size());
  for (int i = 0; i < p; ++i) k.rms_norm(x, routers[i].norm, eps, cols, normed + size_t(i) * cols);
  ws.pool.run(p * E, std::max(4, grain_for(p * E, ws.pool.size())), [&](int begin, int end) {
    for (int i = begin / E; i < p && i * E < end; ++i) {
      const int a = std::max(begin - i * E, 0), b = std::min(end - i * E, E);
      k.matmul_f32(routers[i].weight, normed + size_t(i) * cols, 1, E, cols, a, b, scores + size_t(i) * E);
    }
  });
  for (int i = 0; i < p; ++i) {
    const size_t at = size_t(i) * rule.top_k;
    choose(rule, scores + size_t(i) * E, experts + at, gates + at);
  }
}

void rms_norm(Workspace& ws, const float* x, const float* weight, float eps, int T, int cols, float* out) {
  const Kernels& k = kernels();
  ws.pool.run(T, 16, [&](int begin, int end) {
    for (int t = begin; t < end; ++t) k.rms_norm(x + size_t(t) * cols, weight, eps, cols, out + size_t(t) * cols);
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
        float logit;
        k.matmul_f32(gate_weight, gate_input + at, 1, 1, cols, 0, 1, &logit);
        s *= float(1.0 / (1.0 + std::exp(-double(logit))));
      }
      k.add_scaled(x + at, s, cols, out + at);
    }
  });
}

void rope_table(const float* inv_freq, int half, int pos, int T, float scale, float* cos, float* sin) {
  for (int t = 0; t < T; ++t) {
    for (int i = 0; i < half; ++i) {
      // The angle in float32, as transformers has it; its cosine in double, the same everywhere.
      const float angle = float(pos + t) * inv_freq[i];
      cos[size_t(t) * half + i] = float(std::cos(double(angle))) * scale;
      sin[size_t(t) * half + i] = float(std::sin(double(angle))) * scale;
    }
  }
}

}  // namespace edgemoe
