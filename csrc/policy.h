// What the cache drops first: a score per expert, the lowest goes. Scores outlive residency.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace edgemoe {

/// Scores experts by their uses, or takes the scores of somebody else. One thread at a time.
class Policy {
 public:
  /// "lru": least recently used. "lfu": least frequently used, where a use counts half after kHalfLife tokens.
  /// Throws std::invalid_argument for another name.
  Policy(const std::string& name, size_t num_experts);

  /// The scores are `scores` [num_experts], which somebody else changes between requests and `owner` keeps alive.
  Policy(const double* scores, size_t num_experts, std::shared_ptr<void> owner);

  /// Tokens after which a use counts half. From 64 to 10^6 made no difference on a trace of real routing; a short
  /// memory follows a change of subject sooner (benchmarks/LOG.md).
  static constexpr double kHalfLife = 64;

  /// A layer is about to run `num_tokens` tokens. All layers of one pass are at the same time: what a prompt used
  /// least goes first, in whichever layer.
  void advance(int layer, int num_tokens);
  /// An expert of that layer runs `count` of them.
  void use(int expert, int count);

  double score(int expert) const { return given_ ? given_[expert] : scores_[size_t(expert)]; }

  /// Uses of each expert [num_experts], where one of now counts 1 and one half as much kHalfLife tokens ago; counted
  /// also where somebody else's scores decide. Throws std::logic_error for "lru", which counts none.
  std::vector<double> uses() const;
  /// Starts from what `uses` said at another time. Throws std::invalid_argument where `uses` are not as many, or not
  /// finite or negative.
  void set_uses(const std::vector<double>& uses);
  size_t size() const { return size_; }

 private:
  size_t size_;
  const double* given_ = nullptr;
  std::shared_ptr<void> owner_;
  bool is_lru_ = false;
  int layer_ = -1;       ///< of the pass under way
  int pass_tokens_ = 0;  ///< likewise
  double weight_ = 1;    ///< of a use now; grows, so that older ones count less, until scores are scaled down instead
  std::vector<double> scores_;
};

}  // namespace edgemoe
