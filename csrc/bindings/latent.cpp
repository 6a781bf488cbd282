#include "mixers/latent.h"

#include <memory>
#include <string>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "kv.h"

namespace edgemoe {
namespace {

/// The parts of latent attention that stay the same for a layer, with the array that they point into.
struct LatentLayer {
  LatentParts parts{};
  py::object norm;
};

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
        LatentParts parts = layer.parts;
        const LatentShape& s = parts.shape;
        const py::ssize_t T = keys.ndim() ? keys.shape(0) : 0, half = s.rope_dim / 2;
        const int width = s.latent_dim + s.rope_dim;
        expect(keys, "keys", {T, width});
        expect(q, "q", {T, s.num_heads * (s.nope_dim + s.rope_dim)});
        expect(absorbed, "absorbed", {T, s.num_heads * width});
        expect(out, "out", {T, s.num_heads * s.latent_dim});
        if (s.rotates) {
          parts.cos = floats(cos, "cos", {T, half});
          parts.sin = floats(sin, "sin", {T, half});
        }
        if (kv.layer.values || kv.head_dim != width || kv.layer.value_stride != s.latent_dim) {
          throw std::invalid_argument("latent_attention: the KV cache is of another shape");
        }
        const float* a = q.data();
        float *b = absorbed.mutable_data(), *k = keys.mutable_data(), *o = out.mutable_data();
        py::gil_scoped_release release;
        latent_attention(ws, a, b, k, int(T), pos, parts, kv.layer, o);
      },
      py::arg("ws"), py::arg("layer"), py::arg("q").noconvert(), py::arg("absorbed").noconvert(),
      py::arg("keys").noconvert(), py::arg("pos"), py::arg("cos"), py::arg("sin"), py::arg("kv"),
      py::arg("out").noconvert(),
      "Norms and rotates keys, stores them at pos and attends causally with absorbed queries, which get the rotated "
      "parts of q; keys and absorbed are changed.");
}

}  // namespace edgemoe
