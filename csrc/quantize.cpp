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

/// Quantises sixteen rows at a time. The quick search tries the few scales and middles that usually win, for three row
/// scales, and rounds the weights. The full search tries all that are near the one that fits, for five row scales; then
/// it chooses codes for all levels together and, with moments, refines them.
class RowCoder {
 public:
  static constexpr int kAtOnce = 2;  ///< row blocks that read the moments together; more would leave the second cache

  RowCoder(int cols, int num_scales, const std::vector<Level>& levels, const Objective& objective)
      : cols_(cols),
        groups_(blocks(cols, kGroup)),
        is_thorough_(objective.is_thorough || objective.moments),
        levels_(levels),
        num_scales_(num_scales),
        objective_(objective) {
    columns_.resize(size_t(groups_) * kGroup * kTileRows);
    bytes_.resize(size_t(groups_) * kTileRows);
    importance_.resize(size_t(groups_) * kGroup);  // 0 for padding
    std::copy_n(objective.squares, cols, importance_.begin());
    for (const Level& level : levels) fit_levels_.push_back({float(1 << (8 - level.bits)), level.weight});
  }

  /// Quantises `count` row blocks w [count, 16, cols].
  void code(const float* w, int count, Coded* out) {
    std::vector<RowBlock> all;
    all.reserve(size_t(count));
    for (int i = 0; i < count; ++i, w += size_t(kTileRows) * cols_) {
      float units[kTileRows];
      choose_scales(w, units, &out[i]);
      if (is_thorough_) {
        all.push_back(with_scales(w, units, out[i]));
        round_rows(&all.back(), levels_);
      } else {
        round(units, &out[i]);
      }
    }
    if (!is_thorough_) return;
    // Without moments a row's scales stay equal: fitted to the weights alone they shrink rows, which costs quality.
    if (objective_.moments && objective_.sweeps > 0) refine_rows(all.data(), count, levels_, objective_);
    for (int i = 0; i < count; ++i) tile_rows(all[i], &out[i]);
  }

 private:
  static size_t tiled(int row, int column) { return size_t(column / 4) * 64 + row * 4 + column % 4; }

  /// Transposes a group, so that the 16 rows of a column lie together; padding repeats the first column.
  void turn(const float* w, int g) {
    float* const group = columns_.data() + size_t(g) * kGroup * kTileRows;
    const int count = std::min(kGroup, cols_ - g * kGroup);
    for (int r = 0; r < kTileRows; ++r) {
      const float* const row = w + size_t(r) * cols_ + g * kGroup;
      for (int c = 0; c < kGroup; ++c) group[c * kTileRows + r] = row[c < count ? c : 0];
    }
  }

  /// Chooses the rows' scales, the same for all levels, and the scales and middles of their groups. `units` get the
  /// steps of codes with relative scale 1.
  void choose_scales(const float* w, float* units, Coded* out) {
    // Neighbouring relative scales differ by up to a fourth; another row scale offers all groups other steps. The quick
    // search: the wanted scale, which leaves a margin as middles are rounded, and two steps towards a fourth more.
    constexpr float kQuick[] = {1.0f, 1.04f, 1.1f}, kThorough[] = {1.0f, 0.96f, 1.04f, 1.08f, 1.13f};
    const Kernels& k = kernels();
    for (int g = 0; g < groups_; ++g) turn(w, g);
    float wanted[kTileRows], least[kTileRows] = {};
    for (int r = 0; r < kTileRows; ++r) wanted[r] = row_scale(w + size_t(r) * cols_, cols_);
    for (int i = 0; i < (is_thorough_ ? 5 : 3); ++i) {
      float tried[kTileRows], errors[kTileRows];
      uint16_t halves[kTileRows];
      for (int r = 0; r < kTileRows; ++r) tried[r] = (is_thorough_ ? kThorough[i] : kQuick[i]) * wanted[r];
      k.to_f16(tried, kTileRows, halves);
      k.from_f16(halves, kTileRows, tried);
      for (float& unit : tried) unit /= float(kScaleUnit);
      k.fit_scales(columns_.data(), groups_, importance_.data(), fit_levels_.data(), int(fit_levels_.size()), tried,
                   is_thorough_, bytes_.data(), errors);
      for (int r = 0; r < kTileRows; ++r) {
        if (i > 0 && !(errors[r] < least[r])) continue;
        least[r] = errors[r];
        units[r] = tried[r];
        for (int s = 0; s < num_scales_; ++s) out->halves[s][r] = halves[r];
        for (size_t at = size_t(r); at < bytes_.size(); at += kTileRows) out->scales[at] = bytes_[at];
      }
    }
  }

