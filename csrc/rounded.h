// Rows of small numbers that predictors multiply one vector with, in a quarter of the memory.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"

namespace edgemoe {

/// A matrix [rows, cols] in signed bytes with a scale per row, and what is added to each row's product. Immutable.
class RoundedRows {
 public:
  /// matrix: finite floats; bias [rows].
  RoundedRows(const float* matrix, const float* bias, int rows, int cols);

  /// out [rows] = the matrix times x [cols], plus the bias. x is not rounded.
  void dot(const float* x, float* out) const;

  int rows() const { return rows_; }
  int cols() const { return cols_; }

 private:
  int rows_, cols_;
  Memory codes_;  ///< [rows rounded up to kMaxRank, basis_stride(cols)]
  std::vector<float> scales_, bias_;
};

}  // namespace edgemoe
