#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/work.h"
#include "dense.h"
#include "expert.h"
#include "kv.h"
#include "matrix.h"

namespace edgemoe {
namespace {

void bind_matrices(py::module_& m) {
  m.def(
      "linear",
      [](Workspace& ws, const Array<float>& x, const std::vector<const Nested*>& matrices,
         std::vector<Array<float>> outs) {
        expect(x, "linear x", {-1, -1});
        if (matrices.empty() || matrices.size() != outs.size())
          throw std::invalid_argument("linear: one out per matrix");
        std::vector<const NestedMatrix*> ms;
        std::vector<float*> ys;
        for (size_t i = 0; i < matrices.size(); ++i) {
          if (!matrices[i]) throw py::type_error("linear: expected matrices, got None");
          ms.push_back(&matrices[i]->matrix);
          if (ms[i]->cols != x.shape(1))
            throw std::invalid_argument("linear: x " + shape_text(x) + " does not fit a matrix of " +
                                        std::to_string(ms[i]->cols) + " columns");
          expect(outs[i], "linear out", {x.shape(0), ms[i]->rows});
          ys.push_back(outs[i].mutable_data());
        }
        const float* p = x.data();
        const int T = int(x.shape(0));
        run(ws, [=, &ws] { linear(ws, p, T, ms, ys); });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("matrices"), py::arg("outs").noconvert(),
      "outs[i] [T, rows_i] = x [T, cols] times matrices[i] transposed.");

  m.def(
      "project",
      [](Workspace& ws, const Array<float>& x, const Array<int8_t>& basis, Array<float> out) {
        expect(x, "project x", {-1, -1});
        expect(basis, "basis", {-1, py::ssize_t(basis_stride(int(x.shape(1))))});
        expect(out, "project out", {x.shape(0), kMaxRank});
        const int T = int(x.shape(0)), cols = int(x.shape(1)), rank = int(basis.shape(0));
        if (rank % kRankStep || rank > kMaxRank) throw std::invalid_argument("basis: expected 8, 16, 24 or 32 rows");
        const float* a = x.data();
        const int8_t* v = basis.data();
        float* o = out.mutable_data();
        py::gil_scoped_release release;
        project(ws, a, T, v, rank, cols, o);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("basis").noconvert(), py::arg("out").noconvert(),
      "out [T, 32] = x [T, cols] times V [rank, cols padded to 64] transposed, and zeros.");

  m.def(
      "linear_f32",
      [](Workspace& ws, const Array<float>& x, const Array<float>& matrix, Array<float> out) {
        expect(x, "linear_f32 x", {-1, -1});
        expect(matrix, "linear_f32 matrix", {-1, x.shape(1)});
        expect(out, "linear_f32 out", {x.shape(0), matrix.shape(0)});
        const float *p = x.data(), *w = matrix.data();
        float* o = out.mutable_data();
        const int T = int(x.shape(0)), rows = int(matrix.shape(0)), cols = int(x.shape(1));
        run(ws, [=, &ws] { linear_f32(ws, p, T, w, rows, cols, o); });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("matrix").noconvert(), py::arg("out").noconvert(),
      "out [T, rows] = x [T, cols] times a float32 matrix transposed.");
}

void bind_matrix_of_heads(py::module_& m) {
  m.def(
      "linear_heads",
      [](Workspace& ws, const Array<float>& x, const Nested& w, int heads, Array<float> out) {
        expect(x, "linear_heads x", {-1, -1});
        expect(out, "linear_heads out", {x.shape(0), -1});
        expect_within("linear_heads heads", heads, 1, kMaxHeads);
        expect_within("linear_heads rows of all heads", int64_t(x.shape(0)) * heads, 0, kMaxSize);
        const NestedMatrix& m = w.matrix;
        const int per_head = m.rows / heads;
        if (m.rows % heads || per_head % kTileRows) {
          throw std::invalid_argument("linear_heads: expected a multiple of 16 rows for each head, got " +
                                      std::to_string(m.rows) + " for " + std::to_string(heads) + " heads");
        }
        for (const auto& [a, least] : {std::pair{x, m.cols}, std::pair{out, per_head}}) {
          if (a.shape(1) % heads || a.shape(1) / heads < least) {
            throw std::invalid_argument("linear_heads: expected at least " + std::to_string(least) +
                                        " columns for each of " + std::to_string(heads) + " heads, got " +
                                        std::to_string(a.shape(1)));
          }
        }
        const float* a = x.data();
        float* o = out.mutable_data();
        const int T = int(x.shape(0)), x_stride = int(x.shape(1)) / heads, out_stride = int(out.shape(1)) / heads;
        run(ws, [=, &ws] { linear_heads(ws, {a, x_stride}, m, T, heads, o, out_stride); });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("w"), py::arg("heads"), py::arg("out").noconvert(),
      "A matrix for each head: out [T, heads * n][t, h, :rows / heads] = w[rows of h] x [T, heads * m][t, h, :cols].");
}

void bind_products(py::module_& m) {
  bind_matrices(m);
  bind_matrix_of_heads(m);
}

void bind_rows(py::module_& m) {
  m.def(
      "rms_norm",
      [](Workspace& ws, const Array<float>& x, const Array<float>& weight, float eps, Array<float> out) {
        expect(x, "rms_norm x", {-1, -1});
        expect(weight, "rms_norm weight", {x.shape(1)});
        expect(out, "rms_norm out", {x.shape(0), x.shape(1)});
        const float *a = x.data(), *w = weight.data();
        float* o = out.mutable_data();
        const int T = int(x.shape(0)), cols = int(x.shape(1));
        run(ws, [=, &ws] { rms_norm(ws, a, w, eps, T, cols, o); });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("eps"),
      py::arg("out").noconvert());

  m.def(
      "soft_cap",
      [](Workspace& ws, float cap, Array<float> x) {
        if (!(cap > 0)) throw std::invalid_argument("soft_cap: expected a positive cap");
        float* p = x.mutable_data();
        const int64_t n = x.size();
        py::gil_scoped_release release;
        soft_cap(ws, cap, n, p);
      },
      py::arg("ws"), py::arg("cap"), py::arg("x").noconvert(), "x = cap * tanh(x / cap), in place.");

  m.def(
      "add_bias",
      [](Workspace& ws, const Array<float>& bias, Array<float> out) {
        expect(out, "add_bias out", {-1, -1});
        expect(bias, "bias", {out.shape(1)});
        const float* b = bias.data();
        float* o = out.mutable_data();
        const int T = int(out.shape(0)), cols = int(out.shape(1));
        run(ws, [=, &ws] { add_bias(ws, b, T, cols, o); });
      },
      py::arg("ws"), py::arg("bias").noconvert(), py::arg("out").noconvert(), "out [T, n] += bias [n].");

  m.def(
      "multiply",
      [](Workspace& ws, const Array<float>& factors, Array<float> out) {
        expect(out, "multiply out", {-1, -1});
        const int T = int(out.shape(0)), cols = int(out.shape(1));
        Factors f{factors.data(), 0, 1};
        if (factors.ndim() == 2) {
          expect(factors, "factors", {T, cols});
          f.per_row = size_t(cols);
        } else {
          f.step = factors.size() == 1 ? 0 : 1;
          expect(factors, "factors", {f.step ? cols : 1});
        }
        float* o = out.mutable_data();
        run(ws, [=, &ws] { multiply(ws, f, T, cols, o); });
      },
      py::arg("ws"), py::arg("factors").noconvert(), py::arg("out").noconvert(),
      "out [T, n] *= factors, [T, n], [n] or [1].");
}

void bind_sums(py::module_& m) {
  m.def(
      "combine",
      [](Workspace& ws, const Array<float>& parts, const Array<int32_t>& rows, const Array<float>& gates,
         Array<float> out) {
        check_combine(parts, rows, gates, out);
        const int32_t* r = rows.data();
        const float *p = parts.data(), *g = gates.data();
        float* o = out.mutable_data();
        const int T = int(rows.shape(0)), K = int(rows.shape(1)), cols = int(parts.shape(1));
        py::gil_scoped_release release;
        combine(ws, p, r, g, T, K, cols, o);
      },
      py::arg("ws"), py::arg("parts").noconvert(), py::arg("rows").noconvert(), py::arg("gates").noconvert(),
      py::arg("out").noconvert(), "out[t] = sum over k of gates[t, k] * parts[rows[t, k]]; rows below 0 are skipped.");

  m.def(
      "add_norm",
      [](Workspace& ws, const Array<float>& added, float scale, Array<float> x, const Array<float>& weight, float eps,
         Array<float> out) {
        expect(x, "add_norm x", {-1, -1});
        expect(added, "add_norm added", {x.shape(0), x.shape(1)});
        expect(weight, "add_norm weight", {x.shape(1)});
        expect(out, "add_norm out", {x.shape(0), x.shape(1)});
        const float *a = added.data(), *w = weight.data();
        float *to = x.mutable_data(), *o = out.mutable_data();
        const int T = int(x.shape(0)), cols = int(x.shape(1));
        run(ws, [=, &ws] { add_norm(ws, a, scale, to, w, eps, T, cols, o); });
      },
      py::arg("ws"), py::arg("added").noconvert(), py::arg("scale"), py::arg("x").noconvert(),
      py::arg("weight").noconvert(), py::arg("eps"), py::arg("out").noconvert(),
      "x += scale * added, and out = its RMS norm.");

  m.def(
      "add_rows",
      [](Workspace& ws, const Array<float>& x, float scale, const py::object& gate_weight, const py::object& gate_input,
         Array<float> out) {
        expect(x, "add_rows x", {-1, -1});
        expect(out, "add_rows out", {x.shape(0), x.shape(1)});
        const float *w = nullptr, *in = nullptr;
        if (!gate_weight.is_none()) {
          w = floats(gate_weight, "gate_weight", {x.shape(1)});
          in = floats(gate_input, "gate_input", {x.shape(0), x.shape(1)});
        }
        const float* a = x.data();
        float* o = out.mutable_data();
        const int T = int(x.shape(0)), cols = int(x.shape(1));
        run(ws, [=, &ws] { add_rows(ws, a, scale, w, in, T, cols, o); });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("scale"), py::arg("gate_weight"), py::arg("gate_input"),
      py::arg("out").noconvert(),
      "out += scale * sigmoid(gate_weight · gate_input) * x, without the sigmoid if these are None.");
}

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<Workspace, Held<Workspace>>(m, "Workspace", "Compute threads and scratch of one engine.")
      .def(py::init([](int threads, int max_rows, int max_cols, int max_hidden, int max_context, int head_dim,
                       int num_heads) {
             return Held<Workspace>(new Workspace(
                 threads, WorkspaceShape{max_rows, max_cols, max_hidden, max_context, head_dim, num_heads}));
           }),
           py::arg("threads"), py::arg("max_rows"), py::arg("max_cols"), py::arg("max_hidden"), py::arg("max_context"),
           py::arg("head_dim"), py::arg("num_heads") = 1)
      .def_static(
          "bytes",
          [](int threads, int max_rows, int max_cols, int max_hidden, int max_context, int head_dim, int num_heads) {
            return Workspace::bytes(threads, {max_rows, max_cols, max_hidden, max_context, head_dim, num_heads});
          },
          py::arg("threads"), py::arg("max_rows"), py::arg("max_cols"), py::arg("max_hidden"), py::arg("max_context"),
          py::arg("head_dim"), py::arg("num_heads") = 1, "Bytes that such a workspace takes.")
      .def(
          "place", [](Workspace& ws, int pos) { ws.notes.pos = pos; }, py::arg("pos"),
          "Sets the position of the token for which work is recorded or repeated.")
      .def("begin_noting", &Workspace::begin_noting, "From now on, work is recorded instead of run.")
      .def("end_noting", &Workspace::end_noting, "Ends the recording; returns its number.")
      .def(
          "repeat", [](const Workspace& ws, int noted) { ws.notes.repeat(noted); }, py::arg("noted"),
          py::call_guard<py::gil_scoped_release>(), "Runs recorded work.")
      .def(
          "forget", [](Workspace& ws, int noted) { ws.notes.forget(noted); }, py::arg("noted"), "Frees a recording.")
      .def_property_readonly(
          "noted", [](const Workspace& ws) { return ws.notes.size(); }, "How many steps all recordings have.");

  bind_products(m);
  bind_rows(m);
  bind_sums(m);
}

}  // namespace edgemoe
