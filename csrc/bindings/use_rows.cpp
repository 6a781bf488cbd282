#include "use_rows.h"

#include <optional>
#include <utility>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "kernels/kernels.h"

namespace edgemoe {
namespace {

/// The `UseRows` of all layers, the odds that are computed from them, and the arrays that all of these lie in.
class LiveRows {
 public:
  LiveRows(Array<double> raw, Array<double> now, Array<double> before, Array<double> odds, Array<double> weights,
           double left, double share)
      : raw_(std::move(raw)),
        now_(std::move(now)),
        before_(std::move(before)),
        odds_(std::move(odds)),
        weights_(std::move(weights)),
        left_(left),
        share_(share) {
    expect(raw_, "raw", {-1, 2, -1});
    layers_ = int(raw_.shape(0));
    experts_ = int(raw_.shape(2));
    expect_within("layers", layers_, 1, INT32_MAX);
    expect_within("experts", experts_, 1, INT32_MAX);
    for (const auto& [rows, name] : {std::pair{&now_, "now"}, {&before_, "before"}}) {
      expect(*rows, name, {layers_, 5, experts_});
    }
    expect(odds_, "odds", {experts_});
    expect(weights_, "weights", {5});
    odds_.mutable_data();  // throws where it may not be written
  }

  void mix(Array<double> habit, Array<float> text, Array<double> weights) {
    expect(habit, "habit", {layers_, experts_});
    expect(text, "text", {layers_, experts_});
    expect(weights, "weights", {3});
    habit.mutable_data();
    text_ = Text{std::move(habit), std::move(text), std::move(weights)};
  }

  void token(int layer, const Array<int32_t>& chosen, const Array<float>& scores, bool keep) {
    const UseRows rows = of_layer(layer);
    expect(chosen, "chosen", {1, -1});
    expect(scores, "scores", {1, experts_});
    const int32_t* ran = some(chosen, "chosen");
    if (keep) rows.keep();
    rows.token(ran, int(chosen.size()), scores.data(), left_, share_, weights_.data(), logarithms(layer));
    raise(layer);
  }

  void weigh(int layer, const Array<int32_t>& chosen, const Array<int32_t>& against, bool keep) {
    const UseRows rows = of_layer(layer);
    expect(chosen, "chosen", {-1});
    expect(against, "against", {-1});
    const int32_t *ran = some(chosen, "chosen"), *lowest = some(against, "against");
    if (keep) rows.keep();
    rows.weigh(ran, int(chosen.size()), lowest, int(against.size()), share_, weights_.data(), logarithms(layer));
    raise(layer);
  }

 private:
  struct Text {
    Array<double> habit;
    Array<float> text;
    Array<double> weights;
  };

  UseRows of_layer(int i) {
    expect_within("layer", i, 0, layers_ - 1);
    const size_t at = size_t(i) * size_t(experts_);
    return {raw_.mutable_data() + 2 * at, now_.mutable_data() + 5 * at, before_.mutable_data() + 5 * at, experts_};
  }

  /// Returns the data of experts of a layer; throws unless there are any and all are in range.
  const int32_t* some(const Array<int32_t>& experts, const char* name) const {
    expect_within(name, experts.size(), 1, INT32_MAX);
    for (py::ssize_t i = 0; i < experts.size(); ++i) expect_within(name, experts.data()[i], 0, experts_ - 1);
    return experts.data();
  }

  /// Where the odds by habit are written.
  double* logarithms(int layer) {
    return text_ ? text_->habit.mutable_data() + size_t(layer) * size_t(experts_) : odds_.mutable_data();
  }

  void raise(int layer) {
    double* odds = odds_.mutable_data();
    if (text_) {
      const float* text = text_->text.data() + size_t(layer) * size_t(experts_);
      kernels().mix_odds(logarithms(layer), text, experts_, text_->weights.data(), odds);
    }
    kernels().powers(odds, experts_);
  }

  Array<double> raw_, now_, before_, odds_, weights_;
  double left_, share_;
  int layers_, experts_;
  std::optional<Text> text_;
};

}  // namespace

void bind_use_rows(py::module_& m) {
  py::class_<LiveRows>(m, "UseRows", "Features of the experts of all layers, in rows; see csrc/use_rows.h.")
      .def(py::init<Array<double>, Array<double>, Array<double>, Array<double>, Array<double>, double, double>(),
           py::kw_only(), py::arg("raw").noconvert(), py::arg("now").noconvert(), py::arg("before").noconvert(),
           py::arg("odds").noconvert(), py::arg("weights").noconvert(), py::arg("left"), py::arg("share"),
           "raw [layers, 2, experts], now and before [layers, 5, experts] and odds [experts] are written in place; "
           "weights [5] are read.")
      .def("mix", &LiveRows::mix, py::kw_only(), py::arg("habit").noconvert(), py::arg("text").noconvert(),
           py::arg("weights").noconvert(),
           "From now on, odds are weights [3] times one, the odds by the rows, which are written to habit [layers, "
           "experts], and text [layers, experts]; all in logarithms.")
      .def("token", &LiveRows::token, py::arg("layer"), py::arg("chosen").noconvert(), py::arg("scores").noconvert(),
           py::arg("keep"),
           "Updates a layer's rows after a token, for which it chose experts [1, k] by scores [1, experts], and writes "
           "the odds against use, at most e^20. With keep, `now` is copied to `before` first.")
      .def("weigh", &LiveRows::weigh, py::arg("layer"), py::arg("chosen").noconvert(), py::arg("against").noconvert(),
           py::arg("keep"), "The same after the caller wrote `raw`; chosen and against are [k].");
}

}  // namespace edgemoe
