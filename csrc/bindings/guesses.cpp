#include "guesses.h"

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

}  // namespace

void bind_guesses(py::module_& m) {
  py::class_<RoundedRows, Held<RoundedRows>>(m, "RoundedRows", "A matrix in 8 bits with a scale per row, and a bias.")
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
          "out [rows] = the matrix times x [cols], plus the bias.");

  m.def(
      "times",
      [](const Array<float>& matrix, const Array<float>& x, Array<float>& out) {
        expect(matrix, "matrix", {-1, -1});
        expect(x, "x", {matrix.shape(1)});
        expect(out, "out", {matrix.shape(0)});
        const int rows = int(matrix.shape(0)), cols = int(matrix.shape(1));
        kernels().matmul_f32(matrix.data(), x.data(), 1, rows, cols, 0, rows, out.mutable_data());
      },
      py::arg("matrix").noconvert(), py::arg("x").noconvert(), py::arg("out").noconvert(),
      "out [rows] = a small matrix times x [cols], by the thread that calls and in the same order everywhere.");
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
      "weigh_rows",
      [](const Array<float>& rows, const Array<int32_t>& which, const Array<float>& weights, Array<float>& out) {
        expect(out, "out", {-1});
        expect(rows, "rows", {-1, out.size()});
        expect(weights, "weights", {which.size()});
        return weigh_rows(rows.data(), int(out.size()), within(which, "which", rows.shape(0)), weights.data(),
                          int(which.size()), out.mutable_data());
      },
      py::arg("rows").noconvert(), py::arg("which").noconvert(), py::arg("weights").noconvert(),
      py::arg("out").noconvert(), "Sets `out` to the weighted sum of rows; says whether anything in it is not 0.");
  m.def(
      "count_path",
      [](Array<float>& pairs, Array<float>& totals, Array<float>& uses, const Array<int32_t>& path) {
        expect(path, "path", {-1, -1});
        const py::ssize_t L = path.shape(0), K = path.shape(1);
        expect(totals, "totals", {L, -1});
        const py::ssize_t E = totals.shape(1);
        expect(uses, "uses", {L, E});
        expect(pairs, "pairs", {L, E, E});
        for (py::ssize_t i = 0; i < path.size(); ++i) expect_within("path", path.data()[i], 0, E - 1);
        count_path(pairs.mutable_data(), totals.mutable_data(), uses.mutable_data(), path.data(), int(L), int(E),
                   int(K));
      },
      py::arg("pairs").noconvert(), py::arg("totals").noconvert(), py::arg("uses").noconvert(),
      py::arg("path").noconvert(), "Counts a token's path [L, K] in the table of what follows what.");
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

}  // namespace edgemoe
