#include "refine.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace edgemoe {
namespace {

constexpr int kFits = 2;  ///< rounds of fitting row scales and codes in turn

/// The weights of a row's levels where errors are measured in steps of a code: the levels' weights times the squares of
/// the ratios of their row scales to the first.
void weights_of_row(const RowBlock& b, const std::vector<Level>& levels, int row, float* weights) {
  for (size_t i = 0; i < levels.size(); ++i) {
    const float gain = b.units[0][row] > 0 ? b.units[levels[i].scale][row] / b.units[0][row] : 1;
    weights[i] = levels[i].weight * (gain * gain);
  }
}

/// The levels as the kernels take them, with each row's weights.
std::array<CodeLevel, 8> code_levels(const RowBlock& b, const std::vector<Level>& levels) {
  std::array<CodeLevel, 8> out{};
  float weights[8];
  for (size_t i = 0; i < levels.size(); ++i) {
    out[i].bits = levels[i].bits;
    out[i].moments = levels[i].moments;
  }
  for (int r = 0; r < kTileRows; ++r) {
    weights_of_row(b, levels, r, weights);
    for (size_t i = 0; i < levels.size(); ++i) out[i].weights[r] = weights[i];
  }
  return out;
}

/// Sets the levels' scales to those of a group.
void set_scales(const RowBlock& b, const std::vector<Level>& levels, int group, CodeLevel* out) {
  for (size_t i = 0; i < levels.size(); ++i) {
    for (int r = 0; r < kTileRows; ++r) {
      out[i].scales[r] = b.units[levels[i].scale][r] * b.steps[size_t(group) * kTileRows + r];
    }
  }
}

/// The weight that a code stands for at a level.
inline float decoded(const RowBlock& b, const Level& level, int row, int column) {
  const size_t group = size_t(column / kGroup) * kTileRows + row;
  const uint8_t code = b.codes[size_t(row) * b.cols + column];
  return b.units[level.scale][row] * b.steps[group] * (position_of(code, level.bits) + b.middles[group]);
}

/// Sets each row scale to its least-squares value over the levels that share it, by their weights, and `gains` to the
/// factors by which scales changed. `seen` [levels, 16, cols] is Wb moments, with Wb the decoded weights.
void fit_row_scales(RowBlock* b, const std::vector<Level>& levels, const Floats& seen, float (*gains)[kTileRows]) {
  const Kernels& k = kernels();
  for (int r = 0; r < kTileRows; ++r) {
    double wanted[kMaxRungs] = {}, have[kMaxRungs] = {};
    for (size_t i = 0; i < levels.size(); ++i) {
      double with_w = 0, with_itself = 0;
      for (int c = 0; c < b->cols; ++c) {
        const double product = seen[(i * kTileRows + r) * b->cols + c];
        with_w += product * b->w[size_t(r) * b->cols + c];
        with_itself += product * decoded(*b, levels[i], r, c);
      }
      wanted[levels[i].scale] += levels[i].weight * with_w;
      have[levels[i].scale] += levels[i].weight * with_itself;
    }
    for (int s = 0; s < b->num_scales; ++s) {
      gains[s][r] = 1;
      const double gain = wanted[s] / have[s];
      if (!(gain > 0.5 && gain < 2)) continue;  // also where no level uses the scale, or all is zero
      const float scale = float(gain) * b->units[s][r] * float(kScaleUnit);
      if (!(scale < 65504.0f)) continue;
      float rounded;
      k.to_f16(&scale, 1, &b->halves[s][r]);
      k.from_f16(&b->halves[s][r], 1, &rounded);
      rounded /= float(kScaleUnit);
      gains[s][r] = rounded / b->units[s][r];
      b->units[s][r] = rounded;
    }
  }
}

/// The refinement of one row block: coordinate descent over codes on the sum over levels of weight * E moments E^T,
/// with E = Wb - W and the level's moments, and fits of the row scales.
class Refinement {
 public:
  Refinement(RowBlock* b, const std::vector<Level>& levels)
      : b_(b), levels_(levels), level_size_(size_t(kTileRows) * b->cols), gradients_(levels.size() * level_size_) {
    errors_.resize(gradients_.size());
    for (size_t i = 0; i < levels.size(); ++i) {
      for (int r = 0; r < kTileRows; ++r) {
        for (int c = 0; c < b->cols; ++c) {
          const size_t at = size_t(r) * b->cols + c;
          errors_[i * level_size_ + at] = decoded(*b, levels[i], r, c) - b->w[at];
        }
      }
    }
  }

