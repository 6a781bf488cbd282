#include "mixers/attention.h"

#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/work.h"
#include "dense.h"
#include "kv.h"
#include "matrix.h"
#include "mixers/rope.h"

namespace edgemoe {
namespace {

/// The parts of attention that stay the same for a layer, with the arrays that they point into.
struct AttentionLayer {
  AttentionParts parts{};
  std::vector<py::object> arrays;
  std::vector<float> ones;
  KeyConstants constants;

  const float* keep(const py::object& array, const char* name, py::ssize_t size) {
    if (array.is_none()) return nullptr;
    arrays.push_back(array);
    return floats(array, name, {size});
  }
};

/// Keys and values by the names of their types.
Held<Kv> kv_of(const std::string& key_type, const std::string& value_type, int num_heads, int capacity, int head_dim,
               bool resident) {
  return Held<Kv>(make_kv(kv_type(key_type), kv_type(value_type), num_heads, capacity, head_dim, resident).release());
}

/// Checks the arrays of a call of `attention` and returns its parts.
AttentionParts parts_of(const AttentionLayer& layer, const Array<float>& q, const Array<float>& k,
                        const Array<float>& v, const Array<float>& cos, const Array<float>& sin, const Rope* rope,
                        const Kv& kv, const Array<float>& out) {
  AttentionParts parts = layer.parts;
  const AttentionShape& s = parts.shape;
  const py::ssize_t T = q.shape(0), half = s.rope_dim / 2;
  expect(q, "q", {T, s.num_heads * s.head_dim});
  expect(k, "k", {T, s.num_kv_heads * s.head_dim});
  expect(v, "v", {T, s.num_kv_heads * s.head_dim});
  expect(out, "out", {T, s.num_heads * s.head_dim});
  expect(cos, "cos", {T, half});
  expect(sin, "sin", {T, half});
  if (!kv.layer.values || kv.num_heads != s.num_kv_heads || kv.head_dim != s.head_dim) {
    throw std::invalid_argument("attention: the KV cache is of another shape");
  }
  parts.cos = cos.data();
  parts.sin = sin.data();
  if (rope && rope->half() != half) throw std::invalid_argument("attention: the Rope is of another head");
  return parts;
}

/// Runs attention with such parts at a position.
void attend_at(Workspace& ws, AttentionParts parts, const Rope* rope, float* q, float* k, float* v, int T, int pos,
               const KvLayer& kv, float* out) {
  parts.turns = rope ? rope->tiles(pos + T) : nullptr;
  attention(ws, q, k, v, T, pos, parts, kv, out);
}

void bind_rope(py::module_& m) {
  py::class_<Rope, Held<Rope>>(m, "Rope", "Rotary frequencies, and the cosines and sines of positions.")
      .def(py::init([](const Array<float>& frequencies, float scale) {
             expect(frequencies, "frequencies", {-1});
             const float* f = frequencies.data();
             return Held<Rope>(new Rope({f, f + frequencies.size()}, scale));
           }),
           py::arg("frequencies").noconvert(), py::arg("scale"))
      .def("keep", &Rope::keep, py::arg("positions"),
           "Keeps the cosines and sines of so many first positions, which keys stored without their biases need.")
      .def_static("bytes", &Rope::bytes, py::arg("half"), py::arg("kept"), "Bytes that the kept positions take.")
      .def(
          "angles",
          [](Rope& rope, int pos, Array<float> cos, Array<float> sin) {
            expect(cos, "cos", {-1, rope.half()});
            expect(sin, "sin", {cos.shape(0), rope.half()});
            rope.angles(pos, int(cos.shape(0)), cos.mutable_data(), sin.mutable_data());
          },
          py::arg("pos"), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
          "cos and sin [T, half] for positions pos, pos + 1, …");
}

void bind_layer(py::module_& m) {
  py::class_<AttentionLayer>(m, "AttentionLayer", "Shape, biases and norms of one layer's attention.")
      .def(py::init([](int index, int num_heads, int num_kv_heads, int head_dim, int window, float scale,
                       const py::object& q_bias, const py::object& k_bias, const py::object& v_bias,
                       const py::object& q_norm, const py::object& k_norm, bool norm_per_head, float norm_eps,
                       float clip, std::optional<int> rope_dim, bool norm_after_rope, const Nested* k,
                       const py::object& input_norm, const py::object& sinks, bool v_norm, int chunk, float growth,
                       int grow_every) {
             expect_within("AttentionLayer num_heads", num_heads, 1, kMaxHeads);
             expect_within("AttentionLayer head_dim", head_dim, 1, kMaxHeadDim);
             if (num_kv_heads < 1 || num_heads % num_kv_heads) {
               throw std::invalid_argument("AttentionLayer: expected heads that are a multiple of the kv heads");
             }
             const int rotated = rope_dim.value_or(head_dim);
             if (rotated < 0 || rotated > head_dim || rotated % 2) {
               throw std::invalid_argument("AttentionLayer rope_dim: expected an even number to " +
                                           std::to_string(head_dim) + ", got " + std::to_string(rotated));
             }
             if (norm_after_rope && !norm_per_head) {
               throw std::invalid_argument("AttentionLayer: a norm after RoPE is one of each head");
             }
             if (chunk < 0 || (growth > 0 && grow_every < 1)) {
               throw std::invalid_argument("AttentionLayer: chunk and grow_every count positions");
             }
             auto a = std::make_unique<AttentionLayer>();
             a->parts.layer = index;
             const py::ssize_t q = num_heads * head_dim, kv = num_kv_heads * head_dim;
             a->parts.shape = {num_heads, num_kv_heads, head_dim, window, scale, rotated, chunk};
             a->parts.q_bias = a->keep(q_bias, "q_bias", q);
             a->parts.k_bias = a->keep(k_bias, "k_bias", kv);
             a->parts.v_bias = a->keep(v_bias, "v_bias", kv);
             a->parts.q_norm = a->keep(q_norm, "q_norm", norm_per_head ? head_dim : q);
             a->parts.k_norm = a->keep(k_norm, "k_norm", norm_per_head ? head_dim : kv);
             a->parts.sinks = a->keep(sinks, "sinks", num_heads);
             if (v_norm) {
               a->ones.assign(size_t(head_dim), 1.0f);
               a->parts.v_norm = a->ones.data();
             }
             a->parts.norm_per_head = norm_per_head;
             a->parts.norm_after_rope = norm_after_rope;
             a->parts.norm_eps = norm_eps;
             a->parts.clip = clip;
             a->parts.growth = growth;
             a->parts.grow_every = grow_every;
             if (k && a->parts.k_bias && !a->parts.k_norm && clip == 0) {  // else the bias is not just added to keys
               if (k->matrix.rows != kv) throw std::invalid_argument("AttentionLayer: k has another number of rows");
               const float* norm = floats(input_norm, "input_norm", {k->matrix.cols});
               a->constants =
                   split_bias(k->matrix, norm, a->parts.k_bias, num_kv_heads, head_dim, a->parts.shape.rope_dim);
               a->parts.constants = &a->constants;
             }
             return a;
           }),
           py::kw_only(), py::arg("index"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
           py::arg("window"), py::arg("scale"), py::arg("q_bias"), py::arg("k_bias"), py::arg("v_bias"),
           py::arg("q_norm"), py::arg("k_norm"), py::arg("norm_per_head"), py::arg("norm_eps"), py::arg("clip"),
           py::arg("rope_dim") = py::none(), py::arg("norm_after_rope") = false, py::arg("k") = nullptr,
           py::arg("input_norm") = py::none(), py::arg("sinks") = py::none(), py::arg("v_norm") = false,
           py::arg("chunk") = 0, py::arg("growth") = 0.0f, py::arg("grow_every") = 0)
      .def_property_readonly(
          "num_constants", [](const AttentionLayer& a) { return a.constants.pairs.size(); },
          "How many pairs of columns are stored without their biases in keys of 8 bits; 0 without k and input_norm.");
}

void bind_kv(py::module_& m) {
  py::class_<Kv, Held<Kv>>(
      m, "KvLayer", "Keys and values of one layer, each of a type of the KV cache. Memory is taken as it is touched.")
      .def(py::init(&kv_of), py::kw_only(), py::arg("key_type"), py::arg("value_type"), py::arg("num_heads"),
           py::arg("capacity"), py::arg("head_dim"), py::arg("resident") = false)
      .def(
          "take",
          [](Kv& kv, const Kv& from, int begin, int end) {
            check_copy(from.layer, kv.layer, begin, end);
            if (from.num_heads != kv.num_heads) throw std::invalid_argument("take: expected as many heads");
            py::gil_scoped_release release;
            copy_positions(from.layer, kv.layer, kv.num_heads, begin, end,
                           [](void* to, const void* p, size_t n) { std::memcpy(to, p, n); });
          },
          py::arg("source"), py::arg("begin"), py::arg("end"),
          "Copies positions of another layer to the same positions of this one.")
      .def_static(
          "bytes",
          [](const std::string& type, int num_heads, int capacity, int head_dim) {
            return kv_bytes(kv_type(type), num_heads, capacity, head_dim);
          },
          py::arg("type"), py::arg("num_heads"), py::arg("capacity"), py::arg("head_dim"),
          "Bytes of the keys or the values of one layer.")
      .def_static("ring", &ring_capacity, py::arg("window"), py::arg("tokens"),
                  "The capacity that a layer needs to keep only a window, in passes of at most `tokens` tokens.")
      .def_static(
          "latents",
          [](const std::string& type, int capacity, int head_dim, int value_dim) {
            return Held<Kv>(make_latents(kv_type(type), capacity, head_dim, value_dim).release());
          },
          py::kw_only(), py::arg("type"), py::arg("capacity"), py::arg("head_dim"), py::arg("value_dim"),
          "A layer with one key per position, whose leading columns are its value too.")
      .def_property_readonly(
          "content",
          [](const py::object& self) {
            auto& kv = self.cast<Kv&>();
            return py::array_t<uint8_t>(py::ssize_t(kv.bytes), kv.memory.bytes(), self);
          },
          "uint8 view of the keys and then the values, in the layout of kernels.h. Writing to it changes them.");
}

void bind_attending(py::module_& m) {
  m.def(
      "attention",
      [](Workspace& ws, const AttentionLayer& layer, Array<float> q, Array<float> k, Array<float> v, int pos,
         const Array<float>& cos, const Array<float>& sin, const Rope* rope, Kv& kv, Array<float> out) {
        const AttentionParts parts = parts_of(layer, q, k, v, cos, sin, rope, kv, out);
        const int T = int(q.shape(0));
        float *qp = q.mutable_data(), *kp = k.mutable_data(), *vp = v.mutable_data(), *o = out.mutable_data();
        run_at(ws, pos, [=, &ws, &kv](int at) { attend_at(ws, parts, rope, qp, kp, vp, T, at, kv.layer, o); });
      },
      py::arg("ws"), py::arg("layer"), py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
      py::arg("pos"), py::arg("cos").noconvert(), py::arg("sin").noconvert(), py::arg("rope"), py::arg("kv"),
      py::arg("out").noconvert(), "Stores k and v at pos, and attends causally. q, k and v are changed.");

  m.def(
      "attend",
      [](Workspace& ws, const AttentionLayer& layer, const Array<float>& x, const std::array<const Nested*, 3>& qkv,
         const Nested& o, Array<float> q, Array<float> k, Array<float> v, int pos, const Array<float>& cos,
         const Array<float>& sin, const Rope* rope, Kv& kv, Array<float> heads, Array<float> out) {
        const AttentionParts parts = parts_of(layer, q, k, v, cos, sin, rope, kv, heads);
        expect(x, "attend x", {q.shape(0), -1});
        expect(out, "attend out", {q.shape(0), o.matrix.rows});
        const py::ssize_t rows[] = {q.shape(1), k.shape(1), v.shape(1)};
        std::vector<const NestedMatrix*> matrices;
        bool fit = o.matrix.cols == heads.shape(1);
        for (size_t i = 0; i < 3; ++i) {
          if (!qkv[i]) throw py::type_error("attend: expected matrices, got None");
          matrices.push_back(&qkv[i]->matrix);
          fit = fit && matrices[i]->cols == x.shape(1) && matrices[i]->rows == rows[i];
        }
        if (!fit) throw std::invalid_argument("attend: the matrices do not fit x, q, k, v and the heads");
        const float* a = x.data();
        float *qp = q.mutable_data(), *kp = k.mutable_data(), *vp = v.mutable_data();
        float *h = heads.mutable_data(), *to = out.mutable_data();
        const int T = int(x.shape(0));
        const NestedMatrix* last = &o.matrix;
        run_at(ws, pos, [=, &ws, &kv](int at) {
          linear(ws, a, T, matrices, {qp, kp, vp});
          attend_at(ws, parts, rope, qp, kp, vp, T, at, kv.layer, h);
          linear(ws, h, T, {last}, {to});
        });
      },
      py::arg("ws"), py::arg("layer"), py::arg("x").noconvert(), py::arg("qkv"), py::arg("o"), py::arg("q").noconvert(),
      py::arg("k").noconvert(), py::arg("v").noconvert(), py::arg("pos"), py::arg("cos").noconvert(),
      py::arg("sin").noconvert(), py::arg("rope"), py::arg("kv"), py::arg("heads").noconvert(),
      py::arg("out").noconvert(), "In one call: `linear` to q, k and v, `attention` to heads, and `linear` with o.");
}

}  // namespace

void bind_attention(py::module_& m) {
  bind_rope(m);
  bind_layer(m);
  bind_kv(m);
  bind_attending(m);
}

}  // namespace edgemoe
