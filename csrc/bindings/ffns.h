// The inputs of FFNs besides activations: matrices, biases, bases of corrections; see ffn.cpp and chosen_ffn.cpp.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"
#include "dense.h"
#include "expert.h"
#include "matrix.h"

namespace edgemoe {

/// Throws std::invalid_argument unless an FFN's matrices fit each other, with a gate exactly where the activation needs
/// one.
inline void check_ffn(const ExpertView& w, Activation activation) {
  const bool gated = activation != Activation::kRelu2;
  if (w.gate.rows != (gated ? w.up.rows : 0) || (gated && w.gate.cols != w.up.cols) || w.down.cols != w.up.rows) {
    throw std::invalid_argument("ffn: the matrices do not fit each other or the activation");
  }
}

/// Gate, up and down.
using FfnMatrices = std::tuple<const Nested*, const Nested*, const Nested*>;

/// The biases of all experts of a layer: arrays [E, H], [E, H] and [E, D], each of which may be None.
class ExpertBiases {
 public:
  ExpertBiases(const py::object& arrays, int d, int h) : d_(d), h_(h) {
    if (arrays.is_none()) return;
    const auto parts = arrays.cast<std::vector<py::object>>();
    if (parts.size() != 3) throw std::invalid_argument("biases: expected those of gate, up and down");
    for (int i = 0; i < 3; ++i) {
      if (!parts[size_t(i)].is_none()) all_[i] = floats(parts[size_t(i)], "biases", {-1, i < 2 ? h : d});
      if (all_[i]) count_ = std::min(count_, py::reinterpret_borrow<Array<float>>(parts[size_t(i)]).shape(0));
    }
  }

  FfnBiases of(py::ssize_t expert) const {
    if (expert >= count_) throw std::invalid_argument("biases: there is no such expert");
    const size_t e = size_t(expert);
    return {all_[0] ? all_[0] + e * size_t(h_) : nullptr, all_[1] ? all_[1] + e * size_t(h_) : nullptr,
            all_[2] ? all_[2] + e * size_t(d_) : nullptr};
  }

 private:
  int d_, h_;
  py::ssize_t count_ = PY_SSIZE_T_MAX;
  const float* all_[3] = {};
};

/// A basis of corrections and its rows, null where there is none. Throws unless it is for matrices of `cols` columns.
struct BasisRows {
  const int8_t* v = nullptr;
  int rows = 0;

  BasisRows(const std::optional<Array<int8_t>>& basis, int cols) {
    if (!basis) return;
    expect(*basis, "basis", {-1, py::ssize_t(basis_stride(cols))});
    v = basis->data();
    rows = int(basis->shape(0));
  }
};

/// Runs FFNs on x [T, d]: experts, whose corrections may need a basis, and with `has_beside` a last one beside them.
/// z is `project` of x with the basis, or null.
inline void run_uses(Workspace& ws, const float* x, int T, int d, Activation kind, const BasisRows& basis,
                     const float* z, bool has_beside, std::vector<FfnUse>* uses) {
  const auto end = uses->end() - int(has_beside);
  int rank = 0;
  for (auto use = uses->begin(); use != end; ++use) rank = std::max({rank, rank_of(use->w.gate), rank_of(use->w.up)});
  const bool projects = rank > 0 && !z;
  if (projects && !basis.v) throw std::invalid_argument("basis: expected one for matrices with corrections, got None");
  if (projects && basis.rows < rank) {
    throw std::invalid_argument("basis: expected " + std::to_string(rank) + " rows, got " + std::to_string(basis.rows));
  }
  std::vector<float> own(projects ? size_t(T) * kMaxRank : 0);
  if (projects) project(ws, x, T, basis.v, rank, d, own.data());
  for (auto use = uses->begin(); use != end; ++use) use->z = projects ? own.data() : z;
  run_ffns(ws, x, T, kind, *uses);
}

/// The use of an FFN that all T tokens of width d go through. Its gate may be None.
inline FfnUse use_beside(const FfnMatrices& matrices, int T, int d, Activation kind, Array<float>& out) {
  const auto& [gate, up, down] = matrices;
  if (!up || !down) throw py::type_error("ffn: expected matrices, got None");
  FfnUse use{{gate ? gate->matrix : NestedMatrix{}, up->matrix, down->matrix}, nullptr, T, nullptr};
  check_ffn(use.w, kind);
  if (up->matrix.cols != d) throw std::invalid_argument("ffn: the matrices do not fit x");
  expect(out, "ffn out", {T, down->matrix.rows});
  use.out = out.mutable_data();
  return use;
}

}  // namespace edgemoe
