// What the cache drops first: a score per expert, the lowest goes. Scores outlive residency.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace edgemoe {

/// Scores experts by their uses. One thread at a time.
class Policy {
 public:
  /// "lru": least recently used. "lfu": least frequently used, where a use counts half after kHalfLife tokens.
  /// Throws std::invalid_argument for another name.
  Policy(const std::string& name, int num_experts, int num_layers);

  /// Tokens after which a use counts half. From 16 to 10^6 made no difference on a trace of real routing; a short
  /// memory follows a change of subject sooner (benchmarks/LOG.md).
  static constexpr double kHalfLife = 64;

  /// One layer is about to run `num_tokens` tokens.
  void advance(int num_tokens);
  /// An expert of that layer runs `count` of them.
  void use(int expert, int count);

  double score(int expert) const { return scores_[size_t(expert)]; }

 private:
  bool is_lru_;
  double growth_;      ///< per token and layer
  double weight_ = 1;  ///< of a use now; grows, so that older ones count less
  std::vector<double> scores_;
};

}  // namespace edgemoe
