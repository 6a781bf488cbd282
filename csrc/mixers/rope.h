// Rotary position embeddings (RoPE), which turn queries and keys by their positions.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "memory.h"

namespace edgemoe {

/// Frequencies [half], and the cosines and sines of positions: for a pass, and after `keep` for all positions so far.
/// One caller at a time.
class Rope {
 public:
  /// `scale` multiplies cosines and sines.
  Rope(std::vector<float> frequencies, float scale) : frequencies_(std::move(frequencies)), scale_(scale) {}

  /// Keeps the cosines and sines of the first `positions` positions from now on, see `tiles`. Throws
  /// std::invalid_argument unless `positions` is above 0.
  void keep(int positions);

  /// Bytes that `kept` positions take once all of them were seen.
  static size_t bytes(int half, int kept) { return (size_t(kept) + 15) / 16 * tile_floats(half) * sizeof(float); }

  int half() const { return int(frequencies_.size()); }

  /// Writes cos and sin [T, half] of the positions from `pos` on; if positions are kept, `tiles` then has these and all
  /// before them. Throws std::invalid_argument for positions beyond those that are kept.
  void angles(int pos, int T, float* cos, float* sin);

  /// Tiles of 16 positions, each [half][cosines, sines][16]; null unless the first `positions` are kept and were seen.
  const float* tiles(int positions) const;

  static size_t tile_floats(int half) { return size_t(half) * 32; }

 private:
  void turn(int position, int i, float* cos, float* sin) const;

  std::vector<float> frequencies_;
  float scale_;
  int kept_ = 0, seen_ = 0;
  Memory memory_;
};

}  // namespace edgemoe
