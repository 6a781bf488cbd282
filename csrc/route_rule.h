// How routers choose, for processors and devices.
#pragma once

#include <cstdint>

namespace edgemoe {

/// What makes an expert's score of its logit.
enum class Scoring : uint8_t {
  kSoftmax,      ///< over all experts
  kSoftmaxTopK,  ///< over the chosen
  kSigmoid,
  kSparseMixer,  ///< over those near the highest, then without it over those near the next (arXiv 2409.12136)
};

/// How a router's logits become a choice: the experts with the highest scores, to which `Router::choice_bias` may be
/// added for choosing alone, in those groups of experts that have the highest.
struct RouteRule {
  int num_experts;
  int top_k;
  Scoring scoring;
  bool renormalise;   ///< gates of the chosen sum to 1
  float gate_scale;   ///< what gates are multiplied with at last
  int groups;         ///< of as many experts each, one after the other; 1 for none
  int used_groups;    ///< that experts are chosen from
  bool group_by_two;  ///< a group's score is the sum of its two highest, instead of its highest
};

}  // namespace edgemoe
