#include "refine.h"

#include <algorithm>
#include <cmath>

namespace edgemoe {
namespace {

constexpr int kFits = 2;  ///< rounds of fitting row scales and codes in turn

/// The value that the top `bits` bits of a code stand for, in steps of the 8-bit code.
inline float position(int code, int bits) {
  const int shift = 8 - bits;
  return (float(code >> shift) + 0.5f) * float(1 << shift);
}

/// The code below a position; 0 for NaN, as when a gradient overflows.
inline int code_at(float position) { return int(std::min(std::max(0.0f, position), 255.0f)); }

/// The weights of a row's levels where errors are measured in steps of a code: the levels' weights times the squares of
/// the ratios of their row scales to the first.
void weights_of_row(const RowBlock& b, const std::vector<Level>& levels, int row, float* weights) {
  for (size_t i = 0; i < levels.size(); ++i) {
    const float gain = b.units[0][row] > 0 ? b.units[levels[i].scale][row] / b.units[0][row] : 1;
    weights[i] = levels[i].weight * (gain * gain);
  }
}

/// The code with the least sum of weight * (target - position)^2 over the levels, each with its own target; of several
/// such codes the lowest.
///
/// The best code lies between the lowest and the highest target. For each code of the last level but one, the best code
/// of the last level is known, so only those are tried: outwards from the last level's target to either side, until the
/// last level's error alone is too large.
int best_code(const std::vector<Level>& levels, const float* weights, const float* targets) {
  const int n = int(levels.size()), last = 8 - levels[n - 1].bits;
  const int shift = n > 1 ? 8 - levels[n - 2].bits : 8;  // without an earlier level: all codes at once
  float low = targets[0], high = targets[0];
  for (int i = 1; i < n; ++i) {
    low = std::min(low, targets[i]);
    high = std::max(high, targets[i]);
  }
  const int first = code_at(low - 1) >> shift, end = code_at(high + 1) >> shift;
  const int nearest = code_at(targets[n - 1]) >> last;  // of the last level, in its own units
  const int middle = std::min(std::max(nearest >> (shift - last), first), end);
  int best = 0;
  float least = 0;
  const auto is_worth_it = [&](int parent, bool is_below) {
    const int from = parent << (shift - last), to = ((parent + 1) << (shift - last)) - 1;
    const int code = std::min(std::max(nearest, from), to) << last;
    float d = targets[n - 1] - position(code, levels[n - 1].bits);
    const float of_last = weights[n - 1] * (d * d);
    if (parent != middle && of_last > least) return false;
    float error = 0;
    for (int i = 0; i < n - 1; ++i) {
      d = targets[i] - position(code, levels[i].bits);
      error += weights[i] * (d * d);
    }
    error += of_last;
    if (parent == middle || error < least || (is_below && error == least)) {
      least = error;
      best = code;
    }
    return true;
  };
  is_worth_it(middle, false);
  for (int parent = middle - 1; parent >= first && is_worth_it(parent, true); --parent) {
  }
  for (int parent = middle + 1; parent <= end && is_worth_it(parent, false); ++parent) {
  }
  return best;
}

/// The weight that a code stands for at a level.
inline float decoded(const RowBlock& b, const Level& level, int row, int column) {
  const size_t group = size_t(row) * b.groups() + column / kGroup;
  const uint8_t code = b.codes[size_t(row) * b.cols + column];
  return b.units[level.scale][row] * b.steps[group] * (position(code, level.bits) + b.middles[group]);
}

/// Sets each row scale to its least-squares value over the levels that share it, by their weights, and `gains` to the
/// factors by which scales changed. `seen` [levels, 16, cols] is Wb moments, with Wb the decoded weights.
void fit_row_scales(RowBlock* b, const std::vector<Level>& levels, const std::vector<float>& seen,
                    float (*gains)[kTileRows]) {
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

/// Sets one code after the other to the one with which the error of the output is least, given all others: coordinate
/// descent on the sum over levels of weight * E moments E^T, with E = Wb - W and the level's moments. `gradients`
/// [levels, 16, cols] are E moments.
void descend(RowBlock* b, const std::vector<Level>& levels, const Objective& o, std::vector<float>* gradients) {
  const Kernels& k = kernels();
  const int cols = b->cols, groups = b->groups(), n = int(levels.size());
  const size_t level_size = size_t(kTileRows) * cols;
  float of_rows[kTileRows][8];
  for (int r = 0; r < kTileRows; ++r) weights_of_row(*b, levels, r, of_rows[r]);
  bool is_done[kTileRows] = {};  // where a sweep moved nothing, the next one would not either
  for (int sweep = 0; sweep < o.sweeps; ++sweep) {
    bool moved[kTileRows] = {};
    for (int c = 0; c < cols; ++c) {
      const size_t diagonal = size_t(c) * cols + c;
      float inverses[8], shares[8];  // shares: a level's mean square over the first level's, the unit of the weights
      for (int i = 0; i < n; ++i) {
        inverses[i] = 1 / levels[i].moments[diagonal];
        shares[i] = levels[i].moments == levels[0].moments ? 1 : levels[i].moments[diagonal] * inverses[0];
      }
      for (int r = 0; r < kTileRows; ++r) {
        const float step = b->steps[size_t(r) * groups + c / kGroup];
        if (is_done[r] || !(b->units[0][r] * step > 0)) continue;
        uint8_t& code = b->codes[size_t(r) * cols + c];
        float* gradient = gradients->data() + size_t(r) * cols;
        float targets[8], weights[8];
        for (int i = 0; i < n; ++i) {
          const float slope = gradient[i * level_size + c], scale = b->units[levels[i].scale][r] * step;
          targets[i] = position(code, levels[i].bits) - slope * inverses[i] / scale;
          weights[i] = of_rows[r][i] * shares[i];
        }
        const int best = best_code(levels, weights, targets);
        if (best == code) continue;
        moved[r] = true;
        for (int i = 0; i < n; ++i) {
          const float move = position(best, levels[i].bits) - position(code, levels[i].bits);
          const float scale = b->units[levels[i].scale][r] * step;
          const float* products = levels[i].moments + size_t(c) * cols;
          if (move != 0) k.add_scaled(products, move * scale, cols, gradient + i * level_size);
        }
        code = uint8_t(best);
      }
    }
    for (int r = 0; r < kTileRows; ++r) is_done[r] = !moved[r];
  }
}

}  // namespace

void round_rows(RowBlock* b, const std::vector<Level>& levels) {
  for (int r = 0; r < kTileRows; ++r) {
    float weights[8];
    weights_of_row(*b, levels, r, weights);
    for (int c = 0; c < b->cols; ++c) {
      const size_t at = size_t(r) * b->cols + c, group = size_t(r) * b->groups() + c / kGroup;
      float targets[8];
      for (size_t i = 0; i < levels.size(); ++i) {
        const float scale = b->units[levels[i].scale][r] * b->steps[group];
        targets[i] = (scale > 0 ? b->w[at] / scale : 0) - b->middles[group];
      }
      b->codes[at] = uint8_t(best_code(levels, weights, targets));
    }
  }
}

void refine_rows(RowBlock* b, const std::vector<Level>& levels, const Objective& o) {
  const Kernels& k = kernels();
  const int cols = b->cols, n = int(levels.size());
  const size_t level_size = size_t(kTileRows) * cols;
  std::vector<float> errors(size_t(n) * level_size), gradients(errors.size()), whole;
  for (int i = 0; i < n; ++i) {
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < cols; ++c) {
        const size_t at = size_t(r) * cols + c;
        errors[i * level_size + at] = decoded(*b, levels[i], r, c) - b->w[at];
      }
    }
  }
  // A few rows of the moments at a time, which stay in the cache for all rows and levels.
  const auto times_moments = [&](const Level& level, const float* rows, int begin, float* out) {
    k.matmul_f32(level.moments, rows, kTileRows, cols, cols, begin, std::min(begin + kTileRows, cols), out);
  };
  for (int c = 0; c < cols; c += kTileRows) {
    for (int i = 0; i < n; ++i) times_moments(levels[i], &errors[i * level_size], c, &gradients[i * level_size]);
  }
  descend(b, levels, o, &gradients);
  if (b->num_scales < 2) return;
  whole.resize(errors.size());  // W moments
  for (int i = 0; i < n; ++i) {
    if (i > 0 && levels[i].moments == levels[i - 1].moments) {
      std::copy_n(&whole[(i - 1) * level_size], level_size, &whole[i * level_size]);
    } else {
      for (int c = 0; c < cols; c += kTileRows) times_moments(levels[i], b->w, c, &whole[i * level_size]);
    }
  }
  for (int round = 0; round < kFits; ++round) {
    float gains[kMaxRungs][kTileRows];
    std::vector<float>& seen = errors;
    for (size_t at = 0; at < seen.size(); ++at) seen[at] = gradients[at] + whole[at];
    fit_row_scales(b, levels, seen, gains);
    for (size_t at = 0; at < seen.size(); ++at) {
      const float gain = gains[levels[at / level_size].scale][at % level_size / size_t(cols)];
      gradients[at] = gain * seen[at] - whole[at];
    }
    descend(b, levels, o, &gradients);
  }
}

}  // namespace edgemoe
