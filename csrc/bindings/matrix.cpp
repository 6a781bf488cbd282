#include "matrix.h"

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "file.h"
#include "stored_rows.h"

namespace edgemoe {
namespace {

Held<Nested> from_rungs(const std::vector<Array<uint8_t>>& rungs, int rows, int cols,
                        const std::vector<uint8_t>& widths, const std::string& scheme,
                        const std::vector<uint8_t>& row_scales, const std::vector<uint8_t>& ranks,
                        const std::optional<Array<int8_t>>& basis) {
  check_shape(rows, cols);
  const int8_t* v = basis ? shared_basis(basis, highest_rank(ranks), cols) : nullptr;
  const Coding coding{scheme_named(scheme), row_scales, ranks, v};
  std::vector<RungBytes> bytes;
  for (const auto& r : rungs) {
    expect(r, "nested rung", {-1});
    bytes.push_back({r.data(), size_t(r.size())});
  }
  return Held<Nested>(nested_from_rungs(bytes, rows, cols, widths, coding).release());
}

Held<Nested> from_file(const std::shared_ptr<Arena>& arena, const std::shared_ptr<File>& file, uint64_t offset,
                       const std::vector<uint64_t>& lengths, const std::vector<uint32_t>& crcs, int rows, int cols,
                       const std::vector<uint8_t>& widths, bool verify, const std::string& name,
                       const std::string& scheme, const std::vector<uint8_t>& row_scales,
                       const std::vector<uint8_t>& ranks) {
  py::gil_scoped_release release;
  return Held<Nested>(nested_from_file(arena, *file, {offset, lengths, crcs}, rows, cols, widths, verify, name,
                                       {scheme_named(scheme), row_scales, ranks})
                          .release());
}

py::array_t<float> read_floats(const std::shared_ptr<File>& file, uint64_t offset,
                               const std::vector<py::ssize_t>& shape, uint32_t crc, bool verify,
                               const std::string& name) {
  py::array_t<float> out(shape);
  const size_t length = size_t(out.nbytes());
  float* to = out.mutable_data();
  py::gil_scoped_release release;
  read_f32(*file, offset, length, crc, verify, name, to);
  return out;
}

/// Throws unless `ids` are rows of a matrix and `out` has room for them.
void check_ids(const Array<int32_t>& ids, const Array<float>& out, int rows, int cols) {
  expect(ids, "ids", {-1});
  expect(out, "out", {ids.size(), cols});
  for (py::ssize_t i = 0; i < ids.size(); ++i) {
    if (ids.data()[i] < 0 || ids.data()[i] >= rows) {
      throw std::invalid_argument("decode_rows: row " + std::to_string(ids.data()[i]) + " is outside [0, " +
                                  std::to_string(rows) + ")");
    }
  }
}

Held<StoredRows> stored_rows(const std::shared_ptr<File>& file, uint64_t offset, const std::vector<uint64_t>& lengths,
                             const std::vector<uint32_t>& crcs, int rows, int cols, const std::vector<uint8_t>& widths,
                             const Nested* resident, bool verify, const std::string& name, const std::string& scheme,
                             const std::vector<uint8_t>& row_scales, const std::vector<uint8_t>& ranks) {
  py::gil_scoped_release release;
  return Held<StoredRows>(new StoredRows(file, {offset, lengths, crcs}, rows, cols, widths, resident, verify, name,
                                         {scheme_named(scheme), row_scales, ranks}));
}

void bind_file(py::module_& m) {
  py::class_<File, std::shared_ptr<File>>(m, "File", "A file opened for positioned, direct reads.")
      .def(py::init<std::string>(), py::arg("path"))  // bytes if it is not valid UTF-8
      .def_property_readonly("size", &File::size)
      .def_property_readonly("is_direct", &File::is_direct)
      .def("fileno", &File::fileno);

  py::class_<Arena, std::shared_ptr<Arena>>(m, "Arena", "Memory that several matrices share.")
      .def(py::init([](size_t bytes) { return std::shared_ptr<Arena>(new Arena(bytes), InItsProcess<Arena>()); }),
           py::arg("bytes"));
}

void bind_nested(py::module_& m) {
  py::class_<Nested, Held<Nested>>(m, "Nested", "A resident nested matrix [rows, cols].")
      .def_static("from_rungs", &from_rungs, py::arg("rungs").noconvert(), py::arg("rows"), py::arg("cols"),
                  py::arg("widths"), py::arg("scheme") = "nested", py::arg("row_scales") = std::vector<uint8_t>{1},
                  py::arg("ranks") = std::vector<uint8_t>{}, py::arg("basis").noconvert() = py::none(),
                  "Copies rungs as `quantize` returns them. ranks: of their corrections. basis: V [rank, padded cols] "
                  "int8, unless it is at the end of the first rung.")
      .def_static("from_file", &from_file, py::arg("arena").none(false), py::arg("file").none(false), py::arg("offset"),
                  py::arg("lengths"), py::arg("crcs"), py::arg("rows"), py::arg("cols"), py::arg("widths"),
                  py::arg("verify"), py::arg("name"), py::arg("scheme") = "nested",
                  py::arg("row_scales") = std::vector<uint8_t>{1}, py::arg("ranks") = std::vector<uint8_t>{},
                  "Reads the rungs of a tensor into an arena.")
      .def_property_readonly("rows", [](const Nested& n) { return n.matrix.rows; })
      .def_property_readonly("cols", [](const Nested& n) { return n.matrix.cols; })
      .def_property_readonly("bits", [](const Nested& n) { return bits_of(n.matrix); })
      .def_property_readonly(
          "rank", [](const Nested& n) { return rank_of(n.matrix); }, "The rank of its correction; 0 for none.")
      .def_readonly("bytes", &Nested::bytes)
      .def(
          "first", [](const Nested& n, int rungs) { return Held<Nested>(first_rungs(n, rungs).release()); },
          py::arg("rungs"), "Its first rungs as a matrix, in the same memory.")
      .def("share_basis", &share_basis, py::arg("other"),
           "From now on uses the other matrix's V, if that is equal and lies in the same arena.")
      .def(
          "decode_rows",
          [](const Nested& n, const Array<int32_t>& ids, Array<float> out, float scale) {
            check_ids(ids, out, n.matrix.rows, n.matrix.cols);
            float* o = out.mutable_data();
            const int32_t* id = ids.data();
            py::gil_scoped_release release;
            for (py::ssize_t i = 0; i < ids.size(); ++i, o += n.matrix.cols) {
              decode_row(kernels(), n.matrix, id[i], o);
              for (int c = 0; scale != 1.0f && c < n.matrix.cols; ++c) o[c] *= scale;
            }
          },
          py::arg("ids").noconvert(), py::arg("out").noconvert(), py::arg("scale") = 1.0f,
          "Writes rows `ids` [n] int32, times scale, to out [n, cols] float32.");
}

void bind_stored_rows(py::module_& m) {
  py::class_<StoredRows, Held<StoredRows>>(
      m, "StoredRows",
      "Rows of a tensor at its highest level. Rungs that are not resident are read when a row is asked for.")
      .def(py::init(&stored_rows), py::arg("file").none(false), py::arg("offset"), py::arg("lengths"), py::arg("crcs"),
           py::arg("rows"), py::arg("cols"), py::arg("widths"), py::arg("resident"), py::arg("verify"), py::arg("name"),
           py::arg("scheme") = "nested", py::arg("row_scales") = std::vector<uint8_t>{1},
           py::arg("ranks") = std::vector<uint8_t>{},
           "resident: the tensor's first rungs, or None. With verify, all other rungs are checked once.")
      .def_static(
          "bytes_for",
          [](int rows, int cols, const std::vector<uint8_t>& widths, int resident, const std::string& scheme,
             const std::vector<uint8_t>& row_scales, const std::vector<uint8_t>& ranks) {
            return StoredRows::bytes_for(rows, cols, widths, resident, {scheme_named(scheme), row_scales, ranks});
          },
          py::arg("rows"), py::arg("cols"), py::arg("widths"), py::arg("resident"), py::arg("scheme") = "nested",
          py::arg("row_scales") = std::vector<uint8_t>{1}, py::arg("ranks") = std::vector<uint8_t>{},
          "Bytes that a StoredRows takes beside its resident rungs, of which there are `resident`.")
      .def_property_readonly("rows", &StoredRows::rows)
      .def_property_readonly("cols", &StoredRows::cols)
      .def_property_readonly("bytes", &StoredRows::bytes)
      .def(
          "decode_rows",
          [](StoredRows& r, const Array<int32_t>& ids, Array<float> out, float scale) {
            check_ids(ids, out, r.rows(), r.cols());
            float* o = out.mutable_data();
            py::gil_scoped_release release;
            r.decode(ids.data(), size_t(ids.size()), scale, o);
          },
          py::arg("ids").noconvert(), py::arg("out").noconvert(), py::arg("scale") = 1.0f,
          "Writes rows `ids` [n] int32, times scale, to out [n, cols] float32.");
}

void bind_floats(py::module_& m) {
  m.def("read_f32", &read_floats, py::arg("file").none(false), py::arg("offset"), py::arg("shape"), py::arg("crc"),
        py::arg("verify"), py::arg("name"), "Reads a float32 tensor, whose values must be finite.");
}

}  // namespace

void bind_matrix(py::module_& m) {
  bind_file(m);
  bind_nested(m);
  bind_stored_rows(m);
  bind_floats(m);
}

}  // namespace edgemoe
