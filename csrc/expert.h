// Gated FFNs: a group of routed experts, each at its own bits, or one that every token takes.
#pragma once

#include <cstdint>
#include <vector>

#include "cache.h"
#include "dense.h"

namespace edgemoe {

/// One FFN on some rows of x.
struct FfnUse {
  ExpertView w;
  const int32_t* tokens;  ///< rows of x; null for 0 .. count - 1
  int count;
  float* out;               ///< [count, D]
  float* hidden = nullptr;  ///< [count, H]: if given, gets silu(gate x) * (up x), what w_down is applied to
};

/// out = down(silu(gate x) * (up x)) for each use; x is [T, D]. A row's result does not depend on the other rows.
void run_ffns(Workspace& ws, const float* x, int T, const std::vector<FfnUse>& uses);

/// out[t] = sum over k of gates[t, k] * parts[rows[t, k]], in the order of k; rows below 0 are skipped.
void combine(Workspace& ws, const float* parts, const int32_t* rows, const float* gates, int T, int K, int cols,
             float* out);

}  // namespace edgemoe
