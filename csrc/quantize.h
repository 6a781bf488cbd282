// Float weights to nested planes, as the .moe file holds them.
#pragma once

#include <cstdint>
#include <vector>

#include "threads.h"

namespace edgemoe {

/// Quantises w [rows, cols] in groups of 64 columns and writes each rung of `widths` bits to outs[i], of rung_bytes.
/// `level_weights` [8]: how much the squared error at 1 to 8 bits counts when a group's range is chosen.
/// Weights must be finite; returns false, with outs unspecified, when one is not.
bool quantize_nested(ThreadPool& pool, const float* w, int rows, int cols, const std::vector<uint8_t>& widths,
                     const float* level_weights, const std::vector<uint8_t*>& outs);

}  // namespace edgemoe
