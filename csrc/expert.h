// FFNs: a group of routed experts, each at its own bits, or one that every token takes.
#pragma once

#include <cstdint>
#include <vector>

#include "cache.h"
#include "dense.h"

namespace edgemoe {

/// What is added to the products of an FFN's three matrices; null for nothing.
struct FfnBiases {
  const float* gate = nullptr;  ///< [H]
  const float* up = nullptr;    ///< [H]
  const float* down = nullptr;  ///< [D]
};

/// One FFN on some rows of x.
struct FfnUse {
  ExpertView w;           ///< without a gate, a matrix of no rows, where the activation needs none
  const int32_t* tokens;  ///< rows of x; null for 0 .. count - 1
  int count;
  float* out;               ///< [count, D]
  float* hidden = nullptr;  ///< [count, H]: if given, gets what w_down is applied to
  FfnBiases biases{};
  const float* z = nullptr;  ///< [T, kMaxRank]: V x, where gate and up have corrections and no V of their own
};

/// out = down(activation(gate x, up x)) for each use, with its biases; x is [T, D]. A row's result does not depend on
/// the other rows. Those of one width that follow each other run together.
void run_ffns(Workspace& ws, const float* x, int T, Activation activation, const std::vector<FfnUse>& uses);

/// A token's experts were chosen, numbers `first + experts[i]` of the cache, best first: lets threads that wait read
/// the first of what they will compute with if all of them run, and after them an FFN of `beside` hidden values, 0 for
/// none. A hint, no more.
void expect_experts(Workspace& ws, const Cache& cache, int first, const int32_t* experts, int n, int beside);

/// out[t] = sum over k of gates[t, k] * parts[rows[t, k]], in the order of k; rows below 0 are skipped.
void combine(Workspace& ws, const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
             float* out);

}  // namespace edgemoe
