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

constexpr int kTileCodes = kTileRows * kTileCols;

/// Sixteen rows as codes, in the order of tiles; padding beyond the last column is zero.
struct Coded {
  uint16_t halves[kMaxRungs][kTileRows];  ///< row scales as they are stored
  std::vector<uint8_t> scales;            ///< [tiles, 64]
  std::vector<uint8_t> codes;             ///< [tiles, 16, 64]

  explicit Coded(int tiles) : halves{}, scales(size_t(tiles) * kScaleBytes), codes(size_t(tiles) * kTileCodes) {}
};

/// Brings rows into the order of tiles.
void tile_rows(const RowBlock& b, Coded* out) {
  const int groups = b.groups();
  std::memcpy(out->halves, b.halves, sizeof b.halves);
  for (int r = 0; r < kTileRows; ++r) {
    for (int g = 0; g < groups; ++g) out->scales[size_t(g) * kTileRows + r] = b.bytes[size_t(r) * groups + g];
    for (int c = 0; c < b.cols; ++c) {
      out->codes[size_t(c / 4) * 64 + r * 4 + c % 4] = b.codes[size_t(r) * b.cols + c];
    }
  }
}

/// Writes the tiles of one rung of a row block.
void pack_rows(const Coded& b, int width, bool is_base, int shift, uint8_t* out) {
  const Kernels& k = kernels();
  const uint8_t* codes = b.codes.data();
  for (size_t at = 0; at < b.scales.size(); at += kScaleBytes, codes += kTileCodes) {
    if (is_base) std::copy_n(b.scales.data() + at, kScaleBytes, out);
    k.pack_rung(codes, width, shift, out + (is_base ? kScaleBytes : 0));
    out += tile_bytes(width, is_base);
  }
}

/// Returns about the least row scale with which a relative scale and a middle can cover the range of every group.
float row_scale(const float* w, int cols) {
  float step = 0;
  for (int g = 0; g < cols; g += kGroup) {
    float low = w[g], high = w[g];
    for (int c = g; c < std::min(cols, g + kGroup); ++c) {
      low = std::min(low, w[c]);
      high = std::max(high, w[c]);
    }
    // A little less than 255 steps of range and 127.5 + 7 * 12 from zero, because middles are rounded.
    step = std::max(step, std::max((high - low) / 250.0f, std::max(-low, high) / 211.5f));
  }
  return step * float(kScaleUnit) / 56.0f;
}

