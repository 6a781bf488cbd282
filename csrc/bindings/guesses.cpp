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

/// Throws unless all are experts of `n`.
const int32_t* within(const Array<int32_t>& experts, const char* name, py::ssize_t n) {
  expect(experts, name, {-1});
  for (py::ssize_t i = 0; i < experts.size(); ++i) expect_within(name, experts.data()[i], 0, n - 1);
  return experts.data();
}

/// The table of what followed what, and the arrays that it is in.
class LivePaths {
 public:
  LivePaths(Array<float> pairs, std::optional<Array<float>> far, Array<float> totals, Array<float> uses)
      : pairs_(std::move(pairs)), far_(std::move(far)), totals_(std::move(totals)), uses_(std::move(uses)) {
    expect(totals_, "totals", {-1, -1});
    const py::ssize_t L = totals_.shape(0), E = totals_.shape(1);
    expect_within("layers", L, 1, INT32_MAX);
    expect_within("experts", E, 1, INT32_MAX);
    expect(uses_, "uses", {L, E});
    expect(pairs_, "pairs", {L, E, E});
    if (far_) expect(*far_, "far", {L, E, E});
  }

  void count(const Array<int32_t>& path) {
    expect(path, "path", {layers(), -1});
    for (py::ssize_t i = 0; i < path.size(); ++i) expect_within("path", path.data()[i], 0, experts() - 1);
    table().count(path.data(), int(path.shape(1)));
  }

  bool follow(int layer, const Array<int32_t>& last, const std::optional<Array<int32_t>>& before, Array<float>& out) {
    expect_within("layer", layer, before ? 2 : 1, layers() - 1);
    expect(out, "out", {experts()});
    if (before && !far_) throw std::invalid_argument("before: the table has no pairs two layers apart");
    const int32_t* earlier = before ? within(*before, "before", experts()) : nullptr;
    return table().follow(layer, within(last, "last", experts()), int(last.size()), earlier,
                          before ? int(before->size()) : 0, out.mutable_data());
  }

 private:
  py::ssize_t layers() const { return totals_.shape(0); }
  py::ssize_t experts() const { return totals_.shape(1); }
  PathTable table() {
    return {pairs_.mutable_data(),  far_ ? far_->mutable_data() : nullptr,
            totals_.mutable_data(), uses_.mutable_data(),
            int(layers()),          int(experts())};
  }

  Array<float> pairs_;
  std::optional<Array<float>> far_;
  Array<float> totals_, uses_;
};

/// See `PrecisionRule::choose`; what it is given is looked at.
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
      "One token has run `chosen`: uses per token before it count `left` of what they did.");
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
      "Moves HOBBIT's records of a layer on by one token.");
}

void bind_path_scores(py::module_& m) {
  m.def(
      "follow_path",
      [](Array<double>& scores, Array<double>& late, const Array<int32_t>& chosen, const Array<double>& odds,
         Array<int32_t>& path, double now, double round, double penalty) {
        expect(scores, "scores", {-1});
        expect(late, "late", {scores.size()});
        expect(odds, "odds", {scores.size()});
        expect(path, "path", {-1});
        expect_within("path", path.size(), 0, scores.size());
        const int32_t* experts = within(chosen, "chosen", scores.size());
        const PathRow row{scores.mutable_data(), late.mutable_data(), int(scores.size())};
        return row.follow(experts, int(chosen.size()), odds.data(), path.mutable_data(), int(path.size()), now, round,
                          penalty);
      },
      py::arg("scores").noconvert(), py::arg("late").noconvert(), py::arg("chosen").noconvert(),
      py::arg("odds").noconvert(), py::arg("path").noconvert(), py::arg("now"), py::arg("round"), py::arg("penalty"),
      "Predicts what a layer runs next into `path`, likeliest first, and scores its experts by when they run.");
  m.def(
      "foresee_paths",
      [](Array<double>& scores, Array<double>& late, const Array<double>& odds, Array<int32_t>& paths, double now,
         double penalty) {
        expect(scores, "scores", {-1, -1});
        const py::ssize_t L = scores.shape(0), E = scores.shape(1);
        expect(late, "late", {L, E});
        expect(odds, "odds", {L, E});
        expect(paths, "paths", {L, -1});
        const py::ssize_t K = paths.shape(1);
        expect_within("paths", K, 0, E);
        for (py::ssize_t i = 0; i < L; ++i) {
          const PathRow row{scores.mutable_data() + i * E, late.mutable_data() + i * E, int(E)};
          row.foresee(odds.data() + i * E, paths.mutable_data() + i * K, int(K), now + double(i + 1), double(L),
                      penalty);
        }
      },
      py::arg("scores").noconvert(), py::arg("late").noconvert(), py::arg("odds").noconvert(),
      py::arg("paths").noconvert(), py::arg("now"), py::arg("penalty"),
      "Predicts what all layers run for the token that is next; see `follow_path`.");
  m.def(
      "expect_uses",
      [](Array<double>& scores, const Array<double>& odds, double now, double round) {
        expect(scores, "scores", {-1});
        expect(odds, "odds", {scores.size()});
        double* out = scores.mutable_data();
        for (py::ssize_t i = 0; i < odds.size(); ++i) out[i] = odds.data()[i] * -round - (now + round);
      },
      py::arg("scores").noconvert(), py::arg("odds").noconvert(), py::arg("now"), py::arg("round"),
      "Scores a layer's experts by when they run again, by the odds against that whenever the layer runs.");
}

