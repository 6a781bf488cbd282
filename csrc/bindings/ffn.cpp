#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/ffns.h"
#include "bindings/work.h"
#include "cache.h"
#include "dense.h"
#include "expert.h"
#include "matrix.h"

namespace edgemoe {
namespace {

/// The FFNs of a plan, checked, so that groups of them can run without Python.
class PlannedFfns {
 public:
  PlannedFfns(const Cache& cache, const Array<float>& x, const Array<int32_t>& experts, const Array<int8_t>& levels,
              const Array<int32_t>& offsets, const Array<int32_t>& tokens, Array<float>& parts,
              const py::object& hidden, const std::string& activation, const py::object& biases,
              const std::optional<Array<int8_t>>& basis, const py::object& projected)
      : cache_(cache),
        d_(cache.shape().hidden),
        h_(cache.shape().expert_hidden),
        kind_(activation_of(activation)),
        biases_(biases, d_, h_),
        basis_(basis, d_) {
    expect(x, "expert_ffn x", {-1, d_});
    expect(experts, "experts", {-1});
    expect(levels, "levels", {experts.size()});
    expect(offsets, "offsets", {experts.size() + 1});
    expect(parts, "parts", {-1, d_});
    x_ = x.data();
    T_ = x.shape(0);
    count_ = experts.size();
    most_ = std::min(tokens.size(), parts.shape(0));
    experts_ = experts.data();
    levels_ = levels.data();
    offsets_ = offsets.data();
    tokens_ = tokens.data();
    parts_ = parts.mutable_data();
    if (!projected.is_none()) z_ = floats(projected, "projected", {T_, kMaxRank});
    if (!hidden.is_none()) hidden_ = writable(hidden, "hidden", {parts.shape(0), h_});
  }

  /// Adds an FFN that all tokens go through; the next `run` runs it too.
  void add(const FfnMatrices& matrices, Array<float>& out) { beside_ = use_beside(matrices, int(T_), d_, kind_, out); }

  /// Runs the experts at positions `group`, which are pinned.
  void run(Workspace& ws, const std::vector<int>& group) {
    uses_.clear();
    for (int i : group) {
      if (i < 0 || i >= count_ || offsets_[i] < 0 || offsets_[i + 1] <= offsets_[i] || offsets_[i + 1] > most_) {
        throw std::invalid_argument("expert_ffn: offsets do not fit tokens and parts");
      }
      const size_t first = size_t(offsets_[i]);
      for (int32_t j = offsets_[i]; j < offsets_[i + 1]; ++j) {
        if (tokens_[j] < 0 || tokens_[j] >= T_) throw std::invalid_argument("expert_ffn: a token is outside x");
      }
      uses_.push_back({cache_.view(experts_[i], levels_[i]), tokens_ + first, offsets_[i + 1] - offsets_[i],
                       parts_ + first * d_, hidden_ ? hidden_ + first * h_ : nullptr,
                       biases_.of(experts_[i] % cache_.shape().num_experts)});
      check_ffn(uses_.back().w, kind_);
    }
    if (beside_) uses_.push_back(*beside_);
    const bool has_beside = beside_.has_value();
    beside_.reset();
    run_uses(ws, x_, int(T_), d_, kind_, basis_, z_, has_beside, &uses_);
  }

