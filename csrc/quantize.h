// Quantisation of float weights to nested planes, as the .moe file holds them.
#pragma once

#include <cstdint>
#include <vector>

#include "threads.h"

namespace edgemoe {

/// The error that quantisation minimises, and how thoroughly it searches.
struct Objective {
  /// [8] how much the squared error at 1 to 8 bits counts; not negative, and not all 0.
  const float* level_weights;
  /// [cols, cols] symmetric: the mean product of every two inputs, or null. With it, codes are refined for the error
  /// of the output: the sum over levels of weight * (W - Wb) moments (W - Wb)^T, with Wb the weights at b bits.
  const float* moments;
  /// The same without the part of the error that a level's correction makes up for, or null. It takes the place of
  /// `moments` at b bits where bit b - 1 of `corrected` is set.
  const float* rest;
  uint8_t corrected;
  /// [cols] the mean square of each input, positive; the diagonal of `moments` where it is given.
  const float* squares;
  /// The most passes over the columns.
  int sweeps;
  /// Whether to search groups' scales and middles in full, as is always done with `moments`. Takes several times
  /// longer.
  bool is_thorough = false;
};

/// Quantises w [rows, cols] and writes rung i, of widths[i] bits, to outs[i], which has `rung_bytes` bytes.
/// `row_scales` says which rungs begin with row scales, as in `check_row_scales`. An entry beyond those of `widths`
/// says that the levels above, which count in the objective though they are not stored, have row scales of their own.
/// Throws std::invalid_argument, with outs unspecified, when a weight is not finite or too large for float16, or when
/// the objective is not as described.
void quantize_nested(ThreadPool& pool, const float* w, int rows, int cols, const std::vector<uint8_t>& widths,
                     const std::vector<uint8_t>& row_scales, const Objective& objective,
                     const std::vector<uint8_t*>& outs);

}  // namespace edgemoe
