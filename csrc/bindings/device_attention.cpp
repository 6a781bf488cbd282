// Attention on a device, to keys and values or to latents; see bindings/attention.cpp and bindings/latent.cpp.
#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/device_arrays.h"
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

}  // namespace

void bind_device_attention(py::module_& m) {
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

  py::class_<DeviceLatents>(m, "DeviceLatents", "Shape and norm of one layer's latent attention on a device.")
      .def(py::init(&device_latents_of), py::kw_only(), py::arg("index"), py::arg("num_heads"), py::arg("nope_dim"),
           py::arg("rope_dim"), py::arg("latent_dim"), py::arg("scale"), py::arg("rotates"), py::arg("grow_every"),
           py::arg("growth"), py::arg("norm"), py::arg("norm_eps"));
  m.def("device_latent_attention", &latent_attention_on, py::arg("ws"), py::arg("layer"), py::arg("q"),
        py::arg("absorbed"), py::arg("keys"), py::arg("pos"), py::arg("cos"), py::arg("sin"), py::arg("kv"),
        py::arg("out"));
}

}  // namespace edgemoe
