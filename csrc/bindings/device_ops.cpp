// A device's verbs. Arrays whose names begin with host_ are numpy's.
#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/device_arrays.h"
#include "cache.h"
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
                                              const DeviceArray* k_norm, bool norm_per_head, float norm_eps, float clip,
                                              int rope_dim, bool norm_after_rope) {
  expect_within("DeviceAttention num_heads", num_heads, 1, kMaxHeads);
  expect_within("DeviceAttention head_dim", head_dim, 1, kMostHeadDim);
  expect_within("DeviceAttention rope_dim", rope_dim, 0, head_dim);
  if (num_kv_heads < 1 || num_heads % num_kv_heads || rope_dim % 2) {
    throw std::invalid_argument("DeviceAttention: expected heads that are a multiple of the kv heads, and even RoPE");
  }
  auto a = std::make_unique<DeviceAttention>();
  AttentionParts& p = a->parts;
  const py::ssize_t q = num_heads * head_dim, kv = num_kv_heads * head_dim;
  p.layer = index;
  p.shape = {num_heads, num_kv_heads, head_dim, window, scale, rope_dim};
  p.q_bias = a->keep(q_bias, "q_bias", q);
  p.k_bias = a->keep(k_bias, "k_bias", kv);
  p.v_bias = a->keep(v_bias, "v_bias", kv);
  p.q_norm = a->keep(q_norm, "q_norm", norm_per_head ? head_dim : q);
  p.k_norm = a->keep(k_norm, "k_norm", norm_per_head ? head_dim : kv);
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

void ffn_on(DeviceWorkspace& ws, const DeviceArray& x, const DeviceMatrix& gate, const DeviceMatrix& up,
            const DeviceMatrix& down, const DeviceArray& out) {
  const NestedMatrix &g = gate.matrix, &u = up.matrix, &d = down.matrix;
  expect_device(x, "ffn x", {-1, g.cols});
  expect_device(out, "ffn out", {x.at(0), d.rows});
  if (u.rows != g.rows || u.cols != g.cols || d.cols != g.rows) {
    throw std::invalid_argument("ffn: the three matrices do not fit each other");
  }
  py::gil_scoped_release release;
  ws.ffns(x.data, int(x.at(0)), {{{g, u, d}, nullptr, int(x.at(0)), out.data}});
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

/// Runs the experts at positions `group` of a plan, all of which are pinned in a cache on the device.
void expert_ffn_on(DeviceWorkspace& ws, const DeviceArray& x, const Cache& cache, const Array<int32_t>& experts,
                   const Array<int8_t>& levels, const Array<int32_t>& offsets, const Array<int32_t>& tokens,
                   const std::vector<int>& group, const DeviceArray& parts) {
  const py::ssize_t d = cache.shape().hidden, n = experts.size();
  expect_device(x, "expert_ffn x", {-1, d});
  expect_device(parts, "parts", {-1, d});
  expect(experts, "experts", {-1});
  expect(levels, "levels", {n});
  expect(offsets, "offsets", {n + 1});
  const int32_t *o = offsets.data(), *t = tokens.data();
  std::vector<FfnUse> uses;
  for (int i : group) {
    if (i < 0 || i >= n || o[i] < 0 || o[i + 1] <= o[i] || o[i + 1] > tokens.size() || o[i + 1] > parts.at(0)) {
      throw std::invalid_argument("expert_ffn: offsets do not fit tokens and parts");
    }
    for (int32_t j = o[i]; j < o[i + 1]; ++j) {
      if (t[j] < 0 || t[j] >= x.at(0)) throw std::invalid_argument("expert_ffn: a token is outside x");
    }
    uses.push_back({cache.view(experts.data()[i], levels.data()[i]), t + o[i], o[i + 1] - o[i],
                    parts.data + size_t(o[i]) * size_t(d)});
  }
  py::gil_scoped_release release;
  ws.ffns(x.data, int(x.at(0)), uses);
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

}  // namespace

void bind_device_ops(py::module_& m) {
  using Shape = WorkspaceShape;
  py::class_<DeviceWorkspace, Held<DeviceWorkspace>>(m, "DeviceWorkspace", "Scratch of one engine on a device.")
      .def(py::init([](const std::shared_ptr<DeviceSpace>& device, int max_rows, int max_cols, int max_hidden,
                       int max_context, int head_dim, int num_heads, int max_routed) {
             const Shape shape{max_rows, max_cols, max_hidden, max_context, head_dim, num_heads};
             return Held<DeviceWorkspace>(new DeviceWorkspace(device, shape, max_routed));
           }),
           py::arg("device").none(false), py::arg("max_rows"), py::arg("max_cols"), py::arg("max_hidden"),
           py::arg("max_context"), py::arg("head_dim"), py::arg("num_heads"), py::arg("max_routed"))
      .def_static(
          "bytes",
          [](int max_rows, int max_cols, int max_hidden, int max_context, int head_dim, int num_heads, int max_routed) {
            return DeviceWorkspace::bytes({max_rows, max_cols, max_hidden, max_context, head_dim, num_heads},
                                          max_routed);
          },
          py::arg("max_rows"), py::arg("max_cols"), py::arg("max_hidden"), py::arg("max_context"), py::arg("head_dim"),
          py::arg("num_heads"), py::arg("max_routed"), "What such a workspace takes of a device.");

  py::class_<DeviceAttention>(m, "DeviceAttention", "Shape, biases and norms of one layer's attention on a device.")
      .def(py::init(&attention_of), py::kw_only(), py::arg("index"), py::arg("num_heads"), py::arg("num_kv_heads"),
           py::arg("head_dim"), py::arg("window"), py::arg("scale"), py::arg("q_bias"), py::arg("k_bias"),
           py::arg("v_bias"), py::arg("q_norm"), py::arg("k_norm"), py::arg("norm_per_head"), py::arg("norm_eps"),
           py::arg("clip"), py::arg("rope_dim"), py::arg("norm_after_rope"))
      .def_property_readonly("num_constants", [](const DeviceAttention&) { return 0; }, "None: see AttentionLayer.");

  m.def("device_attention", &attention_on, py::arg("ws"), py::arg("layer"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("pos"), py::arg("cos"), py::arg("sin"), py::arg("kv"), py::arg("out"));
  m.def("device_linear", &linear_on, py::arg("ws"), py::arg("x"), py::arg("matrices"), py::arg("outs"));
  m.def("device_ffn", &ffn_on, py::arg("ws"), py::arg("x"), py::arg("gate"), py::arg("up"), py::arg("down"),
        py::arg("out"));
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
        py::arg("tokens").noconvert(), py::arg("group"), py::arg("parts"));
  m.def("device_combine", &combine_on, py::arg("ws"), py::arg("parts"), py::arg("rows").noconvert(),
        py::arg("gates").noconvert(), py::arg("out"));
  m.def("device_download", &download, py::arg("ws"), py::arg("arrays"), py::arg("outs").noconvert(),
        "Waits for all that was queued; throws RangeError for what attention could not store.");
}

}  // namespace edgemoe