 private:
  const Cache& cache_;
  const int d_, h_;
  const Activation kind_;
  const ExpertBiases biases_;
  const BasisRows basis_;
  const float *x_, *z_ = nullptr;
  float *parts_, *hidden_ = nullptr;
  const int32_t *experts_, *offsets_, *tokens_;
  const int8_t* levels_;
  py::ssize_t T_, count_, most_;
  std::vector<FfnUse> uses_;
  std::optional<FfnUse> beside_;
};

void bind_dense_ffn(py::module_& m) {
  m.def(
      "ffn",
      [](Workspace& ws, const Array<float>& x, const Nested* gate, const Nested& up, const Nested& down,
         Array<float> out, const py::object& hidden, const std::string& activation) {
        const Activation kind = activation_of(activation);
        FfnUse use{{gate ? gate->matrix : NestedMatrix{}, up.matrix, down.matrix}, nullptr, int(x.shape(0)), nullptr};
        check_ffn(use.w, kind);
        expect(x, "ffn x", {-1, up.matrix.cols});
        expect(out, "ffn out", {x.shape(0), down.matrix.rows});
        use.out = out.mutable_data();
        if (!hidden.is_none()) use.hidden = writable(hidden, "ffn hidden", {x.shape(0), up.matrix.rows});
        const float* a = x.data();
        run(ws, [=, &ws] { run_ffns(ws, a, use.count, kind, {use}); });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("gate"), py::arg("up"), py::arg("down"),
      py::arg("out").noconvert(), py::arg("hidden") = py::none(), py::arg("activation") = "swiglu",
      "out [T, D] = down(activation(gate x, up x)). hidden [T, H], if given, gets the input of down.");
}

void bind_expert_ffn(py::module_& m) {
  m.def(
      "expect_experts",
      [](Workspace& ws, const Cache& cache, int first, const Array<int32_t>& experts, int beside) {
        expect(experts, "experts", {-1});
        expect_within("first", first, 0, cache.num_experts() - 1);
        for (py::ssize_t i = 0; i < experts.size(); ++i) {
          expect_within("experts", experts.data()[i], 0, cache.num_experts() - 1 - first);
        }
        expect_experts(ws, cache, first, experts.data(), int(experts.size()), beside);
      },
      py::arg("ws"), py::arg("cache"), py::arg("first"), py::arg("experts").noconvert(), py::arg("beside") = 0,
      "A hint: experts first + experts[i] will probably run next, and beside them an FFN of `beside` hidden values. "
      "Threads that wait prefetch the first of them.");

  m.def(
      "expert_ffn",
      [](Workspace& ws, const Array<float>& x, const Cache& cache, const Array<int32_t>& experts,
         const Array<int8_t>& levels, const Array<int32_t>& offsets, const Array<int32_t>& tokens,
         const std::vector<int>& group, Array<float> parts, const py::object& hidden, const std::string& activation,
         const py::object& biases, const std::optional<Array<int8_t>>& basis, const py::object& projected) {
        PlannedFfns ffns(cache, x, experts, levels, offsets, tokens, parts, hidden, activation, biases, basis,
                         projected);
        py::gil_scoped_release release;
        ffns.run(ws, group);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("cache"), py::arg("experts").noconvert(),
      py::arg("levels").noconvert(), py::arg("offsets").noconvert(), py::arg("tokens").noconvert(), py::arg("group"),
      py::arg("parts").noconvert(), py::arg("hidden") = py::none(), py::arg("activation") = "swiglu",
      py::arg("biases") = py::none(), py::arg("basis").noconvert() = py::none(), py::arg("projected") = py::none(),
      "Runs the experts at positions `group` of a plan on their tokens, and writes the rows of parts that `offsets` "
      "gives them. hidden [m, H], if given, gets the input of each w_down in the same rows. biases: of gates [E, H], "
      "ups [E, H] and downs [E, D], of all experts of the layer. basis: V [rank, padded columns] of gates and ups that "
      "have corrections. projected: the result of `project` for x and this V, if it was computed before.");
}

void bind_run_experts(py::module_& m) {
  m.def(
      "run_experts",
      [](Workspace& ws, const Array<float>& x, Cache& cache, const Array<int32_t>& experts, const Array<int8_t>& levels,
         const Array<int32_t>& offsets, const Array<int32_t>& tokens, const Array<int32_t>& rows,
         const Array<float>& gates, Array<float> parts, Array<float> out, const std::string& activation,
         const py::object& biases, const std::optional<Array<int8_t>>& basis, const py::object& projected,
         const std::optional<FfnMatrices>& beside, std::optional<Array<float>> beside_out) {
        PlannedFfns ffns(cache, x, experts, levels, offsets, tokens, parts, py::none(), activation, biases, basis,
                         projected);
        if (beside.has_value() != beside_out.has_value()) throw py::type_error("run_experts: beside wants beside_out");
        if (beside) ffns.add(*beside, *beside_out);
        check_combine(parts, rows, gates, out);
        const float *p = parts.data(), *g = gates.data();
        const int32_t* r = rows.data();
        float* o = out.mutable_data();
        const int T = int(rows.shape(0)), K = int(rows.shape(1)), cols = int(parts.shape(1));
        py::gil_scoped_release release;
        const auto close = [](Cache* open) { open->close(); };
        const std::unique_ptr<Cache, decltype(close)> request(&cache, close);
        std::vector<int> group;
        if (beside && !cache.has_ready()) ffns.run(ws, group);  // while the first ones are read
        for (py::ssize_t left = experts.size(); left > 0; left -= py::ssize_t(group.size())) {
          cache.next(&group);
          if (group.empty()) break;
          ffns.run(ws, group);
          if (left == py::ssize_t(group.size())) break;
          py::gil_scoped_acquire python;  // more experts are being read: a signal need not wait for all of them
          if (PyErr_CheckSignals()) throw py::error_already_set();
        }
        combine(ws, p, r, g, T, K, cols, o);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("cache"), py::arg("experts").noconvert(),
      py::arg("levels").noconvert(), py::arg("offsets").noconvert(), py::arg("tokens").noconvert(),
      py::arg("rows").noconvert(), py::arg("gates").noconvert(), py::arg("parts").noconvert(),
      py::arg("out").noconvert(), py::arg("activation"), py::arg("biases"), py::arg("basis").noconvert(),
      py::arg("projected"), py::arg("beside") = py::none(), py::arg("beside_out").noconvert() = py::none(),
      "Runs `expert_ffn` for each group of the open request as it arrives, then `combine`, and closes the request. "
      "beside: the matrices of an FFN with the same activation, which runs on all of x. Its result is written to "
      "beside_out [T, D].");
}

}  // namespace

void bind_ffn(py::module_& m) {
  bind_dense_ffn(m);
  bind_expert_ffn(m);
  bind_run_experts(m);
}

}  // namespace edgemoe
