// Experts that are chosen for one token and run without a request; see bindings/ffn.cpp.
#include <optional>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/ffns.h"
#include "bindings/work.h"
#include "cache.h"

namespace edgemoe {
namespace {

/// The experts that are chosen for one token of a layer, all of whose experts are resident.
struct ChosenFfns {
  Cache& cache;
  int first;  ///< the layer's first expert
  int count;
  const int32_t* chosen;
  const float* gates;
  const int8_t* levels;  ///< of all experts
  Activation kind;
  ExpertBiases biases;
  BasisRows basis;
  std::optional<FfnUse> beside;
  std::vector<int32_t> rows;  ///< of parts, in their order

  void run(Workspace& ws, const float* x, float* parts, float* out) const {
    const int d = cache.shape().hidden;
    std::vector<FfnUse> uses;
    std::vector<int32_t> experts;
    std::vector<int8_t> at;
    uses.reserve(size_t(count) + 1);
    for (int i = 0; i < count; ++i) {
      if (chosen[i] < 0 || chosen[i] >= cache.shape().num_experts) {
        throw std::invalid_argument("run_chosen: there is no such expert");
      }
      const int e = first + chosen[i];
      const auto w = cache.glance(e, levels[e], false);
      if (!w) throw std::logic_error("run_chosen: an expert is not there");
      uses.push_back({*w, nullptr, 1, parts + size_t(i) * d, nullptr, biases.of(chosen[i])});
      check_ffn(uses.back().w, kind);
      experts.push_back(e);
      at.push_back(levels[e]);
    }
    cache.count({experts.data(), at.data(), count});
    if (beside) uses.push_back(*beside);
    run_uses(ws, x, 1, d, kind, basis, nullptr, beside.has_value(), &uses);
    combine(ws, parts, rows.data(), gates, 1, count, d, out);
  }
};

}  // namespace

void bind_chosen_ffn(py::module_& m) {
  m.def(
      "run_chosen",
      [](Workspace& ws, const Array<float>& x, Cache& cache, int layer, const Array<int32_t>& chosen,
         const Array<float>& gates, const Array<int8_t>& levels, Array<float> parts, Array<float> out,
         const std::string& activation, const py::object& biases, const std::optional<Array<int8_t>>& basis,
         const std::optional<FfnMatrices>& beside, std::optional<Array<float>> beside_out) {
        const ExpertShape& s = cache.shape();
        expect(x, "run_chosen x", {1, s.hidden});
        expect(chosen, "chosen", {1, -1});
        expect(gates, "gates", {1, chosen.size()});
        expect(levels, "levels", {cache.num_experts()});
        expect(parts, "parts", {-1, s.hidden});
        expect(out, "run_chosen out", {1, s.hidden});
        expect_within("layer", layer, 0, cache.num_experts() / s.num_experts - 1);
        if (chosen.size() > parts.shape(0)) throw std::invalid_argument("run_chosen: parts are too few");
        if (beside.has_value() != beside_out.has_value()) throw py::type_error("run_chosen: beside wants beside_out");
        const Activation kind = activation_of(activation);
        ChosenFfns ffns{cache,
                        layer * s.num_experts,
                        int(chosen.size()),
                        chosen.data(),
                        gates.data(),
                        levels.data(),
                        kind,
                        ExpertBiases(biases, s.hidden, s.expert_hidden),
                        BasisRows(basis, s.hidden),
                        {},
                        {}};
        if (beside) ffns.beside = use_beside(*beside, 1, s.hidden, kind, *beside_out);
        for (int i = 0; i < ffns.count; ++i) ffns.rows.push_back(i);
        const float* a = x.data();
        float *p = parts.mutable_data(), *o = out.mutable_data();
        run(ws, [=, &ws] { ffns.run(ws, a, p, o); });
      },
      py::arg("ws"), py::arg("x").noconvert(), py::arg("cache"), py::arg("layer"), py::arg("chosen").noconvert(),
      py::arg("gates").noconvert(), py::arg("levels").noconvert(), py::arg("parts").noconvert(),
      py::arg("out").noconvert(), py::arg("activation"), py::arg("biases"), py::arg("basis").noconvert(),
      py::arg("beside") = py::none(), py::arg("beside_out").noconvert() = py::none(),
      "Does what `run_experts` does, without a request, for x [1, D] and the experts chosen [1, K] of a layer. These "
      "must be in memory at their `levels`, an array over all experts. Their uses are counted.");
}

}  // namespace edgemoe
