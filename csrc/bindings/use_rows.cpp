#include "use_rows.h"

#include <stdexcept>

#include "bindings/arrays.h"
#include "bindings/bindings.h"

namespace edgemoe {
namespace {

/// The rows of all layers, and the arrays that they are in.
class LiveRows {
 public:
  LiveRows(Array<double> raw, Array<double> now, Array<double> before)
      : raw_(std::move(raw)), now_(std::move(now)), before_(std::move(before)) {
    expect(raw_, "raw", {-1, 2, -1});
    layers_ = int(raw_.shape(0));
    experts_ = int(raw_.shape(2));
    expect_within("layers", layers_, 1, INT32_MAX);
    expect_within("experts", experts_, 1, INT32_MAX);
    for (const auto& [rows, name] : {std::pair{&now_, "now"}, {&before_, "before"}}) {
      expect(*rows, name, {layers_, 5, experts_});
    }
  }

  UseRows layer(int i) {
    expect_within("layer", i, 0, layers_ - 1);
    const size_t at = size_t(i) * size_t(experts_);
    return {raw_.mutable_data() + 2 * at, now_.mutable_data() + 5 * at, before_.mutable_data() + 5 * at, experts_};
  }

  /// Experts of the layer; throws unless there are some.
  const Array<int32_t>& chosen(const Array<int32_t>& experts, const char* name) const {
    expect(experts, name, {-1});
    expect_within(name, experts.size(), 1, INT32_MAX);
    for (py::ssize_t i = 0; i < experts.size(); ++i) expect_within(name, experts.data()[i], 0, experts_ - 1);
    return experts;
  }

  int num_experts() const { return experts_; }

 private:
  Array<double> raw_, now_, before_;
  int layers_, experts_;
};

}  // namespace

void bind_use_rows(py::module_& m) {
  py::class_<LiveRows>(m, "UseRows", "Rows of features of the experts of all layers; see csrc/use_rows.h.")
      .def(py::init<Array<double>, Array<double>, Array<double>>(), py::kw_only(), py::arg("raw").noconvert(),
           py::arg("now").noconvert(), py::arg("before").noconvert(),
           "Arrays [layers, 2, experts], and [layers, 5, experts] twice; they are written in place.")
      .def(
          "keep", [](LiveRows& f, int layer) { f.layer(layer).keep(); }, py::arg("layer"))
      .def(
          "token",
          [](LiveRows& f, int layer, const Array<int32_t>& chosen, const Array<float>& scores, double left,
             double share, const Array<double>& weights, Array<double>& odds) {
            const UseRows rows = f.layer(layer);
            f.chosen(chosen, "chosen");
            expect(scores, "scores", {f.num_experts()});
            expect(weights, "weights", {5});
            expect(odds, "odds", {f.num_experts()});
            rows.token(chosen.data(), int(chosen.size()), scores.data(), left, share, weights.data(),
                       odds.mutable_data());
          },
          py::arg("layer"), py::arg("chosen").noconvert(), py::arg("scores").noconvert(), py::arg("left"),
          py::arg("share"), py::arg("weights").noconvert(), py::arg("odds").noconvert(),
          "One token has passed a layer: moves its rows on, and writes the odds against use in logarithms.")
      .def(
          "weigh",
          [](LiveRows& f, int layer, const Array<int32_t>& chosen, const Array<int32_t>& against, double share,
             const Array<double>& weights, Array<double>& odds) {
            const UseRows rows = f.layer(layer);
            f.chosen(chosen, "chosen");
            f.chosen(against, "against");
            expect(weights, "weights", {5});
            expect(odds, "odds", {f.num_experts()});
            rows.weigh(chosen.data(), int(chosen.size()), against.data(), int(against.size()), share, weights.data(),
                       odds.mutable_data());
          },
          py::arg("layer"), py::arg("chosen").noconvert(), py::arg("against").noconvert(), py::arg("share"),
          py::arg("weights").noconvert(), py::arg("odds").noconvert(), "The same after `raw` was written.");
}

}  // namespace edgemoe
