// Experts on a device: those of a plan, and those that the device chooses by itself; see bindings/ffn.cpp.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/device_arrays.h"
#include "cache.h"
#include "device/stream.h"
#include "device/workspace.h"

namespace edgemoe {
namespace {

/// What a layer's experts have in common, and their biases.
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

  /// The use of a pinned expert, with its matrices on the device if `there`, else in host memory.
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

/// Runs the experts at positions `group` of a plan, all of which are pinned: in a cache on the device or, with
/// `stream`, in the host's cache, from which they pass through the stream.
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
  std::vector<int> of;  // the position in the plan of each
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

/// Runs the experts that were chosen for one token, `first` + chosen [1, K], and combines their results. Returns false,
/// and does nothing, if the device lacks any of them. All in one call, because the device idles meanwhile. `counts`
/// [experts] grow by `weight` for those that ran.
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

void bind_device_experts(py::module_& m) {
  py::class_<DeviceTable, Held<DeviceTable>>(m, "DeviceTable",
                                             "Where a layer's experts lie, for kernels that choose them.")
      .def(
          py::init([](const std::shared_ptr<DeviceSpace>& device, const Cache& cache) {
            const ExpertShape& s = cache.shape();
            return Held<DeviceTable>(new DeviceTable{
                DeviceMemory(device, size_t(s.num_experts) * 3 * sizeof(NestedMatrix)), {}, s.expert_hidden, s.hidden});
          }),
          py::arg("device").none(false), py::arg("cache"))
      .def_static(
          "bytes", [](int num_experts) { return DeviceSpace::taken(size_t(num_experts) * 3 * sizeof(NestedMatrix)); },
          py::arg("num_experts"), "Bytes of device memory that a table takes.")
      .def("fill", &fill_table, py::arg("cache"), py::arg("layer"), py::arg("levels").noconvert(),
           "Fills the table with the experts of a layer, all of which must be in the cache.");

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
  m.def("device_can_choose", [](const RouteRule& rule) { return is_known(rule); }, py::arg("rule"));
  m.def("device_choose", &choose_on, py::arg("ws"), py::arg("rule"), py::arg("logits"), py::arg("bias"),
        py::arg("choice_bias"), py::arg("experts"), py::arg("gates"));
  m.def("device_chosen_ffn", &chosen_ffn_on, py::arg("ws"), py::arg("x"), py::arg("table"), py::arg("experts"),
        py::arg("gates"), py::arg("parts"), py::arg("out"), py::arg("activation") = "swiglu",
        py::arg("biases") = std::vector<const DeviceArray*>());
}

}  // namespace edgemoe
