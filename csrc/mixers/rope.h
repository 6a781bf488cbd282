// Rotary positions: what turns queries and keys by where they stand.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "memory.h"

namespace edgemoe {

/// Frequencies [half], and the cosines and sines of positions: for a pass, and, if asked, of all positions until now.
/// One caller at a time.
class Rope {
 public:
  /// `scale` multiplies cosines and sines.
  Rope(std::vector<float> frequencies, float scale) : frequencies_(std::move(frequencies)), scale_(scale) {}

  /// From now on the first `positions` can be asked for again, see `tiles`. Throws std::invalid_argument unless above
  /// 0.
  void keep(int positions);

  /// What keeping so many positions takes once all were seen.
  static size_t bytes(int half, int kept) { return (size_t(kept) + 15) / 16 * tile_floats(half) * sizeof(float); }

  int half() const { return int(frequencies_.size()); }

  /// cos and sin [T, half] of the positions from `pos` on; all before them too are in `tiles` afterwards. Throws
  /// std::invalid_argument for more positions than are kept.
  void angles(int pos, int T, float* cos, float* sin);

  /// Tiles of 16 positions, each [half][cosines, sines][16]; null for a Rope that keeps none or not so many.
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