void bind_odds(py::module_& m) {
  m.def(
      "lacking",
      [](const Array<int32_t>& experts, const Array<int8_t>& has, int level, int first) {
        expect(has, "has", {-1});
        const int32_t* some = within(experts, "experts", has.size());
        std::vector<int32_t> found;
        for (py::ssize_t i = 0; i < experts.size(); ++i) {
          if (has.data()[some[i]] < level) found.push_back(first + some[i]);
        }
        return Array<int32_t>(py::ssize_t(found.size()), found.data());
      },
      py::arg("experts").noconvert(), py::arg("has").noconvert(), py::arg("level"), py::arg("first"),
      "Those of a layer's experts that have less than a level, as first + expert.");
  m.def(
      "mix_odds",
      [](const Array<double>& habit, const Array<float>& text, const Array<double>& weights, Array<double>& out) {
        expect(weights, "weights", {3});
        for (const auto& [n, name] : {std::pair{text.size(), "text"}, {out.size(), "out"}}) {
          if (n != habit.size()) throw std::invalid_argument(std::string(name) + ": expected as many as of habit");
        }
        expect_within("habit", habit.size(), 0, INT32_MAX);
        mix_odds(habit.data(), text.data(), int(habit.size()), weights.data(), out.mutable_data());
      },
      py::arg("habit").noconvert(), py::arg("text").noconvert(), py::arg("weights").noconvert(),
      py::arg("out").noconvert(), "Weighs odds by habit and by the text, of any shape, all in logarithms.");
  m.def(
      "raise_odds",
      [](Array<double>& odds) {
        expect(odds, "odds", {-1});
        expect_within("odds", odds.size(), 0, INT32_MAX);
        raise_odds(odds.mutable_data(), int(odds.size()));
      },
      py::arg("odds").noconvert(), "Turns odds in logarithms into odds, in place; above e^20 they are all the same.");
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
      "The experts of the highest scores above 0 that have less than they are wanted at, highest first.");
}

void bind_path_table(py::module_& m) {
  py::class_<LivePaths>(m, "PathTable", "What followed what; see csrc/guesses.h.")
      .def(py::init<Array<float>, std::optional<Array<float>>, Array<float>, Array<float>>(), py::kw_only(),
           py::arg("pairs").noconvert(), py::arg("far").noconvert(), py::arg("totals").noconvert(),
           py::arg("uses").noconvert(),
           "Arrays [layers, experts, experts], the same or None, [layers, experts] twice; they are written in place.")
      .def("count", &LivePaths::count, py::arg("path").noconvert(), "Counts a token's path [layers, k].")
      .def("follow", &LivePaths::follow, py::arg("layer"), py::arg("last").noconvert(), py::arg("before").noconvert(),
           py::arg("out").noconvert(),
           "Scores a layer's experts by what ran in the layer before and, if given, in the one before that; says "
           "whether any is not 0.");
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
          "The bits of a token's best experts; `has` are the levels of all in memory.")
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
          "Experts that are not skipped, as first + expert, their bits, and whether any lacks some of them; without "
          "gates all at the high ones.");
}

}  // namespace

void bind_guesses(py::module_& m) {
  bind_rounded_rows(m);
  bind_records(m);
  bind_path_scores(m);
  bind_odds(m);
  bind_path_table(m);
  bind_precision_rule(m);
}

}  // namespace edgemoe