  /// Makes the gradients E moments of 16 columns from `first` on.
  void start_gradients(int first) {
    for (size_t i = 0; i < levels_.size(); ++i) {
      times_moments(levels_[i], &errors_[i * level_size_], first, &gradients_[i * level_size_]);
    }
  }

  /// The same for W moments, which fits need.
  void start_whole(int first) {
    whole_.resize(gradients_.size());
    for (size_t i = 0; i < levels_.size(); ++i) {
      float* const out = &whole_[i * level_size_];
      if (i > 0 && levels_[i].moments == levels_[i - 1].moments) {
        for (int r = 0; r < kTileRows; ++r) {
          const size_t at = size_t(r) * b_->cols + first;
          std::copy_n(out + at - level_size_, std::min(kTileRows, b_->cols - first), out + at);
        }
      } else {
        times_moments(levels_[i], b_->w, first, out);
      }
    }
  }

  void start_descent() {
    of_kernel_ = code_levels(*b_, levels_);
    is_done_ = 0;
  }

  void start_sweep() { moved_ = 0; }
  void end_sweep() { is_done_ = ~moved_ & 0xffff; }  // where a sweep moved nothing, the next one would not either

  /// Sets each code of a group to the one with which the error of the output is least, given all others. Within the
  /// group the kernel keeps what it needs of the gradients; the rest of a row follows after it.
  void descend(int group) {
    set_scales(*b_, levels_, group, of_kernel_.data());
    unsigned skipped = is_done_;
    for (int r = 0; r < kTileRows; ++r) {
      const float scale = b_->units[0][r] * b_->steps[size_t(group) * kTileRows + r];
      skipped |= unsigned(!(scale > 0)) << r;
    }
    if (skipped == 0xffff) return;
    const int first = group * kGroup, count = std::min(kGroup, b_->cols - first);
    float moves[8 * kTileRows * kGroup] = {};
    const unsigned changed = kernels().descend_group(of_kernel_.data(), int(levels_.size()), b_->cols, first, count,
                                                     skipped, gradients_.data(), b_->codes.data(), moves);
    if (changed) follow(first, moves);
    moved_ |= changed;
  }

  void fit_scales() {
    float gains[kMaxRungs][kTileRows];
    Floats& seen = errors_;
    for (size_t at = 0; at < seen.size(); ++at) seen[at] = gradients_[at] + whole_[at];
    fit_row_scales(b_, levels_, seen, gains);
    for (size_t row = 0; row < levels_.size() * kTileRows; ++row) {
      const float gain = gains[levels_[row / kTileRows].scale][row % kTileRows];
      const size_t end = (row + 1) * size_t(b_->cols);
      for (size_t at = end - b_->cols; at < end; ++at) gradients_[at] = gain * seen[at] - whole_[at];
    }
  }

 private:
  void times_moments(const Level& level, const float* rows, int first, float* out) const {
    const int cols = b_->cols, end = std::min(first + kTileRows, cols);
    kernels().matmul_f32(level.moments, rows, kTileRows, cols, cols, first, end, out);
  }

