// Matrices of predictors, to be multiplied with one vector, in an eighth of the memory of float32.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"

namespace edgemoe {

/// A matrix [rows, cols] in 4 bits with a scale per row, and a bias per row. Immutable.
class RoundedRows {
 public:
  /// matrix: finite floats; bias [rows].
  RoundedRows(const float* matrix, const float* bias, int rows, int cols);

  /// out [rows] = the matrix times x [cols], which is rounded to 8 bits, plus the bias.
  void dot(const float* x, float* out) const;

  int rows() const { return rows_; }
  int cols() const { return cols_; }

 private:
  int rows_, cols_, blocks_, steps_;
  Memory codes_;                      ///< laid out as in `RoundedTiles`
  std::vector<float> scales_, bias_;  ///< padded to whole blocks
};

}  // namespace edgemoe
