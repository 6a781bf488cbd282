#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "error.h"
#include "kernels/kernels.h"
#include "matrix.h"

namespace edgemoe {
namespace {

/// Writes the planes of one rung of a tile; `shift` is the code's bit below the rung's lowest.
void pack_rung(const uint8_t* tile, int width, int shift, uint8_t* out) {
  for (int w = 8; w >= 1; w /= 2) {
    if (!(width & w)) continue;
    width -= w;
    const int per_vector = 8 / w, down = shift + width, mask = (1 << w) - 1;
    for (int v = 0; v < 16 / per_vector; ++v, out += 64) {
      std::memset(out, 0, 64);
      for (int i = 0; i < per_vector; ++i) {
        const uint8_t* step = tile + 64 * (v * per_vector + i);
        for (int b = 0; b < 64; ++b) out[b] = uint8_t(out[b] | (((step[b] >> down) & mask) << (w * i)));
      }
    }
  }
}

/// A level that counts.
struct Level {
  int bits;
  float weight;
};

/// Sixteen rows on their way to codes: what all steps below share.
struct RowBlock {
  const float* w;  ///< [16, cols], rows beyond the matrix are zero
  int cols;
  std::vector<float> scales;   ///< [16, groups] step of the 8-bit code
  std::vector<float> middles;  ///< [16, groups] in steps, such that w = scale * (code + 0.5 + middle)
  std::vector<uint8_t> bytes;  ///< [16, groups] scale and middle as they are stored
  std::vector<uint8_t> codes;  ///< [16, cols]

