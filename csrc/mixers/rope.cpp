#include "mixers/rope.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace edgemoe {

void Rope::keep(int positions) {
  if (positions < 1) throw std::invalid_argument("Rope: expected positions from 1, got " + std::to_string(positions));
  if (positions == kept_) return;
  memory_ = Memory(bytes(half(), positions));
  kept_ = positions;
  seen_ = 0;
}

void Rope::turn(int position, int i, float* cos, float* sin) const {
  // The angle in float32, as transformers computes it; its cosine and sine in double, so that they agree everywhere.
  const float angle = float(position) * frequencies_[i];
  *cos = float(std::cos(double(angle))) * scale_;
  *sin = float(std::sin(double(angle))) * scale_;
}

void Rope::angles(int pos, int T, float* cos, float* sin) {
  if (kept_ > 0 && (pos < 0 || T < 0 || pos > kept_ - T)) {
    throw std::invalid_argument("Rope: positions [" + std::to_string(pos) + ", " + std::to_string(int64_t(pos) + T) +
                                ") are outside the " + std::to_string(kept_) + " that are kept");
  }
  auto* tiles = reinterpret_cast<float*>(memory_.bytes());
  const auto tile = [&](int position) { return tiles + position / 16 * tile_floats(half()) + position % 16; };
  for (; kept_ > 0 && seen_ < pos + T; ++seen_) {
    for (int i = 0; i < half(); ++i) turn(seen_, i, tile(seen_) + 32 * i, tile(seen_) + 32 * i + 16);
  }
  for (int t = 0; t < T; ++t, cos += half(), sin += half()) {
    for (int i = 0; i < half(); ++i) {
      if (kept_ == 0) {
        turn(pos + t, i, cos + i, sin + i);
      } else {
        cos[i] = tile(pos + t)[32 * i];
        sin[i] = tile(pos + t)[32 * i + 16];
      }
    }
  }
}

const float* Rope::tiles(int positions) const {
  return kept_ > 0 && positions <= seen_ ? reinterpret_cast<const float*>(memory_.bytes()) : nullptr;
}

}  // namespace edgemoe
