// What schedulers work out of all experts of a layer at once; see edgemoe/scheduler, where each is used.
#pragma once

#include <cstdint>

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
  double* late;    ///< rounds later for what was predicted, until it runs
  int num_experts;

  /// The layer has run `chosen` [k] at the moment `now`: predicts the `count` experts of the least `odds` against use,
  /// and writes them to `path`, the likeliest first. These come up a round of `round` layers from now, the others when
  /// they are expected, but a round later at the earliest; what was predicted and did not run `late` rounds later
  /// still, and what is predicted will be that by `penalty`. Returns how many of `chosen` had been predicted.
  int follow(const int32_t* chosen, int k, const double* odds, int32_t* path, int count, double now, double round,
             double penalty) const;

  /// The token is known that runs next: predicts again, as above, for a layer that runs at the moment `then`. What was
  /// predicted and no longer is runs a round later than was thought.
  void foresee(const double* odds, int32_t* path, int count, double then, double round, double penalty) const;
};

/// Adds up `weights[i]` times row `which[i]` of `rows` [any, n] into `out` [n], in the order of i. Returns whether
/// anything is not 0.
bool weigh_rows(const float* rows, int n, const int32_t* which, const float* weights, int k, float* out);

/// EdgeMoE's table of what follows what, of all layers: pairs [L, E, E], totals and uses [L, E], of which the latter
/// are 1 at least. A token has run the experts `path` [L, K], of a layer each once: what it ran counts one more, and so
/// does each pair of an expert and one of the layer before.
void count_path(float* pairs, float* totals, float* uses, const int32_t* path, int layers, int experts, int k);

/// Writes to `out` the experts [n] of the highest scores above 0, highest first, of equals the first, at most `most`
/// of them and only those that have less than they are wanted at. Returns how many.
int likeliest(const float* scores, const int8_t* has, const int8_t* wanted, int n, int32_t* out, int most);

}  // namespace edgemoe