  int groups() const { return blocks(cols, kGroup); }
};

/// Where the top `bits` bits of a code lie, in steps of the code.
inline float position(int code, int bits) {
  const int shift = 8 - bits;
  return (float(code >> shift) + 0.5f) * float(1 << shift);
}

/// The code below a position; also of what is no number, as when a gradient overflows.
inline int code_at(float position) { return int(std::min(std::max(0.0f, position), 255.0f)); }

/// The code with the least sum of weight * (target - position)^2 over the levels, each with its own target.
///
/// Such a code lies between the lowest and the highest target. The last level's best code is known for each code of
/// the level before, so that only these are tried.
int best_code(const std::vector<Level>& levels, const float* targets) {
  const int n = int(levels.size()), last = 8 - levels[n - 1].bits;
  const int shift = n > 1 ? 8 - levels[n - 2].bits : 8;  // without an earlier level: all codes at once
  float low = targets[0], high = targets[0];
  for (int i = 1; i < n; ++i) {
    low = std::min(low, targets[i]);
    high = std::max(high, targets[i]);
  }
  const int first = code_at(low - 1) >> shift, end = code_at(high + 1) >> shift;
  const int nearest = code_at(targets[n - 1]) >> last;  // of the last level, in its own units
  int best = 0;
  float least = 0;
  for (int parent = first; parent <= end; ++parent) {
    const int from = parent << (shift - last), to = ((parent + 1) << (shift - last)) - 1;
    const int code = std::min(std::max(nearest, from), to) << last;
    float error = 0;
    for (int i = 0; i < n; ++i) {
      const float d = targets[i] - position(code, levels[i].bits);
      error += levels[i].weight * (d * d);
    }
    if (parent == first || error < least) {
      least = error;
      best = code;
    }
  }
  return best;
}

/// About the scale of a row: the least that lets every group's range be met by a scale and a middle.
float row_scale(const float* w, int cols) {
  float step = 0;
  for (int g = 0; g < cols; g += kGroup) {
    float low = w[g], high = w[g];
    for (int c = g; c < std::min(cols, g + kGroup); ++c) {
      low = std::min(low, w[c]);
      high = std::max(high, w[c]);
    }
    // A little less than 255 steps of range and 127.5 + 7 * 12 from zero, because a middle is not met exactly.
    step = std::max(step, std::max((high - low) / 250.0f, std::max(-low, high) / 211.5f));
  }
  return step * float(kScaleUnit) / 56.0f;
}

/// Chooses scales, middles and codes weight by weight.
void round_rows(RowBlock* b, const std::vector<Level>& levels, const Objective& o, uint16_t* row_scales) {
  // Relative scales lie up to a fourth apart; another row scale is another choice of them for all groups.
  constexpr float kTries[] = {1.0f, 0.96f, 1.04f, 1.08f, 1.13f};
  const Kernels& k = kernels();
  const int groups = b->groups();
  std::vector<uint8_t> bytes(size_t(groups), 0);
  for (int r = 0; r < kTileRows; ++r) {
    const float* row = b->w + size_t(r) * b->cols;
    const float wanted = row_scale(row, b->cols);
    float least = 0, unit = 0;
    for (const float factor : kTries) {
      const float scale = factor * wanted;
      uint16_t half;
      float rounded, error = 0;
      k.to_f16(&scale, 1, &half);
      k.from_f16(&half, 1, &rounded);
      for (int g = 0; g < groups; ++g) {
        float w[kGroup], importance[kGroup] = {};
        const int n = std::min(kGroup, b->cols - g * kGroup);
        std::copy_n(row + g * kGroup, n, w);
        std::copy_n(o.squares + g * kGroup, n, importance);
        std::fill(w + n, w + kGroup, w[0]);  // within the range, and without importance
        error += k.choose_scale(w, importance, rounded / float(kScaleUnit), o.level_weights, &bytes[size_t(g)]);
      }
      if (factor != kTries[0] && !(error < least)) continue;
      least = error;
      unit = rounded / float(kScaleUnit);
      row_scales[r] = half;
      std::copy(bytes.begin(), bytes.end(), b->bytes.begin() + size_t(r) * groups);
    }
    for (int c = 0; c < b->cols; ++c) {
      const size_t at = size_t(r) * groups + c / kGroup;
      const uint8_t byte = b->bytes[at];
      b->scales[at] = unit * float((4 + byte % 4) << (byte % 16 / 4));
      b->middles[at] = float(kMiddleStep * ((byte >> 4) - 8) - 128);
      float targets[8];
      std::fill_n(targets, levels.size(), (b->scales[at] > 0 ? row[c] / b->scales[at] : 0) - b->middles[at]);
      b->codes[size_t(r) * b->cols + c] = uint8_t(best_code(levels, targets));
    }
  }
}

/// Moves one code after the other to where the error of the output is least, given all others: coordinate descent on
/// the sum over levels of weight * E moments E^T, with E = Wb - W. Gradients G = E moments are kept per level.
void refine_rows(RowBlock* b, const std::vector<Level>& levels, const Objective& o) {
  const Kernels& k = kernels();
  const int cols = b->cols, groups = b->groups(), n = int(levels.size());
  std::vector<float> errors(size_t(n) * kTileRows * cols), gradients(errors.size());
  for (int i = 0; i < n; ++i) {
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < cols; ++c) {
        const size_t at = size_t(r) * cols + c, g = size_t(r) * groups + c / kGroup;
        errors[size_t(i) * kTileRows * cols + at] =
            b->scales[g] * (position(b->codes[at], levels[i].bits) + b->middles[g]) - b->w[at];
      }
    }
  }
  k.matmul_f32(o.moments, errors.data(), n * kTileRows, cols, cols, 0, cols, gradients.data());
  for (int sweep = 0; sweep < o.sweeps; ++sweep) {
    bool is_done = true;
    for (int c = 0; c < cols; ++c) {
      const float* products = o.moments + size_t(c) * cols;
      const float inverse = 1 / products[c];
      for (int r = 0; r < kTileRows; ++r) {
        const float scale = b->scales[size_t(r) * groups + c / kGroup];
        if (!(scale > 0)) continue;
        uint8_t& code = b->codes[size_t(r) * cols + c];
        float* gradient = gradients.data() + size_t(r) * cols;
        float targets[8];
        for (int i = 0; i < n; ++i) {
          const float slope = gradient[size_t(i) * kTileRows * cols + c];
          targets[i] = position(code, levels[i].bits) - slope * inverse / scale;
        }
        const int best = best_code(levels, targets);
        if (best == code) continue;
        is_done = false;
        for (int i = 0; i < n; ++i) {
          const float move = position(best, levels[i].bits) - position(code, levels[i].bits);
          if (move != 0) k.add_scaled(products, move * scale, cols, gradient + size_t(i) * kTileRows * cols);
        }
        code = uint8_t(best);
      }
    }
    if (is_done) break;
  }
}

