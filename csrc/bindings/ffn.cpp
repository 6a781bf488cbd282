#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "cache.h"
#include "dense.h"
#include "expert.h"
#include "matrix.h"

namespace edgemoe {
namespace {

/// What an FFN's matrices must be for each other, and without a gate only for an activation that needs none.
void check_ffn(const ExpertView& w, Activation activation) {
  const bool gated = activation != Activation::kRelu2;
  if (w.gate.rows != (gated ? w.up.rows : 0) || (gated && w.gate.cols != w.up.cols) || w.down.cols != w.up.rows) {
    throw std::invalid_argument("ffn: the matrices do not fit each other or the activation");
  }
}

/// Biases of an expert among those of all, arrays [E, H], [E, H] and [E, D], or None for no gate's.
class ExpertBiases {
 public:
  ExpertBiases(const py::object& arrays, int d, int h) : d_(d), h_(h) {
    if (arrays.is_none()) return;
    const auto parts = arrays.cast<std::vector<py::object>>();
    if (parts.size() != 3) throw std::invalid_argument("biases: expected those of gate, up and down");
    for (int i = 0; i < 3; ++i) {
      if (!parts[size_t(i)].is_none()) all_[i] = floats(parts[size_t(i)], "biases", {-1, i < 2 ? h : d});
      if (all_[i]) count_ = std::min(count_, py::reinterpret_borrow<Array<float>>(parts[size_t(i)]).shape(0));
    }
  }

  FfnBiases of(py::ssize_t expert) const {
    if (expert >= count_) throw std::invalid_argument("biases: there is no such expert");
    const size_t e = size_t(expert);
    return {all_[0] ? all_[0] + e * size_t(h_) : nullptr, all_[1] ? all_[1] + e * size_t(h_) : nullptr,
            all_[2] ? all_[2] + e * size_t(d_) : nullptr};
  }

 private:
  int d_, h_;
  py::ssize_t count_ = PY_SSIZE_T_MAX;
  const float* all_[3] = {};
};

}  // namespace

void bind_ffn(py::module_& m) {
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
        py::gil_scoped_release release;
        run_ffns(ws, a, use.count, kind, {use});
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("gate"), py::arg("up"), py::arg("down"),
      py::arg("out").noconvert(), py::arg("hidden") = py::none(), py::arg("activation") = "swiglu",
      "out [T, D] = down(activation(gate x, up x)); hidden [T, H], if given, gets what down is applied to.");

  m.def(
      "expect_experts",
      [](Workspace& ws, const Cache& cache, int first, const Array<int32_t>& experts) {
        expect(experts, "experts", {-1});
        expect_within("first", first, 0, cache.num_experts() - 1);
        for (py::ssize_t i = 0; i < experts.size(); ++i) {
          expect_within("experts", experts.data()[i], 0, cache.num_experts() - 1 - first);
        }
        expect_experts(ws, cache, first, experts.data(), int(experts.size()));
      },
      py::arg("ws"), py::arg("cache"), py::arg("first"), py::arg("experts").noconvert(),
      "Experts first + experts[i] will probably be run next: threads that wait read the first of them. A hint, no "
      "more.");

  m.def(
      "expert_ffn",
      [](Workspace& ws, const Array<float>& x, const Cache& cache, const Array<int32_t>& experts,
         const Array<int8_t>& levels, const Array<int32_t>& offsets, const Array<int32_t>& tokens,
         const std::vector<int>& group, Array<float> parts, const py::object& hidden, const std::string& activation,
         const py::object& biases, const std::optional<Array<int8_t>>& basis, const py::object& projected) {
        const int d = cache.shape().hidden, h = cache.shape().expert_hidden;
        const Activation kind = activation_of(activation);
        const ExpertBiases all(biases, d, h);
        expect(x, "expert_ffn x", {-1, d});
        expect(experts, "experts", {-1});
        expect(levels, "levels", {experts.size()});
        expect(offsets, "offsets", {experts.size() + 1});
        expect(parts, "parts", {-1, d});
        const int32_t *o = offsets.data(), *t = tokens.data();
        const py::ssize_t T = x.shape(0), n = experts.size();
        int rank = 0;  // of what `basis` must have
        const float* z = projected.is_none() ? nullptr : floats(projected, "projected", {T, kMaxRank});
        float* inner = hidden.is_none() ? nullptr : writable(hidden, "hidden", {parts.shape(0), h});
        std::vector<FfnUse> uses;
        for (int i : group) {
          if (i < 0 || i >= n || o[i] < 0 || o[i + 1] <= o[i] || o[i + 1] > tokens.size() ||
              o[i + 1] > parts.shape(0)) {
            throw std::invalid_argument("expert_ffn: offsets do not fit tokens and parts");
          }
          for (int32_t j = o[i]; j < o[i + 1]; ++j) {
            if (t[j] < 0 || t[j] >= T) throw std::invalid_argument("expert_ffn: a token is outside x");
          }
          const int32_t e = experts.data()[i];
          uses.push_back({cache.view(e, levels.data()[i]), t + o[i], o[i + 1] - o[i],
                          parts.mutable_data() + size_t(o[i]) * d, inner ? inner + size_t(o[i]) * h : nullptr,
                          all.of(e % cache.shape().num_experts)});
          check_ffn(uses.back().w, kind);
          rank = std::max({rank, rank_of(uses.back().w.gate), rank_of(uses.back().w.up)});
        }
        const float* a = x.data();
        const int8_t* v = z ? nullptr : shared_basis(basis, rank, d);
        py::gil_scoped_release release;
        std::vector<float> own(v ? size_t(T) * kMaxRank : 0);
        if (v) project(ws, a, int(T), v, rank, d, own.data());
        for (FfnUse& use : uses) use.z = v ? own.data() : z;
        run_ffns(ws, a, int(T), kind, uses);
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("cache"), py::arg("experts").noconvert(),
      py::arg("levels").noconvert(), py::arg("offsets").noconvert(), py::arg("tokens").noconvert(), py::arg("group"),
      py::arg("parts").noconvert(), py::arg("hidden") = py::none(), py::arg("activation") = "swiglu",
      py::arg("biases") = py::none(), py::arg("basis").noconvert() = py::none(), py::arg("projected") = py::none(),
      "Runs the experts at positions `group` of a plan on their tokens; part rows are those of `offsets`, as are those "
      "of hidden [m, H], which gets what each w_down is applied to. biases: of all experts of the layer, gates' [E, "
      "H], "
      "ups' [E, H] and downs' [E, D]. basis: V [rank, padded columns] of gates and ups where they have corrections; "
      "projected: what `project` makes of x with it, if that was done before.");
}

}  // namespace edgemoe
