// Float weights to nested planes, as the .moe file holds them.
#pragma once

#include <cstdint>
#include <vector>

#include "threads.h"

namespace edgemoe {

/// What makes one code better than another.
struct Objective {
  /// [8] how much the squared error at 1 to 8 bits counts; not negative, some are not 0.
  const float* level_weights;
  /// [cols, cols] symmetric: the mean product of each two inputs, or null. With it, codes are refined for the error
  /// of the output: the sum over levels of weight * (W - Wb) moments (W - Wb)^T.
  const float* moments;
  /// The same without the part that a correction of the level makes up for, or null; where bit b - 1 of `corrected` is
  /// set, this judges the error at b bits.
  const float* rest;
  uint8_t corrected;
  /// [cols] the mean square of each input, positive; the diagonal of `moments` where it is given.
  const float* squares;
  /// Passes over the columns at most.
  int sweeps;
  /// Searches scales and middles of groups in full, as is done with `moments` anyway: several times the time.
  bool is_thorough = false;
};

/// Quantises w [rows, cols] and writes each rung of `widths` bits to outs[i], of rung_bytes. `row_scales` says which
/// rungs begin with scales of rows, as `check_row_scales` takes it; one that follows the last of `widths` tells that
/// what is above, and counts though it is not stored, has scales of its own. Throws std::invalid_argument, with outs
/// unspecified, when a weight is not finite or beyond float16, and when the objective is not what it says.
void quantize_nested(ThreadPool& pool, const float* w, int rows, int cols, const std::vector<uint8_t>& widths,
                     const std::vector<uint8_t>& row_scales, const Objective& objective,
                     const std::vector<uint8_t*>& outs);

}  // namespace edgemoe
