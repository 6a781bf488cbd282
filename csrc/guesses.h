// What schedulers compute for all experts of a layer at once; see edgemoe/scheduler, where each is used.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/kernels.h"

namespace edgemoe {

/// Updates decayed uses per token [n] after one token that ran `chosen` [k]: uses = left * uses + (1 - left) * chosen.
void decay_uses(double* uses, int n, const int32_t* chosen, int k, double left);

/// Updates HOBBIT's records [n], by which its cache policy drops experts, after one token that ran `chosen` [k] at
/// `bits` [k]. A record includes a term for its last use, kept in `last` [n]. Each chosen one gains worth[bits] - last,
/// and its `last` becomes `now`. `worth` [9], by bits, is what a use counts plus `now`.
void renew_records(double* records, double* last, const int32_t* chosen, const int8_t* bits, int k, const double* worth,
                   double now);

/// The moments at which the experts of a layer are expected to run again, by ExpertFlow; the cache drops by them. A
/// moment counts layers since the start; a round is one pass through all `round` layers.
struct PathRow {
  double* scores;  ///< [num_experts]: minus the moment
  double* late;    ///< [num_experts]: rounds by which a predicted expert is late if it does not run; 0 outside `path`
  int32_t* path;   ///< [count]: the experts that are predicted, the likeliest first
  int num_experts, count;

  /// Updates the row after the layer ran `chosen` [k] at the moment `now`. Predicts the experts with the least `odds`
  /// [num_experts] against use: they are expected at now + round, and their `late` becomes `penalty`. All others are
  /// expected at now + (2 + odds + late) * round, where only those that were predicted and did not run have a `late`,
  /// which becomes 0. Returns how many of `chosen` had been predicted.
  int follow(const int32_t* chosen, int k, const double* odds, double now, double round, double penalty) const;

  /// Predicts again, once the next token is known, for a layer that runs at the moment `then`. Experts that were
  /// predicted, have not run and are not predicted again are expected 2 * round later than before.
  void foresee(const double* odds, double then, double round, double penalty) const;

 private:
  void predict(const double* odds, double moment, double penalty) const;
};

/// Counts of how often each expert followed those of the layers before it (EdgeMoE's table), for all layers, in arrays
/// that the caller owns.
struct PathTable {
  float* pairs;   ///< [layers, experts, experts]: counts of an expert of the layer before and one of the layer
  float* far;     ///< the same with an expert two layers before, or null
  float* totals;  ///< [layers, experts]: uses
  float* uses;    ///< the same, but at least 1, to divide by
  int layers, experts;

  /// Counts the experts and pairs of a token that ran `path` [layers, k], which has no expert of a layer twice.
  void count(const int32_t* path, int k) const;

  /// Scores each expert of `layer` by how often it followed what ran: sets `out` [experts] to the sum, over the experts
  /// `last` [k] of the layer before and `before` [m] of the one before that, of the share of their uses that it
  /// followed. Returns whether any score is not 0.
  bool follow(int layer, const int32_t* last, int k, const int32_t* before, int m, float* out) const;
};

/// Writes to `out` at most `most` of n experts: those with the highest scores above 0, highest first, among equals the
/// first, of all whose level `has` is below `wanted`. Returns how many.
int likeliest(const float* scores, const int8_t* has, const int8_t* wanted, int n, int32_t* out, int most);

/// HOBBIT's choice of precisions. The score of an expert is the share of its token's gates that better experts have.
struct PrecisionRule {
  double t1, t2;  ///< scores up to t1 get `high` bits, up to t2 `low`; experts above t2 are skipped
  int low, high;
  std::array<int8_t, kMaxRungs + 1> bits_of;  ///< bits of each level
  bool strict;  ///< whether an expert that is resident at `low` is a miss where its score asks for `high`

  /// Writes the bits of `experts` [n], which belong to the first n of a token's `gates` [k], best first. `has` is the
  /// level of each expert of the layer. What is resident is used at the bits that it has.
  void choose(const float* gates, int k, const int32_t* experts, int n, const int8_t* has, int8_t* out) const;
};

}  // namespace edgemoe