/// Throws std::invalid_argument unless every number can be computed with.
void check(const Objective& o, int cols) {
  const auto is_weight = [](float x) { return x >= 0 && std::isfinite(x); };
  const auto is_square = [](float x) { return x > 0 && std::isfinite(x); };
  const float* end = o.level_weights + 8;
  if (!std::all_of(o.level_weights, end, is_weight) ||
      std::all_of(o.level_weights, end, [](float x) { return x == 0; })) {
    throw std::invalid_argument("level_weights: expected numbers that are finite, not negative and not all 0");
  }
  bool ok = std::all_of(o.squares, o.squares + cols, is_square);
  for (int c = 0; ok && o.moments && c < cols; ++c) {
    const float* row = o.moments + size_t(c) * cols;
    ok = is_square(row[c]) && std::all_of(row, row + cols, [](float x) { return std::isfinite(x); });
  }
  if (!ok) throw std::invalid_argument("second moments: expected finite numbers, and mean squares above 0");
}

}  // namespace

void quantize_nested(ThreadPool& pool, const float* w, int rows, int cols, const std::vector<uint8_t>& widths,
                     const Objective& objective, const std::vector<uint8_t*>& outs) {
  check_widths(Scheme::kNested, widths);
  check_shape(rows, cols);
  check(objective, cols);
  std::vector<Level> levels;
  for (int b = 1; b <= 8; ++b) {
    if (objective.level_weights[b - 1] > 0) levels.push_back({b, objective.level_weights[b - 1]});
  }
  const int tiles = blocks(cols, kTileCols), groups = blocks(cols, kGroup);
  const size_t header = row_scale_bytes(rows);
  std::memset(outs[0], 0, header);
  std::atomic<bool> finite{true};
  pool.run(blocks(rows, kTileRows), 1, [&](int begin, int end) {
    std::vector<float> block(size_t(kTileRows) * cols);
    RowBlock b{block.data(), cols, {}, {}, {}, {}};
    b.scales.resize(size_t(kTileRows) * groups);
    b.middles.resize(b.scales.size());
    b.bytes.resize(b.scales.size());
    b.codes.resize(block.size());
    alignas(64) uint8_t tile[kTileRows * kTileCols];
    for (int i = begin; i < end; ++i) {
      const int count = std::min(kTileRows, rows - i * kTileRows);
      std::copy_n(w + size_t(i) * kTileRows * cols, size_t(count) * cols, block.begin());
      std::fill(block.begin() + size_t(count) * cols, block.end(), 0.0f);
      // float16 scales: a row wider than their range could not be stored.
      for (const float x : block) {
        if (!(std::fabs(x) < 65504.0f)) finite.store(false, std::memory_order_relaxed);
      }
      if (!finite.load(std::memory_order_relaxed)) return;
      round_rows(&b, levels, objective, reinterpret_cast<uint16_t*>(outs[0]) + size_t(i) * kTileRows);
      if (objective.moments && objective.sweeps > 0) refine_rows(&b, levels, objective);
      for (int t = 0; t < tiles; ++t) {
        uint8_t scales[kScaleBytes] = {};
        std::memset(tile, 0, sizeof tile);
        for (int r = 0; r < kTileRows; ++r) {
          for (int g = 4 * t; g < std::min(groups, 4 * t + 4); ++g) {
            scales[(g - 4 * t) * kTileRows + r] = b.bytes[size_t(r) * groups + g];
          }
          for (int c = 0; c < std::min(kTileCols, cols - t * kTileCols); ++c) {
            tile[c / 4 * 64 + r * 4 + c % 4] = b.codes[size_t(r) * cols + t * kTileCols + c];
          }
        }
        int shift = 8;
        for (size_t rung = 0; rung < widths.size(); ++rung) {
          const bool is_base = rung == 0;
          uint8_t* out =
              outs[rung] + (is_base ? header : 0) + (size_t(i) * tiles + t) * tile_bytes(widths[rung], is_base);
          if (is_base) out = std::copy_n(scales, kScaleBytes, out);
          shift -= widths[rung];
          pack_rung(tile, widths[rung], shift, out);
        }
      }
    }
  });
  if (!finite) throw std::invalid_argument("quantize: a weight is not finite, or too large for float16 scales");
}

}  // namespace edgemoe
