#include "guesses.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "matrix.h"
#include "rounded.h"

namespace edgemoe {
namespace {

/// Returns the data of `experts`; throws unless all are below `n`.
const int32_t* within(const Array<int32_t>& experts, const char* name, py::ssize_t n) {
  expect(experts, name, {-1});
  for (py::ssize_t i = 0; i < experts.size(); ++i) expect_within(name, experts.data()[i], 0, n - 1);
  return experts.data();
}

/// A `PathTable` and the arrays that it lies in.
class LivePaths {
 public:
  LivePaths(Array<float> pairs, std::optional<Array<float>> far, Array<float> totals, Array<float> uses)
      : pairs_(std::move(pairs)), far_(std::move(far)), totals_(std::move(totals)), uses_(std::move(uses)) {
    expect(totals_, "totals", {-1, -1});
    const py::ssize_t L = totals_.shape(0), E = totals_.shape(1);
    expect_within("layers", L, 1, INT32_MAX);
    expect_within("experts", E, 1, INT32_MAX);
    layers_ = int(L);
    experts_ = int(E);
    expect(uses_, "uses", {L, E});
    expect(pairs_, "pairs", {L, E, E});
    if (far_) expect(*far_, "far", {L, E, E});
  }

  void count(const Array<int32_t>& path) {
    expect(path, "path", {layers_, -1});
    for (py::ssize_t i = 0; i < path.size(); ++i) expect_within("path", path.data()[i], 0, experts_ - 1);
    table().count(path.data(), int(path.shape(1)));
  }

  bool follow(int layer, const Array<int32_t>& last, const std::optional<Array<int32_t>>& before, Array<float>& out) {
    expect_within("layer", layer, before ? 2 : 1, layers_ - 1);
    expect(out, "out", {experts_});
    if (before && !far_) throw std::invalid_argument("before: the table has no pairs two layers apart");
    const int32_t* earlier = before ? within(*before, "before", experts_) : nullptr;
    return table().follow(layer, within(last, "last", experts_), int(last.size()), earlier,
                          before ? int(before->size()) : 0, out.mutable_data());
  }

 private:
  PathTable table() {
    return {pairs_.mutable_data(),
            far_ ? far_->mutable_data() : nullptr,
            totals_.mutable_data(),
            uses_.mutable_data(),
            layers_,
            experts_};
  }

  Array<float> pairs_;
  std::optional<Array<float>> far_;
  Array<float> totals_, uses_;
  int layers_ = 0, experts_ = 0;  // of the shapes at first; whoever holds the arrays may reshape them
};

/// The `PathRow` of each layer, and the arrays that they lie in.
class LivePathRows {
 public:
  LivePathRows(Array<double> scores, Array<double> late, Array<int32_t> paths, Array<uint32_t> version, double penalty)
      : scores_(std::move(scores)),
        late_(std::move(late)),
        paths_(std::move(paths)),
        version_(std::move(version)),
        penalty_(penalty) {
    expect(scores_, "scores", {-1, -1});
    const py::ssize_t L = scores_.shape(0), E = scores_.shape(1);
    expect_within("layers", L, 1, INT32_MAX);
    expect_within("experts", E, 1, INT32_MAX / L);
    layers_ = int(L);
    experts_ = int(E);
    expect(late_, "late", {L, E});
    expect(paths_, "paths", {L, -1});
    expect_within("paths", paths_.shape(1), 0, E);
    count_ = int(paths_.shape(1));
    for (int i = 0; i < layers_; ++i) row(i);
    expect(version_, "version", {L});
  }

