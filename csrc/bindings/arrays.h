// What all bindings share: how arrays are lent, checked and returned, and when objects are deleted.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "error.h"
#include "kernels/kernels.h"
#include "mixers/shapes.h"

namespace edgemoe {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::string shape_text(const Array<T>& a) {
  std::string s = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) s += (i ? ", " : "") + std::to_string(a.shape(i));
  return s + "]";
}

/// Throws std::invalid_argument unless `a` has the shape, where -1 matches anything, and is aligned. If it has several
/// axes, the length of each must fit an int.
template <class T>
void expect(const Array<T>& a, const char* name, std::initializer_list<py::ssize_t> shape) {
  for (py::ssize_t i = 0; a.ndim() > 1 && i < a.ndim(); ++i) expect_within(name, a.shape(i), 0, INT32_MAX);
  if (reinterpret_cast<uintptr_t>(a.data()) % alignof(T)) {
    throw std::invalid_argument(std::string(name) + ": expected an aligned array");
  }
  bool ok = a.ndim() == py::ssize_t(shape.size());
  py::ssize_t axis = 0;
  std::string wanted = "[";
  for (py::ssize_t n : shape) {
    if (ok && n >= 0) ok = a.shape(axis) == n;
    wanted += (axis ? ", " : "") + (n < 0 ? std::string("any") : std::to_string(n));
    ++axis;
  }
  if (!ok) throw std::invalid_argument(std::string(name) + ": expected shape " + wanted + "], got " + shape_text(a));
}

/// Throws unless `combine` can compute out [T, cols] from parts [any, cols] by rows and gates [T, K].
inline void check_combine(const Array<float>& parts, const Array<int32_t>& rows, const Array<float>& gates,
                          const Array<float>& out) {
  expect(parts, "parts", {-1, -1});
  expect(rows, "rows", {-1, -1});
  expect(gates, "gates", {rows.shape(0), rows.shape(1)});
  expect(out, "combine out", {rows.shape(0), parts.shape(1)});
  for (py::ssize_t i = 0; i < rows.size(); ++i) {
    if (rows.data()[i] >= parts.shape(0)) throw std::invalid_argument("combine: a row is outside parts");
  }
}

/// Returns the data of a contiguous float32 array, valid while the object lives. Throws py::type_error for any other
/// object: nothing is converted.
inline const float* floats(const py::object& array, const char* name, std::initializer_list<py::ssize_t> shape) {
  if (!py::isinstance<Array<float>>(array)) {
    throw py::type_error(std::string(name) + ": expected a contiguous float32 array");
  }
  const auto a = py::reinterpret_borrow<Array<float>>(array);
  expect(a, name, shape);
  return a.data();
}

/// V of matrices of `cols` columns that share it, [at least rank, padded columns]; null where none has a correction.
inline const int8_t* shared_basis(const std::optional<Array<int8_t>>& basis, int rank, int cols) {
  if (!rank) return nullptr;
  if (!basis) throw std::invalid_argument("basis: expected one for matrices with corrections, got None");
  expect(*basis, "basis", {-1, py::ssize_t(basis_stride(cols))});
  if (basis->shape(0) < rank) {
    throw std::invalid_argument("basis: expected " + std::to_string(rank) + " rows, got " +
                                std::to_string(basis->shape(0)));
  }
  return basis->data();
}

/// `floats` for an array that is written.
inline float* writable(const py::object& array, const char* name, std::initializer_list<py::ssize_t> shape) {
  floats(array, name, shape);
  return py::reinterpret_borrow<Array<float>>(array).mutable_data();
}

/// Throws std::invalid_argument for another name.
inline Activation activation_of(const std::string& name) {
  if (name == "swiglu") return Activation::kSwiglu;
  if (name == "geglu") return Activation::kGeglu;
  if (name == "clamped_swiglu") return Activation::kClampedSwiglu;
  if (name == "relu2") return Activation::kRelu2;
  throw std::invalid_argument("activation: expected swiglu, geglu, clamped_swiglu or relu2, got " + name);
}

/// Likewise.
inline Gate gate_named(const std::string& name) {
  if (name == "silu") return Gate::kSilu;
  if (name == "sigmoid") return Gate::kSigmoid;
  if (name == "silu_first") return Gate::kSiluFirst;
  throw std::invalid_argument("gated_norm: expected silu, sigmoid or silu_first, got " + name);
}

/// A deleter that does nothing in a forked child, as the object's threads and memory did not come along.
template <class T>
struct InItsProcess {
  pid_t pid = getpid();

  void operator()(T* object) const {
    if (getpid() == pid) delete object;
  }
};

template <class T>
using Held = std::unique_ptr<T, InItsProcess<T>>;

/// Returns a read-only numpy view of memory that `owner` keeps alive.
template <class T>
py::array_t<T> lend(const T* p, size_t n, py::handle owner) {
  py::array_t<T> a({py::ssize_t(n)}, {py::ssize_t(sizeof(T))}, p, owner);
  py::detail::array_proxy(a.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return a;
}

}  // namespace edgemoe
