// The choice of codes for rows, given their scales, and the fit of the scales to the codes.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "quantize.h"

namespace edgemoe {

/// A level that counts in the objective.
struct Level {
  int bits;
  float weight;
  int scale;             ///< which of a row's scales it uses
  const float* moments;  ///< by which its error is measured: `moments` or `rest` of the objective, or null
};

/// Sixteen rows that are being quantised: the state that all steps below share.
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

/// Chooses the code of each weight by itself.
void round_rows(RowBlock* b, const std::vector<Level>& levels);

/// Refines codes for the error of the output; where a row has several scales, then scales and codes in turn.
void refine_rows(RowBlock* b, const std::vector<Level>& levels, const Objective& o);

}  // namespace edgemoe
