// The experts that a router's logits choose, and their gates: `choose` of dense.cpp, with a warp for each token.
#pragma once

#include "device/device.h"
#include "exact.cuh"

namespace edgemoe {
namespace cuda {

/// A value and its index; -1 for none.
struct Ranked {
  float value;
  int of;

  /// Whether it ranks before another: the higher value does, and among equals the lower index.
  __device__ __forceinline__ bool is_before(const Ranked& other) const {
    return value > other.value || (value == other.value && of < other.of);
  }
};

/// The k highest of n values, best first, by one thread in the CPU's way, which matters where values are NaN.
__device__ __forceinline__ void highest_in_turn(const float* values, int n, int k, int32_t* chosen) {
  for (int e = 0, count = 0; e < n; ++e) {
    if (count == k && !(values[e] > values[chosen[k - 1]])) continue;
    int at = count < k ? count++ : k - 1;
    for (; at > 0 && values[e] > values[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = e;
  }
}

/// The same by a warp, all of whose threads must call it.
__device__ __forceinline__ void highest(const float* values, int n, int k, int32_t* chosen) {
  const int lane = threadIdx.x & 31;
  bool is_odd = false;
  for (int e = lane; e < n; e += 32) is_odd = is_odd || values[e] != values[e];
  if (__any_sync(kAllLanes, is_odd)) {
    if (lane == 0) highest_in_turn(values, n, k, chosen);
    __syncwarp();
    return;
  }
  Ranked last{0, -1};
  for (int i = 0; i < k; ++i) {
    Ranked best{0, -1};
    for (int e = lane; e < n; e += 32) {
      const Ranked mine{values[e], e};
      if ((last.of < 0 || last.is_before(mine)) && (best.of < 0 || mine.is_before(best))) best = mine;
    }
    for (int d = 16; d > 0; d >>= 1) {
      const Ranked other{__shfl_xor_sync(kAllLanes, best.value, d), __shfl_xor_sync(kAllLanes, best.of, d)};
      if (other.of >= 0 && (best.of < 0 || other.is_before(best))) best = other;
    }
    if (lane == 0) chosen[i] = best.of;
    last = best;
  }
  __syncwarp();
}

/// Sets the values, by which experts are chosen, to -infinity outside the best groups.
__device__ __forceinline__ void keep_groups(const RouteRule& rule, float* values, float* best, int32_t* pairs,
                                            int32_t* kept) {
  const int lane = threadIdx.x & 31, size = rule.num_experts / rule.groups;
  if (lane < rule.groups) {
    int32_t* two = pairs + 2 * lane;
    const float* group = values + lane * size;
    const bool sum = rule.group_by_two && size > 1;
    highest_in_turn(group, size, sum ? 2 : 1, two);
    best[lane] = sum ? group[two[0]] + group[two[1]] : group[two[0]];
  }
  __syncwarp();
  highest(best, rule.groups, rule.used_groups, kept);
  for (int e = lane; e < rule.num_experts; e += 32) {
    bool is_kept = false;
    for (int g = 0; g < rule.used_groups; ++g) is_kept = is_kept || kept[g] == e / size;
    if (!is_kept) values[e] = -__int_as_float(0x7f800000);
  }
  __syncwarp();
}

/// Grid: tokens.
__global__ void __launch_bounds__(32) choose(ChooseCall call) {
  EDGEMOE_SHARED(float, row, kMostRouted);
  EDGEMOE_SHARED(float, values, kMostRouted);
  EDGEMOE_SHARED(float, gates, kMostChosen);
  EDGEMOE_SHARED(int32_t, chosen, kMostChosen);
  EDGEMOE_SHARED(int32_t, pairs, 2 * kMostGroups);
  const RouteRule& rule = call.rule;
  const int E = rule.num_experts, K = rule.top_k, lane = threadIdx.x;
  const size_t t = blockIdx.x;
  float poison = 0;  // not 0 where a logit is not finite
  for (int e = lane; e < E; e += 32) {
    const float logit = call.logits[t * E + e];
    row[e] = call.bias ? fmaf(call.bias[e], 1.0f, logit) : logit;
    poison = fmaf(row[e], 0.0f, poison);
  }
  if (any_poisoned(poison)) {
    for (int e = lane; e < E; e += 32) row[e] = __int_as_float(0x7fffffff);
  }
  __syncwarp();
  const bool is_plain = !call.choice_bias && rule.groups == 1;  // logits have the same order as the scores
  if (is_plain) highest(row, E, K, chosen);
  float top, sum;
  if (is_plain && rule.scoring == Scoring::kSoftmaxTopK) {
    if (lane < K) gates[lane] = row[chosen[lane]];
    __syncwarp();
    softmax(gates, K, &top, &sum);
  } else {
    if (rule.scoring == Scoring::kSigmoid) {
      for (int e = lane; e < E; e += 32) row[e] = sigmoid(row[e]);
      __syncwarp();
    } else {
      softmax(row, E, &top, &sum);
    }
    if (!is_plain) {
      for (int e = lane; e < E; e += 32) values[e] = call.choice_bias ? row[e] + call.choice_bias[e] : row[e];
      __syncwarp();
      if (rule.groups > 1) keep_groups(rule, values, gates, pairs, chosen);
      highest(values, E, K, chosen);
    }
    if (lane < K) gates[lane] = row[chosen[lane]];
    __syncwarp();
  }
  float gate = lane < K ? gates[lane] : 0.0f;
  if (rule.renormalise && rule.scoring != Scoring::kSoftmaxTopK) {
    float total = 0;
    for (int i = 0; i < K; ++i) total = total + gates[i];
    if (total > 0) gate = gate / total;
  }
  if (rule.gate_scale != 1.0f) gate = gate * rule.gate_scale;
  if (lane < K) call.experts[t * K + lane] = chosen[lane], call.gates[t * K + lane] = gate;
}

}  // namespace cuda
}  // namespace edgemoe
