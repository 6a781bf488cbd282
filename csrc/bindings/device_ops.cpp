// A device's workspace, and operations on rows; see bindings/ops.cpp.
#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/device_arrays.h"
#include "device/workspace.h"

namespace edgemoe {
namespace {

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

/// Copies device arrays to numpy arrays after all queued work; throws RangeError for what attention could not store.
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

void bind_workspace(py::module_& m) {
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
          "Bytes of device memory that such a workspace takes.")
      .def("place", &DeviceWorkspace::place, py::arg("pos"),
           "Sets the position of the token for which work is recorded or repeated.")
      .def("begin_noting", &DeviceWorkspace::begin_noting, "From now on, work is recorded instead of run.")
      .def("end_noting", &DeviceWorkspace::end_noting, "Ends the recording; returns its number.")
      .def(
          "repeat", [](DeviceWorkspace& ws, int noted) { return ws.space().repeat(noted); }, py::arg("noted"),
          "Queues recorded work; returns whether it posts something.")
      .def(
          "forget", [](DeviceWorkspace& ws, int noted) { ws.space().forget(noted); }, py::arg("noted"),
          "Frees a recording.");
}

void bind_copies(py::module_& m) {
  m.def("device_download", &download, py::arg("ws"), py::arg("arrays"), py::arg("outs").noconvert(),
        "Waits for all queued work and copies arrays to the host. Throws RangeError if attention could not store a key "
        "or value.");
  m.def("device_post", &post, py::arg("ws"), py::arg("arrays"),
        "Queues the sending of arrays to the host. Returns False, and queues nothing, if they do not fit the mailbox.");
  m.def("device_collect", &collect, py::arg("ws"), py::arg("outs").noconvert(),
        "Waits for what was posted and copies it to outs; throws like device_download.");
}

void bind_device_rows(py::module_& m) {
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
  m.def("device_multiply", &multiply_on, py::arg("ws"), py::arg("factors"), py::arg("out"));
  m.def("device_weigh", &weigh_on, py::arg("ws"), py::arg("x"), py::arg("gates").noconvert(), py::arg("out"));
}

}  // namespace

void bind_device_ops(py::module_& m) {
  bind_workspace(m);
  bind_copies(m);
  bind_device_rows(m);
}

}  // namespace edgemoe