  /// The gradients follow what moved in a group of columns from `first` on.
  void follow(int first, const float* moves) {
    constexpr int kStretch = 512;  // columns at a time, for which a group's rows of the moments stay in the cache
    const Kernels& k = kernels();
    const int rows = int(levels_.size()) * kTileRows, cols = b_->cols;
    uint8_t moved[8 * kTileRows][kGroup];
    float by[8 * kTileRows][kGroup];
    int counts[8 * kTileRows];
    for (int at = 0; at < rows; ++at) {
      counts[at] = 0;
      for (int c = 0; c < kGroup; ++c) {
        const float move = moves[at * kGroup + c];
        if (move == 0) continue;
        moved[at][counts[at]] = uint8_t(c);
        by[at][counts[at]++] = move;
      }
    }
    for (int c = 0; c < cols; c += kStretch) {
      for (int at = 0; at < rows; ++at) {
        if (counts[at] == 0) continue;
        const float* products = levels_[at / kTileRows].moments + size_t(first) * cols + c;
        k.add_scaled_rows(products, size_t(cols), moved[at], by[at], counts[at], std::min(kStretch, cols - c),
                          &gradients_[size_t(at) * cols + c]);
      }
    }
  }

  RowBlock* b_;
  const std::vector<Level>& levels_;
  size_t level_size_;
  Floats gradients_, errors_, whole_;  ///< [levels, 16, cols]
  std::array<CodeLevel, 8> of_kernel_{};
  unsigned is_done_ = 0, moved_ = 0;
};

/// Descends through the columns of all blocks side by side, so that a group's rows of the moments are read once.
void descend(std::vector<Refinement>* all, int groups, int sweeps) {
  for (Refinement& one : *all) one.start_descent();
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    for (Refinement& one : *all) one.start_sweep();
    for (int g = 0; g < groups; ++g) {
      for (Refinement& one : *all) one.descend(g);
    }
    for (Refinement& one : *all) one.end_sweep();
  }
}

}  // namespace

void round_rows(RowBlock* b, const std::vector<Level>& levels) {
  const Kernels& k = kernels();
  auto of_kernel = code_levels(*b, levels);
  float weights[8][kTileRows], targets[8][kTileRows];
  for (size_t i = 0; i < levels.size(); ++i) std::copy_n(of_kernel[i].weights, kTileRows, weights[i]);
  for (int c = 0; c < b->cols; ++c) {
    if (c % kGroup == 0) set_scales(*b, levels, c / kGroup, of_kernel.data());
    for (size_t i = 0; i < levels.size(); ++i) {
      for (int r = 0; r < kTileRows; ++r) {
        const float scale = of_kernel[i].scales[r], w = b->w[size_t(r) * b->cols + c];
        targets[i][r] = (scale > 0 ? w / scale : 0) - b->middles[size_t(c / kGroup) * kTileRows + r];
      }
    }
    int codes[kTileRows];
    k.best_codes(of_kernel.data(), int(levels.size()), weights[0], targets[0], codes);
    for (int r = 0; r < kTileRows; ++r) b->codes[size_t(r) * b->cols + c] = uint8_t(codes[r]);
  }
}

void refine_rows(RowBlock* blocks, int count, const std::vector<Level>& levels, const Objective& o) {
  const int cols = blocks[0].cols, groups = blocks[0].groups();
  std::vector<Refinement> all;
  all.reserve(size_t(count));
  for (int i = 0; i < count; ++i) all.emplace_back(&blocks[i], levels);
  // A few rows of the moments at a time, which stay in the cache for all rows and levels.
  for (int c = 0; c < cols; c += kTileRows) {
    for (Refinement& one : all) one.start_gradients(c);
  }
  descend(&all, groups, o.sweeps);
  if (blocks[0].num_scales < 2) return;
  for (int c = 0; c < cols; c += kTileRows) {
    for (Refinement& one : all) one.start_whole(c);
  }
  for (int round = 0; round < kFits; ++round) {
    for (Refinement& one : all) one.fit_scales();
    descend(&all, groups, o.sweeps);
  }
}

}  // namespace edgemoe
