#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "error.h"
#include "kernels/kernels.h"
#include "matrix.h"
#include "refine.h"

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

/// Writes the tiles of one rung of a row block.
void pack_rows(const RowBlock& b, int width, bool is_base, int shift, uint8_t* out) {
  const int groups = b.groups();
  alignas(64) uint8_t tile[kTileRows * kTileCols];
  for (int t = 0; t < blocks(b.cols, kTileCols); ++t, out += tile_bytes(width, is_base)) {
    uint8_t scales[kScaleBytes] = {};
    std::memset(tile, 0, sizeof tile);
    for (int r = 0; r < kTileRows; ++r) {
      for (int g = 4 * t; g < std::min(groups, 4 * t + 4); ++g) {
        scales[(g - 4 * t) * kTileRows + r] = b.bytes[size_t(r) * groups + g];
      }
      for (int c = 0; c < std::min(kTileCols, b.cols - t * kTileCols); ++c) {
        tile[c / 4 * 64 + r * 4 + c % 4] = b.codes[size_t(r) * b.cols + t * kTileCols + c];
      }
    }
    if (is_base) std::copy_n(scales, kScaleBytes, out);
    pack_rung(tile, width, shift, out + (is_base ? kScaleBytes : 0));
  }
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

/// Chooses scales and middles group by group, the same for all levels.
void choose_scales(RowBlock* b, const Objective& o) {
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
      std::copy(bytes.begin(), bytes.end(), b->bytes.begin() + size_t(r) * groups);
      for (int s = 0; s < b->num_scales; ++s) b->halves[s][r] = half;
    }
    for (int s = 0; s < b->num_scales; ++s) b->units[s][r] = unit;
    for (size_t at = size_t(r) * groups; at < size_t(r + 1) * groups; ++at) {
      const uint8_t byte = b->bytes[at];
      b->steps[at] = float((4 + byte % 4) << (byte % 16 / 4));
      b->middles[at] = float(kMiddleStep * ((byte >> 4) - 8) - 128);
    }
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
                     const std::vector<uint8_t>& row_scales, const Objective& objective,
                     const std::vector<uint8_t*>& outs) {
  const uint8_t scaled = check_row_scales(Scheme::kNested, row_scales);
  check_widths(Scheme::kNested, widths);
  check_shape(rows, cols);
  check(objective, cols);
  std::vector<Level> levels;
  int num_scales = 1;
  for (int b = 1, bits = 0, rung = 0; b <= 8; ++b) {
    while (rung < int(widths.size()) && bits + widths[rung] < b) {
      bits += widths[rung++];
      num_scales += scaled >> rung & 1;
    }
    if (objective.level_weights[b - 1] > 0) levels.push_back({b, objective.level_weights[b - 1], num_scales - 1});
  }
  const int tiles = blocks(cols, kTileCols);
  for (size_t r = 0; r < widths.size(); ++r) {
    if (scaled >> r & 1) std::memset(outs[r], 0, row_scale_bytes(rows));
  }
  std::atomic<bool> finite{true};
  pool.run(blocks(rows, kTileRows), 1, [&](int begin, int end) {
    std::vector<float> block(size_t(kTileRows) * cols);
    RowBlock b{block.data(), cols, num_scales, {}, {}, {}, {}, {}, {}};
    b.steps.resize(size_t(kTileRows) * blocks(cols, kGroup));
    b.middles.resize(b.steps.size());
    b.bytes.resize(b.steps.size());
    b.codes.resize(block.size());
    for (int i = begin; i < end; ++i) {
      const int count = std::min(kTileRows, rows - i * kTileRows);
      std::copy_n(w + size_t(i) * kTileRows * cols, size_t(count) * cols, block.begin());
      std::fill(block.begin() + size_t(count) * cols, block.end(), 0.0f);
      // float16 scales: a row wider than their range could not be stored.
      for (const float x : block) {
        if (!(std::fabs(x) < 65504.0f)) finite.store(false, std::memory_order_relaxed);
      }
      if (!finite.load(std::memory_order_relaxed)) return;
      choose_scales(&b, objective);
      round_rows(&b, levels);
      // Without products row scales stay alike: fitted to the weights alone they shorten rows, which costs quality.
      if (objective.moments && objective.sweeps > 0) refine_rows(&b, levels, objective);
      int shift = 8, scale = 0;
      for (size_t r = 0; r < widths.size(); ++r) {
        uint8_t* out = outs[r];
        if (scaled >> r & 1) {
          std::memcpy(out + size_t(i) * sizeof b.halves[0], b.halves[scale++], sizeof b.halves[0]);
          out += row_scale_bytes(rows);
        }
        shift -= widths[r];
        pack_rows(b, widths[r], r == 0, shift, out + size_t(i) * tiles * tile_bytes(widths[r], r == 0));
      }
    }
  });
  if (!finite) throw std::invalid_argument("quantize: a weight is not finite, or too large for float16 scales");
}

}  // namespace edgemoe
