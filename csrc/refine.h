// Rows on their way to codes: what chooses the codes of a row, given its scales, and fits the scales to them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "quantize.h"

namespace edgemoe {

/// A level that counts.
struct Level {
  int bits;
  float weight;
  int scale;             ///< which of a row's scales it uses
  const float* moments;  ///< what its error is judged by: one of the objective's, or null
};

/// Sixteen rows on their way to codes: what all steps below share.
struct RowBlock {
  const float* w;  ///< [16, cols], rows beyond the matrix are zero
  int cols;
  int num_scales;                         ///< of a row
  uint16_t halves[kMaxRungs][kTileRows];  ///< row scales as they are stored
  float units[kMaxRungs][kTileRows];      ///< step of a code with relative scale 1
  std::vector<float> steps;               ///< [16, groups] relative scales: a code's step is unit * this
  std::vector<float> middles;             ///< [16, groups] in steps, such that w = step * (code + 0.5 + middle)
  std::vector<uint8_t> bytes;             ///< [16, groups] scale and middle as they are stored
  std::vector<uint8_t> codes;             ///< [16, cols]

  int groups() const { return blocks(cols, kGroup); }
};

/// Chooses codes weight by weight.
void round_rows(RowBlock* b, const std::vector<Level>& levels);

/// Refines codes for the error of the output, and row scales and codes in turns where a row has several.
void refine_rows(RowBlock* b, const std::vector<Level>& levels, const Objective& o);

}  // namespace edgemoe
