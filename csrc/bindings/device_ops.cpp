// A device's verbs. Arrays whose names begin with host_ are numpy's.
#include <cstring>
#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/device_arrays.h"
#include "cache.h"
#include "device/stream.h"
#include "device/workspace.h"

namespace edgemoe {
namespace {

/// One layer's attention with the arrays that it keeps alive.
struct DeviceAttention {
  AttentionParts parts{};
  std::vector<DeviceArray> arrays;

  const float* keep(const DeviceArray* a, const char* name, py::ssize_t size) {
    if (!a) return nullptr;
    arrays.push_back(*a);
    return expect_device(*a, name, {size});
  }
};

std::unique_ptr<DeviceAttention> attention_of(int index, int num_heads, int num_kv_heads, int head_dim, int window,
                                              float scale, const DeviceArray* q_bias, const DeviceArray* k_bias,
                                              const DeviceArray* v_bias, const DeviceArray* q_norm,
                                              const DeviceArray* k_norm, const DeviceArray* v_norm,
                                              const DeviceArray* sinks, bool norm_per_head, float norm_eps, float clip,
                                              int rope_dim, bool norm_after_rope, int chunk, float growth,
                                              int grow_every) {
  expect_within("DeviceAttention num_heads", num_heads, 1, kMaxHeads);
  expect_within("DeviceAttention head_dim", head_dim, 1, kMostHeadDim);
  expect_within("DeviceAttention rope_dim", rope_dim, 0, head_dim);
  expect_within("DeviceAttention grow_every", grow_every, growth > 0 ? 1 : 0, kMaxContext);
  if (num_kv_heads < 1 || num_heads % num_kv_heads || rope_dim % 2) {
    throw std::invalid_argument("DeviceAttention: expected heads that are a multiple of the kv heads, and even RoPE");
  }
  auto a = std::make_unique<DeviceAttention>();
  AttentionParts& p = a->parts;
  const py::ssize_t q = num_heads * head_dim, kv = num_kv_heads * head_dim;
  p.layer = index;
  p.shape = {num_heads, num_kv_heads, head_dim, window, scale, rope_dim, chunk};
  p.q_bias = a->keep(q_bias, "q_bias", q);
  p.k_bias = a->keep(k_bias, "k_bias", kv);
  p.v_bias = a->keep(v_bias, "v_bias", kv);
  p.q_norm = a->keep(q_norm, "q_norm", norm_per_head ? head_dim : q);
  p.k_norm = a->keep(k_norm, "k_norm", norm_per_head ? head_dim : kv);
  p.v_norm = a->keep(v_norm, "v_norm", head_dim);
  p.sinks = a->keep(sinks, "sinks", num_heads);
  p.growth = growth;
  p.grow_every = grow_every;
  p.norm_per_head = norm_per_head;
  p.norm_after_rope = norm_after_rope;
  p.norm_eps = norm_eps;
  p.clip = clip;
  return a;
}

void attention_on(DeviceWorkspace& ws, const DeviceAttention& layer, const DeviceArray& q, const DeviceArray& k,
                  const DeviceArray& v, int pos, const DeviceArray& cos, const DeviceArray& sin, DeviceKv& kv,
                  const DeviceArray& out) {
  AttentionParts parts = layer.parts;
  const AttentionShape& s = parts.shape;
  const py::ssize_t T = q.at(0), half = s.rope_dim / 2, q_cols = s.num_heads * s.head_dim;
  const py::ssize_t kv_cols = s.num_kv_heads * s.head_dim;
  float* const qp = expect_device(q, "q", {T, q_cols});
  float* const kp = expect_device(k, "k", {T, kv_cols});
  float* const vp = expect_device(v, "v", {T, kv_cols});
  float* const o = expect_device(out, "out", {T, q_cols});
  parts.cos = expect_device(cos, "cos", {T, half});
  parts.sin = expect_device(sin, "sin", {T, half});
  if (kv.num_heads != s.num_kv_heads || kv.head_dim != s.head_dim) {
    throw std::invalid_argument("attention: the KV cache is of another shape");
  }
  py::gil_scoped_release release;
  ws.attention(qp, kp, vp, int(T), pos, parts, kv.layer, o);
}

void linear_on(DeviceWorkspace& ws, const DeviceArray& x, const std::vector<const DeviceMatrix*>& matrices,
               const std::vector<const DeviceArray*>& outs) {
  expect_device(x, "linear x", {-1, -1});
  if (matrices.empty() || matrices.size() != outs.size()) throw std::invalid_argument("linear: one out per matrix");
  std::vector<const NestedMatrix*> ms;
  std::vector<float*> ys;
  for (size_t i = 0; i < matrices.size(); ++i) {
    if (!matrices[i] || !outs[i]) throw py::type_error("linear: expected matrices and outs, got None");
    ms.push_back(&matrices[i]->matrix);
    expect_device(x, "linear x", {-1, ms[i]->cols});
    ys.push_back(expect_device(*outs[i], "linear out", {x.at(0), ms[i]->rows}));
  }
  py::gil_scoped_release release;
  ws.linear(x.data, int(x.at(0)), ms, ys);
}

void ffn_on(DeviceWorkspace& ws, const DeviceArray& x, const DeviceMatrix* gate, const DeviceMatrix& up,
            const DeviceMatrix& down, const DeviceArray& out, const std::string& activation) {
  const NestedMatrix g = gate ? gate->matrix : NestedMatrix{}, &u = up.matrix, &d = down.matrix;
  const Activation kind = activation_of(activation);
  expect_device(x, "ffn x", {-1, u.cols});
  expect_device(out, "ffn out", {x.at(0), d.rows});
  if (gate ? u.rows != g.rows || u.cols != g.cols : kind != Activation::kRelu2) {
    throw std::invalid_argument("ffn: the matrices do not fit each other or the activation");
  }
  if (d.cols != u.rows) throw std::invalid_argument("ffn: the matrices do not fit each other");
  py::gil_scoped_release release;
  ws.ffns(x.data, int(x.at(0)), kind, {{{g, u, d}, nullptr, int(x.at(0)), out.data}});
}

void linear_heads_on(DeviceWorkspace& ws, const DeviceArray& x, const DeviceMatrix& w, int heads,
                     const DeviceArray& out) {
  const NestedMatrix& m = w.matrix;
  expect_device(x, "linear_heads x", {-1, -1});
  expect_device(out, "linear_heads out", {x.at(0), -1});
  const py::ssize_t in = heads > 0 ? x.at(1) / heads : 0, to = heads > 0 ? out.at(1) / heads : 0;
  if (heads < 1 || m.rows % (heads * kTileRows) || in * heads != x.at(1) || to * heads != out.at(1) || in < m.cols ||
      to < m.rows / heads) {
    throw std::invalid_argument("linear_heads: expected whole heads, and of the matrix 16 rows or a multiple for each");
  }
  py::gil_scoped_release release;
  ws.linear_heads({x.data, int(in)}, m, int(x.at(0)), heads, out.data, int(to));
}

void add_norm_on(DeviceWorkspace& ws, const DeviceArray* added, float scale, const DeviceArray& x,
                 const DeviceArray& weight, float eps, const DeviceArray& out) {
  const py::ssize_t T = x.at(0), cols = x.at(1);
  float* const to = expect_device(x, "norm x", {-1, -1});
  const float* const a = maybe_device(added, "added", {T, cols});
  const float* const w = expect_device(weight, "norm weight", {cols});
  float* const o = expect_device(out, "norm out", {T, cols});
  py::gil_scoped_release release;
  ws.device().norm_rows(to, a, scale, w, eps, int(T), int(cols), o);
}

void add_rows_on(DeviceWorkspace& ws, const DeviceArray& x, float scale, const DeviceArray* gate_weight,
                 const DeviceArray* gate_input, const DeviceArray& out) {
  const py::ssize_t T = x.at(0), cols = x.at(1);
  const float* const a = expect_device(x, "add_rows x", {-1, -1});
  float* const o = expect_device(out, "add_rows out", {T, cols});
  const float* const w = maybe_device(gate_weight, "gate_weight", {cols});
  const float* const in = maybe_device(gate_input, "gate_input", {T, cols});
  if ((w == nullptr) != (in == nullptr)) throw std::invalid_argument("add_rows: expected gate_weight with gate_input");
  py::gil_scoped_release release;
  ws.device().add_rows(a, scale, w, in, int(T), int(cols), o);
}

/// y [T, rows] = x [T, cols] times w [rows, cols], float32.
void matmul_on(DeviceWorkspace& ws, const DeviceArray& x, const DeviceArray& w, const DeviceArray& y) {
  const float* const a = expect_device(x, "matmul x", {-1, -1});
  const float* const b = expect_device(w, "matmul w", {-1, x.at(1)});
  float* const o = expect_device(y, "matmul y", {x.at(0), w.at(0)});
  py::gil_scoped_release release;
  ws.device().matmul_f32(b, a, int(x.at(0)), int(w.at(0)), int(x.at(1)), o);
}

/// What a layer's experts have, beside their matrices.
struct ExpertsOf {
  ExpertsOf(const Cache& cache, const std::string& activation, const std::vector<const DeviceArray*>& biases,
            const DeviceArray* basis)
      : cache(cache), kind(activation_of(activation)) {
    const py::ssize_t d = cache.shape().hidden, h = cache.shape().expert_hidden, E = cache.shape().num_experts;
    if (!biases.empty() && biases.size() != 3) {
      throw std::invalid_argument("biases: expected those of gate, up and down");
    }
    for (size_t i = 0; i < biases.size(); ++i) of_all[i] = maybe_device(biases[i], "biases", {E, i < 2 ? h : d});
    const py::ssize_t floats = py::ssize_t(basis_stride(int(d)) / sizeof(float));
    v = reinterpret_cast<const int8_t*>(maybe_device(basis, "basis", {-1, floats}));
    if (basis) ranks = int(basis->at(0));
  }

