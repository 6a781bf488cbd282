// FFNs: a group of routed experts, each at its own bits, or one FFN that every token goes through.
#pragma once

#include <cstdint>
#include <vector>

#include "cache.h"
#include "dense.h"

namespace edgemoe {

/// The biases of an FFN's three matrices; null for none.
struct FfnBiases {
  const float* gate = nullptr;  ///< [H]
  const float* up = nullptr;    ///< [H]
  const float* down = nullptr;  ///< [D]
};

/// One FFN on some rows of x.
struct FfnUse {
  ExpertView w;           ///< where the activation needs no gate, w.gate has no rows
  const int32_t* tokens;  ///< rows of x; null for 0 .. count - 1
  int count;
  float* out;               ///< [count, D]
  float* hidden = nullptr;  ///< [count, H]: if given, receives the values that w_down is applied to
  FfnBiases biases{};
  const float* z = nullptr;  ///< [T, kMaxRank]: V x, where gate and up have corrections but no V of their own
};

/// out = down(activation(gate x, up x)) for each use, with its biases; x is [T, D]. A row's result does not depend on
/// the other rows. Consecutive uses with the same H run together.
void run_ffns(Workspace& ws, const float* x, int T, Activation activation, const std::vector<FfnUse>& uses);

/// Says which experts a token will run: numbers `first + experts[i]` of the cache, best first. Waiting threads then
/// prefetch the start of their shares, as they are if all of these experts run together, and with them an FFN of
/// `beside` hidden values, 0 for none. Only a hint.
void expect_experts(Workspace& ws, const Cache& cache, int first, const int32_t* experts, int n, int beside);

/// out[t] = sum over k of gates[t, k] * parts[rows[t, k]], in the order of k; rows below 0 are skipped.
void combine(Workspace& ws, const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
             float* out);

}  // namespace edgemoe
