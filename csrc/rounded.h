// Rows of small numbers that predictors multiply one vector with, in an eighth of the memory.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"

namespace edgemoe {

/// A matrix [rows, cols] in 4 bits with a scale per row, and what is added to each row's product. Immutable.
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
  Memory codes_;                      ///< as `RoundedTiles` has them
  std::vector<float> scales_, bias_;  ///< padded to whole blocks
};

}  // namespace edgemoe
