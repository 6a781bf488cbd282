#include "quantize.h"

#include <optional>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "matrix.h"

namespace edgemoe {

void bind_quantize(py::module_& m) {
  m.def(
      "quantize",
      [](const Array<float>& w, const std::vector<uint8_t>& widths, const std::vector<uint8_t>& row_scales,
         const Array<float>& level_weights, const Array<float>& squares, const std::optional<Array<float>>& moments,
         int sweeps, bool is_thorough, int threads, const std::optional<Array<float>>& rest, uint8_t corrected) {
        expect(w, "quantize", {-1, -1});
        expect(level_weights, "level_weights", {8});
        const int rows = int(w.shape(0)), cols = int(w.shape(1));
        check_widths(Scheme::kNested, widths);
        check_shape(rows, cols);
        const uint8_t scaled = check_row_scales(Scheme::kNested, row_scales);
        expect(squares, "squares", {cols});
        if (moments) expect(*moments, "moments", {cols, cols});
        if (rest) expect(*rest, "rest", {cols, cols});
        std::vector<py::array_t<uint8_t>> rungs;
        std::vector<uint8_t*> outs;
        for (size_t r = 0; r < widths.size(); ++r) {
          rungs.emplace_back(
              py::ssize_t(rung_bytes(Scheme::kNested, rows, cols, {widths[r], r == 0, (scaled >> r & 1) != 0})));
          outs.push_back(rungs.back().mutable_data());
        }
        const float* data = w.data();
        const Objective objective{level_weights.data(),
                                  moments ? moments->data() : nullptr,
                                  rest ? rest->data() : nullptr,
                                  corrected,
                                  squares.data(),
                                  sweeps,
                                  is_thorough};
        {
          py::gil_scoped_release release;
          ThreadPool pool(threads);
          quantize_nested(pool, data, rows, cols, widths, row_scales, objective, outs);
        }
        return rungs;
      },
      py::arg("w").noconvert(), py::arg("widths"), py::arg("row_scales"), py::arg("level_weights").noconvert(),
      py::arg("squares").noconvert(), py::arg("moments").noconvert(), py::arg("sweeps"), py::arg("thorough"),
      py::arg("threads"), py::arg("rest").noconvert() = py::none(), py::arg("corrected") = 0,
      "Quantises w [rows, cols] float32 and returns its rungs, one uint8 array each; see quantize.h.");
}

}  // namespace edgemoe