  /// See `PathRow::follow`. Returns how many of `chosen` had been predicted, and the predicted experts of the layers
  /// after this one and before `stop` that are resident at less than `level`.
  py::tuple follow(int layer, const Array<int32_t>& chosen, const Array<double>& odds, double now, int stop,
                   const Array<int8_t>& has, int level) {
    expect_within("layer", layer, 0, layers_ - 1);
    expect_within("stop", stop, 0, layers_);
    expect(odds, "odds", {experts_});
    expect(has, "has", {layers_, experts_});
    expect(chosen, "chosen", {-1, -1});
    const py::ssize_t k = chosen.shape(1), last = chosen.size() - k;
    expect_within("chosen", last, 0, INT32_MAX);
    for (py::ssize_t i = last; i < chosen.size(); ++i) expect_within("chosen", chosen.data()[i], 0, experts_ - 1);
    const int32_t* ran = chosen.data() + last;
    const int right = row(layer).follow(ran, int(k), odds.data(), now, double(layers_), penalty_);
    version_.mutable_data()[layer] += 1;
    std::vector<int32_t> lacking;
    for (int i = layer + 1; i < stop; ++i) {
      const int first = i * experts_;
      const PathRow later = row(i);
      for (int j = 0; j < later.count; ++j) {
        if (has.data()[first + later.path[j]] < level) lacking.push_back(first + later.path[j]);
      }
    }
    return py::make_tuple(right, Array<int32_t>(py::ssize_t(lacking.size()), lacking.data()));
  }

  void foresee(const Array<double>& odds, double now) {
    expect(odds, "odds", {layers_, experts_});
    for (int i = 0; i < layers_; ++i) {
      row(i).foresee(odds.data() + i * experts_, now + double(i + 1), double(layers_), penalty_);
      version_.mutable_data()[i] += 1;
    }
  }

 private:
  /// Throws unless the path, which others may have written, has experts of the layer.
  PathRow row(int layer) {
    const py::ssize_t at = py::ssize_t(layer) * experts_;
    int32_t* const path = paths_.mutable_data() + py::ssize_t(layer) * count_;
    for (int j = 0; j < count_; ++j) expect_within("paths", path[j], 0, experts_ - 1);
    return {scores_.mutable_data() + at, late_.mutable_data() + at, path, experts_, count_};
  }

