// What is known of a layer's experts before each of its passes, as rows of numbers; see NextUse in
// scheduler/predict.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgemoe {

/// The rows of one layer, of `num_experts` each, in arrays of somebody else.
struct UseRows {
  double* raw;     ///< [2]: uses per token, decayed; router scores
  double* now;     ///< [5]: one, used, logarithms of both `raw`, the latter's above the last chosen one's; its average
  double* before;  ///< [5]: the same of the token before
  int num_experts;

  /// Keeps what was said of the token before, if anybody asks for it.
  void keep() const;

  /// One token has run `chosen` [n]: each use before it counts `left` of what it did; and the router's scores
  /// [num_experts] of the token, each of which is above 0 from here on. Then all else as `weigh`.
  void token(const int32_t* chosen, int n, const float* scores, double left, double share, const double* weights,
             double* odds) const;

  /// `raw` was written: takes the logarithms, marks `chosen`, sets margins against the lowest of `against`, moves their
  /// averages by `share` of the way, and sets odds [num_experts], in logarithms, to weights [5] times the rows.
  void weigh(const int32_t* chosen, int n, const int32_t* against, int m, double share, const double* weights,
             double* odds) const;

 private:
  void margins(const int32_t* chosen, int n, const int32_t* against, int m, double share, const double* weights,
               double* odds) const;
};

}  // namespace edgemoe