  /// The use of one that is pinned, `there` or where the host has it.
  FfnUse use(int expert, int level, const int32_t* tokens, int count, float* out, bool there = true) const {
    const size_t e = size_t(expert % cache.shape().num_experts), d = size_t(cache.shape().hidden),
                 h = size_t(cache.shape().expert_hidden);
    const auto bias = [&](size_t which, size_t width) { return of_all[which] ? of_all[which] + e * width : nullptr; };
    const ExpertView w = there ? cache.view_there(expert, level) : cache.view(expert, level);
    const FfnUse made{w, tokens, count, out, nullptr, {bias(0, h), bias(1, h), bias(2, d)}};
    if (std::max(rank_of(made.w.gate), rank_of(made.w.up)) > ranks) {
      throw std::invalid_argument("basis: expected one for corrections");
    }
    return made;
  }

  const Cache& cache;
  Activation kind;
  const float* of_all[3] = {};
  const int8_t* v = nullptr;
  int ranks = 0;
};

/// Runs the experts at positions `group` of a plan, all of which are pinned in a cache on the device, or in the host's
/// and pass through a stream.
void expert_ffn_on(DeviceWorkspace& ws, const DeviceArray& x, const Cache& cache, const Array<int32_t>& experts,
                   const Array<int8_t>& levels, const Array<int32_t>& offsets, const Array<int32_t>& tokens,
                   const std::vector<int>& group, const DeviceArray& parts, const std::string& activation,
                   const std::vector<const DeviceArray*>& biases, const DeviceArray* basis, DeviceStream* stream) {
  const py::ssize_t d = cache.shape().hidden, n = experts.size();
  const ExpertsOf all(cache, activation, biases, basis);
  expect_device(x, "expert_ffn x", {-1, d});
  expect_device(parts, "parts", {-1, d});
  expect(experts, "experts", {-1});
  expect(levels, "levels", {n});
  expect(offsets, "offsets", {n + 1});
  const int32_t *o = offsets.data(), *t = tokens.data();
  std::vector<FfnUse> uses;
  std::vector<int> of;  // the expert of each, as the file numbers them
  for (int i : group) {
    if (i < 0 || i >= n || o[i] < 0 || o[i + 1] <= o[i] || o[i + 1] > tokens.size() || o[i + 1] > parts.at(0)) {
      throw std::invalid_argument("expert_ffn: offsets do not fit tokens and parts");
    }
    for (int32_t j = o[i]; j < o[i + 1]; ++j) {
      if (t[j] < 0 || t[j] >= x.at(0)) throw std::invalid_argument("expert_ffn: a token is outside x");
    }
    of.push_back(i);
    uses.push_back(all.use(experts.data()[i], levels.data()[i], t + o[i], o[i + 1] - o[i],
                           parts.data + size_t(o[i]) * size_t(d), stream == nullptr));
  }
  py::gil_scoped_release release;
  if (!stream) return ws.ffns(x.data, int(x.at(0)), all.kind, uses, all.v);
  for (size_t i = 0; i < uses.size(); ++i) {
    uses[i].w = stream->bring(cache, experts.data()[of[i]], levels.data()[of[i]]);
    ws.ffns(x.data, int(x.at(0)), all.kind, {uses[i]}, all.v);
    stream->leave();
  }
}

void combine_on(DeviceWorkspace& ws, const DeviceArray& parts, const Array<int32_t>& rows, const Array<float>& gates,
                const DeviceArray& out) {
  expect_device(parts, "parts", {-1, -1});
  expect(rows, "rows", {-1, -1});
  expect(gates, "gates", {rows.shape(0), rows.shape(1)});
  expect_device(out, "combine out", {rows.shape(0), parts.at(1)});
  const int32_t* r = rows.data();
  for (py::ssize_t i = 0; i < rows.size(); ++i) {
    if (r[i] >= parts.at(0)) throw std::invalid_argument("combine: a row is outside parts");
  }
  const float* g = gates.data();
  const int T = int(rows.shape(0)), K = int(rows.shape(1)), cols = int(parts.at(1));
  py::gil_scoped_release release;
  ws.combine(parts.data, r, g, T, K, cols, out.data);
}

/// Runs what was chosen for one token, experts `first` + chosen [1, K], and adds it up; false, and nothing is done,
/// where the device lacks some. In one call, as the device waits meanwhile. `counts` [experts] of those that ran grow
/// by `weight`.
bool run_hits_on(DeviceWorkspace& ws, const DeviceArray& x, Cache& cache, int first, const Array<int32_t>& chosen,
                 const Array<float>& gates, const Array<int8_t>& levels, Array<double> counts, double weight,
                 const DeviceArray& parts, const DeviceArray& out, const std::string& activation,
                 const std::vector<const DeviceArray*>& biases, const DeviceArray* basis) {
  const py::ssize_t d = cache.shape().hidden, n = cache.num_experts(), K = chosen.size();
  expect_device(x, "run_hits x", {1, d});
  expect_device(out, "run_hits out", {1, d});
  expect_device(parts, "parts", {-1, d});
  expect(chosen, "chosen", {1, K});
  expect(gates, "gates", {1, K});
  expect(levels, "levels", {n});
  expect(counts, "counts", {n});
  if (K > parts.at(0)) throw std::invalid_argument("run_hits: parts are too few");
  std::vector<int32_t> experts, rows, offsets{0};
  std::vector<int8_t> at;
  for (int i = 0; i < int(K); ++i) {
    const int e = first + chosen.data()[i];
    if (e < 0 || e >= n) throw std::invalid_argument("run_hits: there is no such expert");
    if (cache.residency()[size_t(e)] < levels.data()[e]) return false;
    experts.push_back(e);
    at.push_back(levels.data()[e]);
    rows.push_back(i);
    offsets.push_back(i + 1);
  }
  const ExpertsOf all(cache, activation, biases, basis);
  cache.begin({experts.data(), at.data(), int(K)}, offsets.data(), 1, {nullptr, nullptr, 0});
  struct Closer {
    Cache& cache;
    ~Closer() { cache.close(); }
  } const closer{cache};
  std::vector<int> group;
  cache.next(&group);
  const int32_t token = 0;
  std::vector<FfnUse> uses;
  for (size_t i = 0; i < experts.size(); ++i) {
    uses.push_back(all.use(experts[i], at[i], &token, 1, parts.data + i * size_t(d)));
    counts.mutable_data()[experts[i]] += weight;
  }
  ws.ffns(x.data, 1, all.kind, uses, all.v);
  ws.combine(parts.data, rows.data(), gates.data(), 1, int(K), int(d), out.data);
  return true;
}

/// Shape and norm of one layer's latent attention.
struct DeviceLatents {
  LatentParts parts{};
  DeviceArray norm;
};

std::unique_ptr<DeviceLatents> device_latents_of(int index, int num_heads, int nope_dim, int rope_dim, int latent_dim,
                                                 float scale, bool rotates, int grow_every, float growth,
                                                 const DeviceArray& norm, float norm_eps) {
  expect_within("DeviceLatents num_heads", num_heads, 1, kMaxHeads);
  expect_within("DeviceLatents nope_dim", nope_dim, 1, kMaxHeadDim);
  expect_within("DeviceLatents rope_dim", rope_dim, 0, kMostHeadDim);
  expect_within("DeviceLatents latent_dim", latent_dim, 16, kMostHeadDim - rope_dim);
  expect_within("DeviceLatents grow_every", grow_every, growth > 0 ? 1 : 0, kMaxContext);
  if (rope_dim % 2 || latent_dim % 16) {
    throw std::invalid_argument("DeviceLatents: expected an even rope_dim, and a latent_dim of 16 or a multiple");
  }
  const LatentShape shape{num_heads, nope_dim, rope_dim, latent_dim, scale, rotates, grow_every, growth};
  auto out = std::make_unique<DeviceLatents>();
  out->parts = {index, shape, expect_device(norm, "norm", {latent_dim}), norm_eps, nullptr, nullptr};
  out->norm = norm;
  return out;
}

void latent_attention_on(DeviceWorkspace& ws, const DeviceLatents& layer, const DeviceArray& q,
                         const DeviceArray& absorbed, const DeviceArray& keys, int pos, const DeviceArray* cos,
                         const DeviceArray* sin, DeviceKv& kv, const DeviceArray& out) {
  LatentParts parts = layer.parts;
  const LatentShape& s = parts.shape;
  const py::ssize_t T = keys.at(0), half = s.rope_dim / 2, width = s.latent_dim + s.rope_dim;
  const float* const a = expect_device(q, "q", {T, s.num_heads * (s.nope_dim + s.rope_dim)});
  float* const b = expect_device(absorbed, "absorbed", {T, s.num_heads * width});
  float* const k = expect_device(keys, "keys", {T, width});
  float* const o = expect_device(out, "out", {T, s.num_heads * s.latent_dim});
  if (s.rotates && (!cos || !sin)) throw std::invalid_argument("latent_attention: expected cos and sin");
  if (s.rotates) parts.cos = expect_device(*cos, "cos", {T, half}), parts.sin = expect_device(*sin, "sin", {T, half});
  if (kv.layer.values || kv.head_dim != width || kv.layer.value_stride != s.latent_dim) {
    throw std::invalid_argument("latent_attention: the KV cache is of another shape");
  }
  py::gil_scoped_release release;
  ws.latent_attention(a, b, k, int(T), pos, parts, kv.layer, o);
}

void multiply_on(DeviceWorkspace& ws, const DeviceArray& factors, const DeviceArray& out) {
  const bool by_row = factors.shape.size() == 1 && (factors.at(0) == out.at(1) || factors.at(0) == 1);
  if (out.shape.size() != 2 || !(by_row || factors.shape == out.shape)) {
    throw std::invalid_argument("multiply: expected factors for all, for a row, or one");
  }
  ws.device().multiply(factors.data, factors.size(), out.size(), out.data);
}

void weigh_on(DeviceWorkspace& ws, const DeviceArray& x, const Array<float>& gates, const DeviceArray& out) {
  expect_device(x, "weigh x", {-1, -1});
  expect_device(out, "weigh out", {x.at(0), x.at(1)});
  expect(gates, "gates", {x.at(0), 1});
  const float* g = gates.data();
  py::gil_scoped_release release;
  ws.weigh(x.data, g, int(x.at(0)), int(x.at(1)), out.data);
}

/// Copies arrays to numpy's after all that is queued; throws what attention has found since the last time.
void download(DeviceWorkspace& ws, const std::vector<const DeviceArray*>& from, std::vector<Array<float>> to) {
  if (from.size() != to.size()) throw std::invalid_argument("download: one array for each");
  std::vector<DeviceSpace::Fetch> what;
  for (size_t i = 0; i < from.size(); ++i) {
    if (!from[i]) throw py::type_error("download: expected arrays, got None");
    if (size_t(to[i].size()) != from[i]->size()) throw std::invalid_argument("download: arrays differ in size");
    what.push_back({to[i].mutable_data(), from[i]->data, size_t(to[i].nbytes())});
  }
  py::gil_scoped_release release;
  ws.download(std::move(what));
}

bool post(DeviceWorkspace& ws, const std::vector<const DeviceArray*>& from) {
  std::vector<DeviceSpace::Fetch> what;
  for (const DeviceArray* a : from) {
    if (!a) throw py::type_error("post: expected arrays, got None");
    what.push_back({nullptr, a->data, a->size() * sizeof(float)});
  }
  return ws.post(std::move(what));
}

void collect(DeviceWorkspace& ws, std::vector<Array<float>> to) {
  std::vector<DeviceSpace::Fetch> what;
  for (Array<float>& a : to) what.push_back({a.mutable_data(), nullptr, size_t(a.nbytes())});
  py::gil_scoped_release release;
  ws.collect(std::move(what));
}

/// Puts a layer's experts into a table, and uploads it if anything has changed.
void fill_table(DeviceTable& table, const Cache& cache, int layer, const Array<int8_t>& levels) {
  const int E = cache.shape().num_experts;
  expect(levels, "levels", {E});
  std::vector<NestedMatrix> all;
  for (int e = 0; e < E; ++e) {
    const int expert = layer * E + e;
    const bool exists = layer >= 0 && expert < cache.num_experts();
    const auto v = exists ? cache.glance(expert, levels.data()[e], true) : std::nullopt;
    if (!v) throw std::invalid_argument("DeviceTable: an expert is not on the device");
    for (const NestedMatrix* w : {&v->gate, &v->up, &v->down}) {
      if (rank_of(*w)) throw std::invalid_argument("DeviceTable: matrices with corrections are chosen by the host");
      all.push_back(*w);
    }
  }
  const size_t bytes = all.size() * sizeof(NestedMatrix);
  if (bytes > table.memory.size()) throw std::invalid_argument("DeviceTable: it is for another cache");
  if (table.matrices.size() == all.size() && !std::memcmp(table.matrices.data(), all.data(), bytes)) return;
  table.matrices = std::move(all);
  table.memory.space().upload(table.memory.as(), table.matrices.data(), bytes);
}

/// experts [T, K] are int32 in an array of floats.
void choose_on(DeviceWorkspace& ws, const RouteRule& rule, const DeviceArray& logits, const DeviceArray* bias,
               const DeviceArray* choice_bias, const DeviceArray& experts, const DeviceArray& gates) {
  const py::ssize_t E = rule.num_experts, K = rule.top_k, T = logits.at(0);
  if (!is_known(rule)) throw std::invalid_argument("choose: there is no kernel for this rule");
  const ChooseCall call{rule,
                        expect_device(logits, "logits", {-1, E}),
                        maybe_device(bias, "router bias", {E}),
                        maybe_device(choice_bias, "choice_bias", {E}),
                        reinterpret_cast<int32_t*>(expect_device(experts, "experts", {T, K})),
                        expect_device(gates, "gates", {T, K})};
  ws.device().choose(call, int(T));
}

void chosen_ffn_on(DeviceWorkspace& ws, const DeviceArray& x, const DeviceTable& table, const DeviceArray& experts,
                   const DeviceArray& gates, const DeviceArray& parts, const DeviceArray& out,
                   const std::string& activation, const std::vector<const DeviceArray*>& biases) {
  if (!biases.empty() && biases.size() != 3) throw std::invalid_argument("biases: expected those of gate, up and down");
  const py::ssize_t d = table.cols, h = table.hidden, E = py::ssize_t(table.matrices.size()) / 3, K = experts.at(1);
  if (K > parts.at(0)) throw std::invalid_argument("chosen_ffn: parts are too few");
  DeviceWorkspace::Chosen c{table.memory.as<NestedMatrix>(),
                            reinterpret_cast<const int32_t*>(expect_device(experts, "experts", {1, -1})),
                            expect_device(gates, "gates", {1, K}),
                            int(K),
                            int(h),
                            int(d),
                            {}};
  for (size_t i = 0; i < biases.size(); ++i) c.biases[i] = maybe_device(biases[i], "biases", {E, i < 2 ? h : d});
  ws.chosen_ffn(expect_device(x, "chosen_ffn x", {1, d}), activation_of(activation), c,
                expect_device(parts, "parts", {-1, d}), expect_device(out, "out", {1, d}));
}

}  // namespace

void bind_device_ops(py::module_& m) {
  using Shape = WorkspaceShape;
  m.attr("KEY_BLOCK") = kKeyBlock;
  py::class_<DeviceWorkspace, Held<DeviceWorkspace>>(m, "DeviceWorkspace", "Scratch of one engine on a device.")
      .def(py::init([](const std::shared_ptr<DeviceSpace>& device, int max_rows, int max_cols, int max_hidden,
                       int max_context, int head_dim, int num_heads, int max_routed, bool corrected) {
             const Shape shape{max_rows, max_cols, max_hidden, max_context, head_dim, num_heads};
             return Held<DeviceWorkspace>(new DeviceWorkspace(device, shape, max_routed, corrected));
           }),
           py::arg("device").none(false), py::arg("max_rows"), py::arg("max_cols"), py::arg("max_hidden"),
           py::arg("max_context"), py::arg("head_dim"), py::arg("num_heads"), py::arg("max_routed"),
           py::arg("corrected") = false)
      .def_static(
          "bytes",
          [](int max_rows, int max_cols, int max_hidden, int max_context, int head_dim, int num_heads, int max_routed,
             bool corrected) {
            return DeviceWorkspace::bytes({max_rows, max_cols, max_hidden, max_context, head_dim, num_heads},
                                          max_routed, corrected);
          },
          py::arg("max_rows"), py::arg("max_cols"), py::arg("max_hidden"), py::arg("max_context"), py::arg("head_dim"),
          py::arg("num_heads"), py::arg("max_routed"), py::arg("corrected") = false,
          "What such a workspace takes of a device.")
      .def("place", &DeviceWorkspace::place, py::arg("pos"), "Where the token is with which work is repeated.")
      .def("begin_noting", &DeviceWorkspace::begin_noting, "From now on work is noted instead of run.")
      .def("end_noting", &DeviceWorkspace::end_noting, "Returns the number of what was noted.")
      .def(
          "repeat", [](DeviceWorkspace& ws, int noted) { return ws.space().repeat(noted); }, py::arg("noted"),
          "Queues what was noted, and returns whether it posts something.")
      .def(
          "forget", [](DeviceWorkspace& ws, int noted) { ws.space().forget(noted); }, py::arg("noted"),
          "Frees what was noted.");

  py::class_<DeviceTable, Held<DeviceTable>>(m, "DeviceTable", "Where a layer's experts lie, for kernels that choose.")
      .def(
          py::init([](const std::shared_ptr<DeviceSpace>& device, const Cache& cache) {
            const ExpertShape& s = cache.shape();
            return Held<DeviceTable>(new DeviceTable{
                DeviceMemory(device, size_t(s.num_experts) * 3 * sizeof(NestedMatrix)), {}, s.expert_hidden, s.hidden});
          }),
          py::arg("device").none(false), py::arg("cache"))
      .def_static(
          "bytes", [](int num_experts) { return DeviceSpace::taken(size_t(num_experts) * 3 * sizeof(NestedMatrix)); },
          py::arg("num_experts"), "What a table takes of a device.")
      .def("fill", &fill_table, py::arg("cache"), py::arg("layer"), py::arg("levels").noconvert(),
           "Takes the experts of a layer, all of which are there.");
  m.def("device_post", &post, py::arg("ws"), py::arg("arrays"),
        "Queues that arrays are sent to the host; False, and nothing is queued, where they do not fit the mailbox.");
  m.def("device_collect", &collect, py::arg("ws"), py::arg("outs").noconvert(),
        "Waits for what was posted; throws as device_download.");
  m.def("device_can_choose", [](const RouteRule& rule) { return is_known(rule); }, py::arg("rule"));
  m.def("device_choose", &choose_on, py::arg("ws"), py::arg("rule"), py::arg("logits"), py::arg("bias"),
        py::arg("choice_bias"), py::arg("experts"), py::arg("gates"));
  m.def("device_chosen_ffn", &chosen_ffn_on, py::arg("ws"), py::arg("x"), py::arg("table"), py::arg("experts"),
        py::arg("gates"), py::arg("parts"), py::arg("out"), py::arg("activation") = "swiglu",
        py::arg("biases") = std::vector<const DeviceArray*>());

  py::class_<DeviceAttention>(m, "DeviceAttention", "Shape, biases and norms of one layer's attention on a device.")
      .def(py::init(&attention_of), py::kw_only(), py::arg("index"), py::arg("num_heads"), py::arg("num_kv_heads"),
           py::arg("head_dim"), py::arg("window"), py::arg("scale"), py::arg("q_bias"), py::arg("k_bias"),
           py::arg("v_bias"), py::arg("q_norm"), py::arg("k_norm"), py::arg("v_norm") = py::none(),
           py::arg("sinks") = py::none(), py::arg("norm_per_head"), py::arg("norm_eps"), py::arg("clip"),
           py::arg("rope_dim"), py::arg("norm_after_rope"), py::arg("chunk") = 0, py::arg("growth") = 0,
           py::arg("grow_every") = 0)
      .def_property_readonly("num_constants", [](const DeviceAttention&) { return 0; }, "None: see AttentionLayer.");

  m.def("device_attention", &attention_on, py::arg("ws"), py::arg("layer"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("pos"), py::arg("cos"), py::arg("sin"), py::arg("kv"), py::arg("out"));
  m.def("device_linear", &linear_on, py::arg("ws"), py::arg("x"), py::arg("matrices"), py::arg("outs"));
  m.def("device_linear_heads", &linear_heads_on, py::arg("ws"), py::arg("x"), py::arg("weight"), py::arg("heads"),
        py::arg("out"));
  m.def("device_ffn", &ffn_on, py::arg("ws"), py::arg("x"), py::arg("gate"), py::arg("up"), py::arg("down"),
        py::arg("out"), py::arg("activation") = "swiglu");
  m.def("device_add_norm", &add_norm_on, py::arg("ws"), py::arg("added"), py::arg("scale"), py::arg("x"),
        py::arg("weight"), py::arg("eps"), py::arg("out"));
  m.def("device_add_rows", &add_rows_on, py::arg("ws"), py::arg("x"), py::arg("scale"), py::arg("gate_weight"),
        py::arg("gate_input"), py::arg("out"));
  m.def(
      "device_add_bias",
      [](DeviceWorkspace& ws, const DeviceArray& bias, const DeviceArray& out) {
        const float* b = expect_device(bias, "bias", {out.at(1)});
        ws.device().add_bias(b, int(out.at(0)), int(out.at(1)), expect_device(out, "add_bias out", {-1, -1}));
      },
      py::arg("ws"), py::arg("bias"), py::arg("out"));
  m.def(
      "device_scale",
      [](DeviceWorkspace& ws, float factor, const DeviceArray& out) {
        ws.device().scale(factor, out.size(), out.data);
      },
      py::arg("ws"), py::arg("factor"), py::arg("out"));
  m.def("device_matmul", &matmul_on, py::arg("ws"), py::arg("x"), py::arg("w"), py::arg("y"));
  m.def("device_expert_ffn", &expert_ffn_on, py::arg("ws"), py::arg("x"), py::arg("cache"),
        py::arg("experts").noconvert(), py::arg("levels").noconvert(), py::arg("offsets").noconvert(),
        py::arg("tokens").noconvert(), py::arg("group"), py::arg("parts"), py::arg("activation") = "swiglu",
        py::arg("biases") = std::vector<const DeviceArray*>(), py::arg("basis") = py::none(),
        py::arg("stream") = py::none());
  m.def("device_run_hits", &run_hits_on, py::arg("ws"), py::arg("x"), py::arg("cache"), py::arg("first"),
        py::arg("chosen").noconvert(), py::arg("gates").noconvert(), py::arg("levels").noconvert(),
        py::arg("counts").noconvert(), py::arg("weight"), py::arg("parts"), py::arg("out"), py::arg("activation"),
        py::arg("biases"), py::arg("basis"));
  m.def("device_combine", &combine_on, py::arg("ws"), py::arg("parts"), py::arg("rows").noconvert(),
        py::arg("gates").noconvert(), py::arg("out"));
  m.def("device_multiply", &multiply_on, py::arg("ws"), py::arg("factors"), py::arg("out"));
  m.def("device_weigh", &weigh_on, py::arg("ws"), py::arg("x"), py::arg("gates").noconvert(), py::arg("out"));

  py::class_<DeviceLatents>(m, "DeviceLatents", "Shape and norm of one layer's latent attention on a device.")
      .def(py::init(&device_latents_of), py::kw_only(), py::arg("index"), py::arg("num_heads"), py::arg("nope_dim"),
           py::arg("rope_dim"), py::arg("latent_dim"), py::arg("scale"), py::arg("rotates"), py::arg("grow_every"),
           py::arg("growth"), py::arg("norm"), py::arg("norm_eps"));
  m.def("device_latent_attention", &latent_attention_on, py::arg("ws"), py::arg("layer"), py::arg("q"),
        py::arg("absorbed"), py::arg("keys"), py::arg("pos"), py::arg("cos"), py::arg("sin"), py::arg("kv"),
        py::arg("out"));

  m.def("device_download", &download, py::arg("ws"), py::arg("arrays"), py::arg("outs").noconvert(),
        "Waits for all that was queued; throws RangeError for what attention could not store.");
}

}  // namespace edgemoe