/// Chooses scales and middles group by group, the same for all levels.
void choose_scales(RowBlock* b, const Objective& o) {
  // Neighbouring relative scales differ by up to a fourth; another row scale offers all groups other steps.
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
        std::fill(w + n, w + kGroup, w[0]);  // padding within the range, of importance 0
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

/// The full search: all scales and middles near the one that fits, for each of five row scales; then the codes and,
/// with moments, their refinement.
class ThoroughRows {
 public:
  ThoroughRows(int cols, int num_scales, const std::vector<Level>& levels, const Objective& objective)
      : levels_(levels), objective_(objective), b_{nullptr, cols, num_scales, {}, {}, {}, {}, {}, {}} {
    b_.steps.resize(size_t(kTileRows) * b_.groups());
    b_.middles.resize(b_.steps.size());
    b_.bytes.resize(b_.steps.size());
    b_.codes.resize(size_t(kTileRows) * cols);
  }

  void code(const float* w, Coded* out) {
    b_.w = w;
    choose_scales(&b_, objective_);
    round_rows(&b_, levels_);
    // Without moments a row's scales stay equal: fitted to the weights alone they shrink rows, which costs quality.
    if (objective_.moments && objective_.sweeps > 0) refine_rows(&b_, levels_, objective_);
    tile_rows(b_, out);
  }

 private:
  const std::vector<Level>& levels_;
  const Objective& objective_;
  RowBlock b_;
};

/// The quick search: the few scales and middles that usually win, for three row scales, all rows at once.
class QuickRows {
 public:
  QuickRows(int cols, int num_scales, const std::vector<Level>& levels, const Objective& objective)
      : cols_(cols), groups_(blocks(cols, kGroup)), num_scales_(num_scales) {
    columns_.resize(size_t(groups_) * kGroup * kTileRows);
    bytes_.resize(size_t(groups_) * kTileRows);
    importance_.resize(size_t(groups_) * kGroup);  // 0 for padding
    std::copy_n(objective.squares, cols, importance_.begin());
    for (const Level& level : levels) levels_.push_back({float(1 << (8 - level.bits)), level.weight});
  }

  void code(const float* w, Coded* out) {
    // The wanted scale, which leaves a margin as middles are rounded, and two steps towards a fourth more, where the
    // next relative scale lies.
    constexpr float kTries[] = {1.0f, 1.04f, 1.1f};
    const Kernels& k = kernels();
    for (int g = 0; g < groups_; ++g) turn(w, g);
    float wanted[kTileRows], units[kTileRows] = {}, least[kTileRows] = {};
    for (int r = 0; r < kTileRows; ++r) wanted[r] = row_scale(w + size_t(r) * cols_, cols_);
    for (const float factor : kTries) {
      float tried[kTileRows], errors[kTileRows];
      uint16_t halves[kTileRows];
      for (int r = 0; r < kTileRows; ++r) tried[r] = factor * wanted[r];
      k.to_f16(tried, kTileRows, halves);
      k.from_f16(halves, kTileRows, tried);
      for (float& unit : tried) unit /= float(kScaleUnit);
      k.fit_scales(columns_.data(), groups_, importance_.data(), levels_.data(), int(levels_.size()), tried,
                   bytes_.data(), errors);
      for (int r = 0; r < kTileRows; ++r) {
        if (factor != kTries[0] && !(errors[r] < least[r])) continue;
        least[r] = errors[r];
        units[r] = tried[r];
        for (int s = 0; s < num_scales_; ++s) out->halves[s][r] = halves[r];
        for (size_t at = size_t(r); at < bytes_.size(); at += kTileRows) out->scales[at] = bytes_[at];
      }
    }
    k.round_codes(columns_.data(), groups_, units, out->scales.data(), out->codes.data());
    for (int c = cols_; c < groups_ * kGroup; ++c) {
      for (int r = 0; r < kTileRows; ++r) out->codes[size_t(c / 4) * 64 + r * 4 + c % 4] = 0;
    }
  }

 private:
  /// Transposes a group, so that the 16 rows of a column lie together; padding repeats the first column.
  void turn(const float* w, int g) {
    float* const group = columns_.data() + size_t(g) * kGroup * kTileRows;
    const int count = std::min(kGroup, cols_ - g * kGroup);
    for (int r = 0; r < kTileRows; ++r) {
      const float* const row = w + size_t(r) * cols_ + g * kGroup;
      for (int c = 0; c < kGroup; ++c) group[c * kTileRows + r] = row[c < count ? c : 0];
    }
  }

  int cols_, groups_, num_scales_;
  std::vector<float> columns_;     ///< [groups * 16, 16]
  std::vector<float> importance_;  ///< [groups * 16]
  std::vector<uint8_t> bytes_;     ///< [groups, 16] of one try
  std::vector<FitLevel> levels_;
};

/// Where the rungs of a matrix go.
struct Rungs {
  const std::vector<uint8_t>& widths;
  uint8_t row_scales;  ///< bit r: rung r begins with scales of rows
  const std::vector<uint8_t*>& outs;
};

/// Writes a row block to its place in each rung.
void store(const Coded& coded, int block, int rows, const Rungs& rungs) {
  int shift = 8, scale = 0;
  const size_t tiles = coded.scales.size() / kScaleBytes;
  for (size_t r = 0; r < rungs.widths.size(); ++r) {
    uint8_t* out = rungs.outs[r];
    if (rungs.row_scales >> r & 1) {
      std::memcpy(out + size_t(block) * sizeof coded.halves[0], coded.halves[scale++], sizeof coded.halves[0]);
      out += row_scale_bytes(rows);
    }
    shift -= rungs.widths[r];
    pack_rows(coded, rungs.widths[r], r == 0, shift, out + block * tiles * tile_bytes(rungs.widths[r], r == 0));
  }
}

/// Quantises all row blocks. Returns whether every weight was finite and small enough for float16 scales.
template <class Rows>
bool code_blocks(ThreadPool& pool, const float* w, int rows, int cols, const Rows& prototype, const Rungs& rungs) {
  std::atomic<bool> is_sound{true};
  const int count = blocks(rows, kTileRows);
  pool.run(count, grain_for(count, pool.size()), [&](int begin, int end) {
    Rows of_piece = prototype;
    Coded coded(blocks(cols, kTileCols));
    std::vector<float> block(size_t(kTileRows) * cols);
    for (int i = begin; i < end; ++i) {
      const int present = std::min(kTileRows, rows - i * kTileRows);
      std::copy_n(w + size_t(i) * kTileRows * cols, size_t(present) * cols, block.begin());
      std::fill(block.begin() + size_t(present) * cols, block.end(), 0.0f);
      int unsound = 0;
      for (const float x : block) unsound += !(std::fabs(x) < 65504.0f);
      if (unsound) is_sound.store(false, std::memory_order_relaxed);
      if (!is_sound.load(std::memory_order_relaxed)) return;
      of_piece.code(block.data(), &coded);
      store(coded, i, rows, rungs);
    }
  });
  return is_sound;
}

/// Throws std::invalid_argument unless the objective is as described in quantize.h.
void check(const Objective& o, int cols) {
  const auto is_weight = [](float x) { return x >= 0 && std::isfinite(x); };
  const auto is_square = [](float x) { return x > 0 && std::isfinite(x); };
  const float* end = o.level_weights + 8;
  if (!std::all_of(o.level_weights, end, is_weight) ||
      std::all_of(o.level_weights, end, [](float x) { return x == 0; })) {
    throw std::invalid_argument("level_weights: expected numbers that are finite, not negative and not all 0");
  }
  bool ok = std::all_of(o.squares, o.squares + cols, is_square);
  ok = ok && !(o.rest && !o.moments);
  for (const float* moments : {o.moments, o.rest}) {
    for (int c = 0; ok && moments && c < cols; ++c) {
      const float* row = moments + size_t(c) * cols;
      ok = is_square(row[c]) && std::all_of(row, row + cols, [](float x) { return std::isfinite(x); });
    }
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
    if (objective.level_weights[b - 1] > 0) {
      const bool rests = objective.rest && (objective.corrected >> (b - 1) & 1);
      levels.push_back({b, objective.level_weights[b - 1], num_scales - 1, rests ? objective.rest : objective.moments});
    }
  }
  for (size_t r = 0; r < widths.size(); ++r) {
    if (scaled >> r & 1) std::memset(outs[r], 0, row_scale_bytes(rows));
  }
  const Rungs rungs{widths, scaled, outs};
  const bool is_sound = objective.is_thorough || objective.moments
                            ? code_blocks(pool, w, rows, cols, ThoroughRows(cols, num_scales, levels, objective), rungs)
                            : code_blocks(pool, w, rows, cols, QuickRows(cols, num_scales, levels, objective), rungs);
  if (!is_sound) throw std::invalid_argument("quantize: a weight is not finite, or too large for float16 scales");
}

}  // namespace edgemoe
