// Features of a layer's experts, from which the odds of their next use are predicted, as rows of numbers; see NextUse
// in scheduler/predict.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgemoe {

/// The rows of one layer, `num_experts` numbers each, in arrays that the caller owns.
struct UseRows {
  double* raw;     ///< [2]: uses per token, decayed; router scores
  double* now;     ///< [5]: 1; 1 if used, else 0; log of the uses; margin of the score, see `weigh`; its moving average
  double* before;  ///< [5]: the same of the token before
  int num_experts;

  /// Copies `now` to `before`.
  void keep() const;

  /// Updates `raw` for one token that ran `chosen` [n], best first: earlier uses are multiplied by `left`, and the
  /// router's scores [num_experts] are those of this token plus a small constant, so that each is above 0. Then updates
  /// all else as `weigh` does, with margins against the last of `chosen`.
  void token(const int32_t* chosen, int n, const float* scores, double left, double share, const double* weights,
             double* odds) const;

  /// Updates all else after `raw` was written: takes the logarithms, marks `chosen` [n] as used, sets each margin to
  /// the log score minus the lowest among `against` [m], moves the averages by `share` of the way to the margins, and
  /// sets odds [num_experts], in logarithms, to the sum of weights [5] times the rows.
  void weigh(const int32_t* chosen, int n, const int32_t* against, int m, double share, const double* weights,
             double* odds) const;

 private:
  void margins(const int32_t* chosen, int n, const int32_t* against, int m, double share, const double* weights,
               double* odds) const;
};

}  // namespace edgemoe
