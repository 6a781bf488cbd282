#include "mixers/latent.h"

#include <array>
#include <memory>
#include <string>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/work.h"
#include "kv.h"
#include "matrix.h"

namespace edgemoe {
namespace {

/// The parts of latent attention that stay the same for a layer, with the array that they point into.
struct LatentLayer {
  LatentParts parts{};
  py::object norm;
};

/// The parts of a layer for T tokens, checked against its cache.
LatentParts parts_of(const LatentLayer& layer, py::ssize_t T, const py::object& cos, const py::object& sin,
                     const Kv& kv) {
  LatentParts parts = layer.parts;
  const LatentShape& s = parts.shape;
  if (s.rotates) {
    parts.cos = floats(cos, "cos", {T, s.rope_dim / 2});
    parts.sin = floats(sin, "sin", {T, s.rope_dim / 2});
  }
  if (kv.layer.values || kv.head_dim != s.latent_dim + s.rope_dim || kv.layer.value_stride != s.latent_dim) {
    throw std::invalid_argument("latent_attention: the KV cache is of another shape");
  }
  return parts;
}

/// kv_a, q_a, q_b, k_b, v_b and out; q_b may be null.
using Projections = std::array<const Nested*, 6>;

/// Throws std::invalid_argument or py::type_error unless they fit a layer and each other.
LatentMatrices matrices_of(const Projections& given, const LatentShape& s, int cols, const py::object& q_norm,
                           float eps) {
  const NestedMatrix* m[6] = {};
  for (size_t i = 0; i < given.size(); ++i) {
    if (given[i]) m[i] = &given[i]->matrix;
    if (!given[i] && i != 2) throw py::type_error("attend_latents: expected matrices, got None");
  }
  const auto &kv_a = *m[0], &q_a = *m[1], &k_b = *m[3], &v_b = *m[4], &out = *m[5];
  const auto is = [](const NestedMatrix& w, int rows, int columns) { return w.rows == rows && w.cols == columns; };
  const int heads = s.num_heads, queries = heads * (s.nope_dim + s.rope_dim);
  const bool by_rank = m[2] != nullptr;
  const bool fit = is(kv_a, s.latent_dim + s.rope_dim, cols) && is(q_a, by_rank ? q_a.rows : queries, cols) &&
                   (!by_rank || is(*m[2], queries, q_a.rows)) && is(k_b, heads * s.latent_dim, s.nope_dim) &&
                   v_b.cols == s.latent_dim && v_b.rows % (heads * kTileRows) == 0 && out.cols == v_b.rows;
  if (!fit) throw std::invalid_argument("attend_latents: the matrices do not fit x, the layer or each other");
  const float* norm = by_rank ? floats(q_norm, "q_norm", {q_a.rows}) : nullptr;
  return {m[0], m[1], m[2], m[3], m[4], m[5], norm, eps};
}

void bind_layer_of_latents(py::module_& m) {
  m.def(
      "attend_latents",
      [](Workspace& ws, const LatentLayer& layer, const Array<float>& x, const Projections& projections,
         const py::object& q_norm, float eps, std::array<Array<float>, 6> rows, int pos, const py::object& cos,
         const py::object& sin, Kv& kv, Array<float> out) {
        expect(x, "attend_latents x", {-1, -1});
        const py::ssize_t T = x.shape(0);
        const LatentParts parts = parts_of(layer, T, cos, sin, kv);
        const LatentShape& s = parts.shape;
        const LatentMatrices matrices = matrices_of(projections, s, int(x.shape(1)), q_norm, eps);
        const int widths[] = {matrices.q_b ? matrices.q_a->rows : 0,
                              s.num_heads * (s.nope_dim + s.rope_dim),
                              s.num_heads * (s.latent_dim + s.rope_dim),
                              s.latent_dim + s.rope_dim,
                              s.num_heads * s.latent_dim,
                              matrices.v_b->rows};
        float* to[6];
        for (size_t i = 0; i < rows.size(); ++i) {
          if (i > 0 || matrices.q_b) expect(rows[i], "attend_latents rows", {T, widths[i]});
          to[i] = rows[i].mutable_data();
        }
        expect(out, "attend_latents out", {T, matrices.out->rows});
        const float* a = x.data();
        float* o = out.mutable_data();
        run_at(ws, pos, [=, &ws, &kv](int at) {
          attend_latents(ws, a, int(T), at, parts, matrices, {to[0], to[1], to[2], to[3], to[4], to[5]}, kv.layer, o);
        });
      },
      py::arg("ws"), py::arg("layer"), py::arg("x").noconvert(), py::arg("projections"), py::arg("q_norm"),
      py::arg("eps"), py::arg("rows").noconvert(), py::arg("pos"), py::arg("cos"), py::arg("sin"), py::arg("kv"),
      py::arg("out").noconvert(),
      "In one call: `linear` with kv_a and q_a, a norm and q_b if there is one, `linear_heads` with k_b, "
      "`latent_attention`, `linear_heads` with v_b and `linear` with out. rows: scratch for the results of q_a, q_b, "
      "k_b, kv_a, attention and v_b.");
}

}  // namespace

void bind_latent(py::module_& m) {
  py::class_<LatentLayer>(m, "LatentLayer", "Shape and norm of one layer's latent attention.")
      .def(py::init([](int index, int num_heads, int nope_dim, int rope_dim, int latent_dim, float scale, bool rotates,
                       int grow_every, float growth, const py::object& norm, float norm_eps) {
             expect_within("LatentLayer num_heads", num_heads, 1, kMaxHeads);
             expect_within("LatentLayer nope_dim", nope_dim, 1, kMaxHeadDim);
             expect_within("LatentLayer rope_dim", rope_dim, 0, kMaxHeadDim);
             expect_within("LatentLayer latent_dim", latent_dim, 1, kMaxHeadDim - rope_dim);
             expect_within("LatentLayer grow_every", grow_every, growth > 0 ? 1 : 0, kMaxContext);
             if (rope_dim % 2 || latent_dim % 16) {
               throw std::invalid_argument(
                   "LatentLayer: expected an even rope_dim and a latent_dim that is a multiple of 16, got " +
                   std::to_string(rope_dim) + " and " + std::to_string(latent_dim));
             }
             auto layer = std::make_unique<LatentLayer>();
             const LatentShape shape{num_heads, nope_dim, rope_dim, latent_dim, scale, rotates, grow_every, growth};
             layer->parts = {index, shape, floats(norm, "norm", {latent_dim}), norm_eps, nullptr, nullptr};
             layer->norm = norm;
             return layer;
           }),
           py::kw_only(), py::arg("index"), py::arg("num_heads"), py::arg("nope_dim"), py::arg("rope_dim"),
           py::arg("latent_dim"), py::arg("scale"), py::arg("rotates"), py::arg("grow_every"), py::arg("growth"),
           py::arg("norm"), py::arg("norm_eps"));

  m.def(
      "latent_attention",
      [](Workspace& ws, const LatentLayer& layer, const Array<float>& q, Array<float> absorbed, Array<float> keys,
         int pos, const py::object& cos, const py::object& sin, Kv& kv, Array<float> out) {
        const py::ssize_t T = keys.ndim() ? keys.shape(0) : 0;
        const LatentParts parts = parts_of(layer, T, cos, sin, kv);
        const LatentShape& s = parts.shape;
        const int width = s.latent_dim + s.rope_dim;
        expect(keys, "keys", {T, width});
        expect(q, "q", {T, s.num_heads * (s.nope_dim + s.rope_dim)});
        expect(absorbed, "absorbed", {T, s.num_heads * width});
        expect(out, "out", {T, s.num_heads * s.latent_dim});
        const float* a = q.data();
        float *b = absorbed.mutable_data(), *k = keys.mutable_data(), *o = out.mutable_data();
        run_at(ws, pos, [=, &ws, &kv](int at) { latent_attention(ws, a, b, k, int(T), at, parts, kv.layer, o); });
      },
      py::arg("ws"), py::arg("layer"), py::arg("q").noconvert(), py::arg("absorbed").noconvert(),
      py::arg("keys").noconvert(), py::arg("pos"), py::arg("cos"), py::arg("sin"), py::arg("kv"),
      py::arg("out").noconvert(),
      "Norms and rotates keys, stores them at pos, writes the rotated parts of q to the absorbed queries, and attends "
      "causally with these. keys and absorbed are changed.");
  bind_layer_of_latents(m);
}

}  // namespace edgemoe