  Array<double> scores_, late_;
  Array<int32_t> paths_;
  Array<uint32_t> version_;
  double penalty_;
  int layers_ = 0, experts_ = 0, count_ = 0;  // of the shapes at first; whoever holds the arrays may reshape them
};

/// `PrecisionRule::choose` with its arguments checked.
void choose(const PrecisionRule& rule, const Array<float>& gates, const Array<int32_t>& experts,
            const Array<int8_t>& has, int8_t* out) {
  expect(has, "has", {-1});
  expect(gates, "gates", {-1});
  const int32_t* some = within(experts, "experts", has.size());
  expect_within("experts", experts.size(), 0, gates.size());
  for (py::ssize_t i = 0; i < experts.size(); ++i) expect_within("has", has.data()[some[i]], 0, kMaxRungs);
  rule.choose(gates.data(), int(gates.size()), some, int(experts.size()), has.data(), out);
}

void bind_rounded_rows(py::module_& m) {
  py::class_<RoundedRows, Held<RoundedRows>>(m, "RoundedRows", "A matrix in 4 bits with a scale per row, and a bias.")
      .def(py::init([](const Array<float>& matrix, const Array<float>& bias) {
             expect(matrix, "matrix", {-1, -1});
             expect(bias, "bias", {matrix.shape(0)});
             check_shape(int(matrix.shape(0)), int(matrix.shape(1)));
             return Held<RoundedRows>(
                 new RoundedRows(matrix.data(), bias.data(), int(matrix.shape(0)), int(matrix.shape(1))));
           }),
           py::arg("matrix").noconvert(), py::arg("bias").noconvert())
      .def(
          "dot",
          [](const RoundedRows& w, const Array<float>& x, Array<float>& out) {
            expect(x, "x", {w.cols()});
            expect(out, "out", {w.rows()});
            w.dot(x.data(), out.mutable_data());
          },
          py::arg("x").noconvert(), py::arg("out").noconvert(),
          "out [rows] = the matrix times x [cols], which is rounded to 8 bits, plus the bias.");
}

void bind_records(py::module_& m) {
  m.def(
      "decay_uses",
      [](Array<double>& uses, const Array<int32_t>& chosen, double left) {
        expect(uses, "uses", {-1});
        const int32_t* experts = within(chosen, "chosen", uses.size());
        decay_uses(uses.mutable_data(), int(uses.size()), experts, int(chosen.size()), left);
      },
      py::arg("uses").noconvert(), py::arg("chosen").noconvert(), py::arg("left"),
      "Updates uses per token after a token that ran `chosen`: uses = left * uses + (1 - left) * chosen.");
  m.def(
      "renew_records",
      [](Array<double>& records, Array<double>& last, const Array<int32_t>& chosen, const Array<int8_t>& bits,
         const Array<double>& worth, double now) {
        expect(records, "records", {-1});
        expect(last, "last", {records.size()});
        const int32_t* experts = within(chosen, "chosen", records.size());
        expect(bits, "bits", {chosen.size()});
        expect(worth, "worth", {9});
        for (py::ssize_t i = 0; i < bits.size(); ++i) expect_within("bits", bits.data()[i], 0, 8);
        renew_records(records.mutable_data(), last.mutable_data(), experts, bits.data(), int(chosen.size()),
                      worth.data(), now);
      },
      py::arg("records").noconvert(), py::arg("last").noconvert(), py::arg("chosen").noconvert(),
      py::arg("bits").noconvert(), py::arg("worth").noconvert(), py::arg("now"),
      "Updates HOBBIT's records of a layer after a token.");
}

void bind_odds(py::module_& m) {
  m.def(
      "expect_uses",
      [](Array<double>& scores, const Array<double>& odds, double now, double round) {
        expect(scores, "scores", {-1});
        expect(odds, "odds", {scores.size()});
        expect_within("scores", scores.size(), 0, INT32_MAX);
        kernels().moments(odds.data(), int(odds.size()), round, now + round, scores.mutable_data());
      },
      py::arg("scores").noconvert(), py::arg("odds").noconvert(), py::arg("now"), py::arg("round"),
      "scores = minus the moments at which a layer's experts are expected to run again: now + (1 + odds) * round, with "
      "the odds against their use.");
  m.def(
      "mix_odds",
      [](const Array<double>& habit, const Array<float>& text, const Array<double>& weights, Array<double>& out) {
        expect(weights, "weights", {3});
        for (const auto& [n, name] : {std::pair{text.size(), "text"}, {out.size(), "out"}}) {
          if (n != habit.size()) throw std::invalid_argument(std::string(name) + ": expected as many as of habit");
        }
        expect_within("habit", habit.size(), 0, INT32_MAX);
        kernels().mix_odds(habit.data(), text.data(), int(habit.size()), weights.data(), out.mutable_data());
      },
      py::arg("habit").noconvert(), py::arg("text").noconvert(), py::arg("weights").noconvert(),
      py::arg("out").noconvert(), "out = weights [3] times one, habit and text: odds in logarithms, of any shape.");
  m.def(
      "likeliest",
      [](const Array<float>& scores, const Array<int8_t>& has, const Array<int8_t>& wanted, int most) {
        expect(scores, "scores", {-1});
        expect(has, "has", {scores.size()});
        expect(wanted, "wanted", {scores.size()});
        expect_within("most", most, 0, INT32_MAX);
        std::vector<int32_t> found(size_t(std::min<py::ssize_t>(most, scores.size())));
        found.resize(size_t(
            likeliest(scores.data(), has.data(), wanted.data(), int(scores.size()), found.data(), int(found.size()))));
        return Array<int32_t>(py::ssize_t(found.size()), found.data());
      },
      py::arg("scores").noconvert(), py::arg("has").noconvert(), py::arg("wanted").noconvert(), py::arg("most"),
      "At most `most` experts: those with the highest scores above 0, highest first, of all whose level `has` is below "
      "`wanted`.");
}

void bind_paths(py::module_& m) {
  py::class_<LivePathRows>(m, "PathRows", "What ExpertFlow predicts for all layers; see csrc/guesses.h.")
      .def(py::init<Array<double>, Array<double>, Array<int32_t>, Array<uint32_t>, double>(), py::kw_only(),
           py::arg("scores").noconvert(), py::arg("late").noconvert(), py::arg("paths").noconvert(),
           py::arg("version").noconvert(), py::arg("penalty"),
           "scores and late [layers, experts], paths [layers, k] and version [layers] are written in place. paths has "
           "the predicted experts of each layer, version is incremented with every change of a layer's scores, and "
           "late must be 0 at first.")
      .def("follow", &LivePathRows::follow, py::arg("layer"), py::arg("chosen").noconvert(),
           py::arg("odds").noconvert(), py::arg("now"), py::arg("stop"), py::arg("has").noconvert(), py::arg("level"),
           "Updates a layer's predictions and scores after it ran `chosen` [T, k], of which the last row counts. "
           "Returns how many of these had been predicted, and the predicted experts of the layers from the next one to "
           "`stop` (exclusive) that are below `level`, as layer * experts + expert.")
      .def("foresee", &LivePathRows::foresee, py::arg("odds").noconvert(), py::arg("now"),
           "Predicts again for all layers, once the next token is known.");
  py::class_<LivePaths>(m, "PathTable", "Counts of which expert followed which; see csrc/guesses.h.")
      .def(py::init<Array<float>, std::optional<Array<float>>, Array<float>, Array<float>>(), py::kw_only(),
           py::arg("pairs").noconvert(), py::arg("far").noconvert(), py::arg("totals").noconvert(),
           py::arg("uses").noconvert(),
           "pairs [layers, experts, experts], far of the same shape or None, totals and uses [layers, experts]; they "
           "are written in place.")
      .def("count", &LivePaths::count, py::arg("path").noconvert(), "Counts a token's path [layers, k].")
      .def("follow", &LivePaths::follow, py::arg("layer"), py::arg("last").noconvert(), py::arg("before").noconvert(),
           py::arg("out").noconvert(),
           "Scores a layer's experts by what ran in the layer before and, if given, in the one before that. Returns "
           "whether any score is not 0.");
}

void bind_precision_rule(py::module_& m) {
  py::class_<PrecisionRule>(m, "PrecisionRule", "HOBBIT's choice of precisions.")
      .def(py::init([](const std::vector<int>& level_bits, int low, int high, bool strict) {
             expect_within("levels", py::ssize_t(level_bits.size()), 1, kMaxRungs);
             PrecisionRule rule{0.0, 0.0, low, high, {}, strict};
             for (size_t i = 0; i < level_bits.size(); ++i) {
               expect_within("level_bits", level_bits[i], 1, 8);
               rule.bits_of[i + 1] = int8_t(level_bits[i]);
             }
             expect_within("low", low, 1, 8);
             expect_within("high", high, 1, 8);
             return rule;
           }),
           py::kw_only(), py::arg("level_bits"), py::arg("low"), py::arg("high"), py::arg("strict"))
      .def_readwrite("t1", &PrecisionRule::t1)
      .def_readwrite("t2", &PrecisionRule::t2)
      .def(
          "token",
          [](const PrecisionRule& rule, const Array<float>& gates, const Array<int32_t>& experts,
             const Array<int8_t>& has) {
            Array<int8_t> bits(experts.size());
            choose(rule, gates, experts, has, bits.mutable_data());
            return bits;
          },
          py::arg("gates").noconvert(), py::arg("experts").noconvert(), py::arg("has").noconvert(),
          "The bits of a token's best experts. `has`: the level of each expert of the layer.")
      .def(
          "ahead",
          [](const PrecisionRule& rule, const std::optional<Array<float>>& gates, const Array<int32_t>& experts,
             const Array<int8_t>& has, int first) {
            std::vector<int8_t> bits(size_t(experts.size()), int8_t(rule.high));
            if (gates) choose(rule, *gates, experts, has, bits.data());
            const int32_t* some = within(experts, "experts", has.size());
            std::vector<int32_t> ids;
            size_t kept = 0;
            bool is_missing = false;
            for (size_t i = 0; i < bits.size(); ++i) {
              is_missing = is_missing || bits[i] > rule.bits_of[size_t(has.data()[some[i]])];
              if (bits[i] == 0) continue;
              ids.push_back(first + some[i]);
              bits[kept++] = bits[i];
            }
            return py::make_tuple(Array<int32_t>(py::ssize_t(kept), ids.data()),
                                  Array<int8_t>(py::ssize_t(kept), bits.data()), is_missing);
          },
          py::arg("gates").noconvert(), py::arg("experts").noconvert(), py::arg("has").noconvert(), py::arg("first"),
          "Returns the experts that are not skipped, as first + expert, their bits, and whether any has fewer in "
          "memory. Without gates, all get the high bits.");
}

}  // namespace

void bind_guesses(py::module_& m) {
  bind_rounded_rows(m);
  bind_records(m);
  bind_odds(m);
  bind_paths(m);
  bind_precision_rule(m);
}

}  // namespace edgemoe