  /// Chooses the code next to each weight.
  void round(const float* units, Coded* out) const {
    kernels().round_codes(columns_.data(), groups_, units, out->scales.data(), out->codes.data());
    for (int c = cols_; c < groups_ * kGroup; ++c) {
      for (int r = 0; r < kTileRows; ++r) out->codes[tiled(r, c)] = 0;
    }
  }

  /// Returns a row block with the scales that were chosen for it, without codes.
  RowBlock with_scales(const float* w, const float* units, const Coded& chosen) const {
    RowBlock b{w, cols_, num_scales_, {}, {}, {}, {}, {}};
    std::memcpy(b.halves, chosen.halves, sizeof b.halves);
    for (int s = 0; s < num_scales_; ++s) std::copy_n(units, kTileRows, b.units[s]);
    for (size_t at = 0; at < bytes_.size(); ++at) {
      const uint8_t byte = chosen.scales[at];
      b.steps.push_back(float((4 + byte % 4) << (byte % 16 / 4)));
      b.middles.push_back(float(kMiddleStep * ((byte >> 4) - 8) - 128));
    }
    b.codes.resize(size_t(kTileRows) * cols_);
    return b;
  }

  void tile_rows(const RowBlock& b, Coded* out) const {
    std::memcpy(out->halves, b.halves, sizeof b.halves);
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < cols_; ++c) out->codes[tiled(r, c)] = b.codes[size_t(r) * cols_ + c];
    }
  }

  int cols_, groups_;
  bool is_thorough_;
  const std::vector<Level>& levels_;
  int num_scales_;
  const Objective& objective_;
  Floats columns_;                 ///< [groups * 16, 16]
  std::vector<float> importance_;  ///< [groups * 16]
  std::vector<uint8_t> bytes_;     ///< [groups, 16] of one try
  std::vector<FitLevel> fit_levels_;
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
bool code_blocks(ThreadPool& pool, const float* w, int rows, int cols, const RowCoder& prototype, const Rungs& rungs) {
  std::atomic<bool> is_sound{true};
  const int count = blocks(rows, kTileRows), at_once = std::min(RowCoder::kAtOnce, blocks(count, pool.size()));
  pool.run(count, std::max(at_once, grain_for(count, pool.size())), [&](int begin, int end) {
    RowCoder of_piece = prototype;
    std::vector<Coded> coded(size_t(at_once), Coded(blocks(cols, kTileCols)));
    Floats some(size_t(at_once) * kTileRows * cols);
    for (int i = begin; i < end; i += at_once) {
      const int num = std::min(at_once, end - i), present = std::min(num * kTileRows, rows - i * kTileRows);
      std::copy_n(w + size_t(i) * kTileRows * cols, size_t(present) * cols, some.begin());
      std::fill(some.begin() + size_t(present) * cols, some.end(), 0.0f);
      int unsound = 0;
      for (const float x : some) unsound += !(std::fabs(x) < 65504.0f);
      if (unsound) is_sound.store(false, std::memory_order_relaxed);
      if (!is_sound.load(std::memory_order_relaxed)) return;
      of_piece.code(some.data(), num, coded.data());
      for (int block = 0; block < num; ++block) store(coded[size_t(block)], i + block, rows, rungs);
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
  const bool is_sound = code_blocks(pool, w, rows, cols, RowCoder(cols, num_scales, levels, objective), rungs);
  if (!is_sound) throw std::invalid_argument("quantize: a weight is not finite, or too large for float16 scales");
}

}  // namespace edgemoe
