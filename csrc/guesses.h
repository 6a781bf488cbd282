// What schedulers work out of all experts of a layer at once; see edgemoe/scheduler, where each is used.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/kernels.h"

namespace edgemoe {

/// One token has run `chosen` [k]: each of the uses per token [n] before it counts `left` of what it did.
void decay_uses(double* uses, int n, const int32_t* chosen, int k, double left);

/// HOBBIT's records [n]: each of `chosen` [k] gains the worth of a use at its bits, `worth` [9], and of being the last
/// used, `now`, in place of what the latter was, `last` [n].
void renew_records(double* records, double* last, const int32_t* chosen, const int8_t* bits, int k, const double* worth,
                   double now);

/// ExpertFlow's moments at which the experts of a layer are expected to run again, which the cache drops by.
struct PathRow {
  double* scores;  ///< minus the moment, in layers since the start
  double* late;    ///< rounds later for what was predicted, until it runs; 0 for all that is not in `path`
  int32_t* path;   ///< [count]: what is predicted, the likeliest first
  int num_experts, count;

  /// The layer has run `chosen` [k] at the moment `now`: predicts the experts of the least `odds` against use. These
  /// come up a round of `round` layers from now, the others when they are expected, but a round later at the earliest;
  /// what was predicted and did not run `late` rounds later still, and what is predicted will be that by `penalty`.
  /// Returns how many of `chosen` had been predicted.
  int follow(const int32_t* chosen, int k, const double* odds, double now, double round, double penalty) const;

  /// The token is known that runs next: predicts again, as above, for a layer that runs at the moment `then`. What was
  /// predicted and no longer is runs a round later than was thought.
  void foresee(const double* odds, double then, double round, double penalty) const;

 private:
  void predict(const double* odds, double moment, double penalty) const;
};

/// Which experts of a layer followed those of the layers before it (EdgeMoE's table), of all layers: arrays of somebody
/// else.
struct PathTable {
  float* pairs;   ///< [layers, experts, experts], of an expert and one of the layer before
  float* far;     ///< the same of two layers before, or null
  float* totals;  ///< [layers, experts]
  float* uses;    ///< the same, but 1 at least
  int layers, experts;

  /// A token has run `path` [layers, k], of a layer each expert once: what it ran counts one more, and so does each
  /// pair.
  void count(const int32_t* path, int k) const;

  /// Sets `out` [experts] to the sum over `last` [k], of the layer before `layer`, and over `before` [m], of the one
  /// before that, of what share of their uses each expert followed. Returns whether anything is not 0.
  bool follow(int layer, const int32_t* last, int k, const int32_t* before, int m, float* out) const;
};

/// Writes to `out` the experts [n] of the highest scores above 0, highest first, of equals the first, at most `most`
/// of them and only those that have less than they are wanted at. Returns how many.
int likeliest(const float* scores, const int8_t* has, const int8_t* wanted, int n, int32_t* out, int most);

/// HOBBIT's choice of precisions: the score of an expert is the share of gates of the better ones of its token.
struct PrecisionRule {
  double t1, t2;  ///< up to the first score at `high` bits, up to the second at `low`, above it not at all
  int low, high;
  std::array<int8_t, kMaxRungs + 1> bits_of;  ///< of each level
  bool strict;  ///< whether what is resident at `low` is a miss for one that is worth `high`

  /// Writes the bits of `experts` [n], the first of a token's `gates` [k], best first; `has` are all experts' levels.
  void choose(const float* gates, int k, const int32_t* experts, int n, const int8_t* has, int8_t* out) const;
};

}  // namespace edgemoe
