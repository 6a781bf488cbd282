// How routers choose experts, on the CPU and on devices.
#pragma once

#include <cstdint>

namespace edgemoe {

/// How an expert's score is computed from the logits.
enum class Scoring : uint8_t {
  kSoftmax,      ///< softmax over all experts
  kSoftmaxTopK,  ///< softmax over the chosen experts
  kSigmoid,
  kSparseMixer,  ///< softmax over those near the highest; then, without it, over those near the next (arXiv 2409.12136)
};

/// How a router's logits become a choice: the experts with the highest scores, within the groups of experts that have
/// the highest group scores. `Router::choice_bias` may be added to the scores for the choice alone.
struct RouteRule {
  int num_experts;
  int top_k;
  Scoring scoring;
  bool renormalise;   ///< gates of the chosen sum to 1
  float gate_scale;   ///< multiplies the gates at the end
  int groups;         ///< groups of consecutive experts, all of the same size; 1 for no grouping
  int used_groups;    ///< how many groups experts are chosen from
  bool group_by_two;  ///< a group's score is the sum of its two highest, instead of its highest
};

}  // namespace edgemoe
