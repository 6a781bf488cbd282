#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "cache.h"

namespace edgemoe {
namespace {

/// The levels of some precisions; 0 for a precision that the cache has no level of.
Array<int8_t> levels_of(const Cache& cache, const Array<int8_t>& bits) {
  expect(bits, "bits", {-1});
  Array<int8_t> levels(bits.size());
  int8_t* out = levels.mutable_data();
  for (py::ssize_t i = 0; i < bits.size(); ++i) {
    expect_within("bits", bits.data()[i], 0, 8);
    out[i] = cache.level_of_bits(bits.data()[i]);
  }
  return levels;
}

/// Opens a request for what a plan wants of a layer, in place of one that may be open. Returns its experts, numbered as
/// in the file, and their levels.
py::tuple ask(Cache& c, int layer, const Array<int32_t>& experts, const Array<int8_t>& bits,
              const Array<int32_t>& offsets, int num_tokens, const std::optional<Array<int32_t>>& ahead,
              const std::optional<Array<int8_t>>& ahead_bits) {
  const int E = c.shape().num_experts;
  expect_within("layer", layer, 0, c.shape().num_layers - 1);
  expect(experts, "experts", {-1});
  expect(bits, "bits", {experts.size()});
  expect(offsets, "offsets", {experts.size() + 1});
  Array<int32_t> numbered(experts.size());
  int32_t* out = numbered.mutable_data();
  for (py::ssize_t i = 0; i < experts.size(); ++i) {
    expect_within("experts", experts.data()[i], 0, E - 1);
    out[i] = layer * E + experts.data()[i];
  }
  const Array<int8_t> levels = levels_of(c, bits);
  const Wish now{numbered.data(), levels.data(), int(experts.size())};
  if (ahead.has_value() != ahead_bits.has_value()) {
    throw std::invalid_argument("ask: expected experts ahead and their bits together");
  }
  Wish later{nullptr, nullptr, 0};
  Array<int8_t> later_levels;
  if (ahead) {
    expect(*ahead, "ahead", {-1});
    expect(*ahead_bits, "ahead_bits", {ahead->size()});
    later_levels = levels_of(c, *ahead_bits);
    later = {ahead->data(), later_levels.data(), int(ahead->size())};
  }
  {
    const int32_t* o = offsets.data();
    py::gil_scoped_release release;
    c.close();
    c.begin(now, o, num_tokens, later);
  }
  return py::make_tuple(numbered, levels);
}

}  // namespace

void bind_cache_requests(const py::object& cache_class) {
  py::reinterpret_borrow<py::class_<Cache, Held<Cache>>>(cache_class)
      .def(
          "begin",
          [](Cache& c, const Array<int32_t>& experts, const Array<int8_t>& levels, const Array<int32_t>& offsets,
             int num_tokens, const std::optional<Array<int32_t>>& ahead,
             const std::optional<Array<int8_t>>& ahead_levels) {
            expect(experts, "experts", {-1});
            expect(levels, "levels", {experts.size()});
            expect(offsets, "offsets", {experts.size() + 1});
            Wish later{nullptr, nullptr, 0};
            if (ahead.has_value() != ahead_levels.has_value()) {
              throw std::invalid_argument("begin: expected experts ahead and their levels together");
            }
            if (ahead) {
              expect(*ahead, "ahead", {-1});
              expect(*ahead_levels, "ahead_levels", {ahead->size()});
              later = {ahead->data(), ahead_levels->data(), int(ahead->size())};
            }
            const Wish now{experts.data(), levels.data(), int(experts.size())};
            const int32_t* o = offsets.data();
            py::gil_scoped_release release;
            c.begin(now, o, num_tokens, later);
          },
          py::arg("experts").noconvert(), py::arg("levels").noconvert(), py::arg("offsets").noconvert(),
          py::arg("num_tokens"), py::arg("ahead").noconvert() = py::none(),
          py::arg("ahead_levels").noconvert() = py::none())
      .def("ask", &ask, py::arg("layer"), py::arg("experts").noconvert(), py::arg("bits").noconvert(),
           py::arg("offsets").noconvert(), py::arg("num_tokens"), py::arg("ahead").noconvert() = py::none(),
           py::arg("ahead_bits").noconvert() = py::none(),
           "Begins a request for what a plan wants; a request that is open is closed. Returns the plan's experts by "
           "their numbers in the file, and their levels.")
      .def("next",
           [](Cache& c) {
             std::vector<int> group;
             {
               py::gil_scoped_release release;
               c.next(&group);
             }
             return group;
           })
      .def(
          "count",
          [](Cache& c, const Array<int32_t>& experts, const Array<int8_t>& levels) {
            expect(experts, "experts", {-1});
            expect(levels, "levels", {experts.size()});
            c.count({experts.data(), levels.data(), int(experts.size())});
          },
          py::arg("experts").noconvert(), py::arg("levels").noconvert(),
          "Counts one token's uses of experts, layer after layer, that ran without a request.")
      .def("close", &Cache::close, py::call_guard<py::gil_scoped_release>())
      .def("shrink", &Cache::shrink, py::arg("expert"), py::arg("level"))
      .def("keep", &Cache::keep, py::arg("level"),
           "Where room is needed, experts are lowered to this level first. An expert is dropped as a whole only when "
           "none has more than that.")
      .def("set_budget", &Cache::set_budget, py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace edgemoe
