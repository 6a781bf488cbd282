// What the cache drops first: a score per expert, the lowest goes. Scores outlive residency.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace edgemoe {

/// Scores of somebody else, live: expert e of layer l counts scores[e] * scale[l] + shift[l].
struct GivenScores {
  const double* scores;         ///< [layers * experts]
  const double* scale;          ///< [layers], above 0
  const double* shift;          ///< [layers]
  const uint32_t* version;      ///< [layers]: whoever writes scores of a layer counts it up
  const uint8_t* decides;       ///< [1]: 0 while the policy's own scores are to decide
  std::shared_ptr<void> owner;  ///< keeps all of these alive
};

/// Scores experts by their uses, or takes the scores of somebody else. One thread at a time.
class Policy {
 public:
  /// "lru": least recently used. "lfu": least frequently used, where a use counts half after kHalfLife tokens.
  /// Throws std::invalid_argument for another name.
  Policy(const std::string& name, int num_layers, int num_experts);

  /// The scores are `given`, and "lfu" while these do not decide.
  Policy(GivenScores given, int num_layers, int num_experts);

  /// Tokens after which a use counts half. From 64 to 10^6 made no difference on a trace of real routing; a short
  /// memory follows a change of subject sooner (benchmarks/LOG.md).
  static constexpr double kHalfLife = 64;

  /// A layer is about to run `num_tokens` tokens. All layers of one pass are at the same time: what a prompt used
  /// least goes first, in whichever layer.
  void advance(int layer, int num_tokens);
  /// An expert of that layer runs `count` of them.
  void use(int expert, int count);

  double score(int expert) const { return at(expert / num_experts_, raw()[expert]); }

  /// The scores of all experts before their layer's scale and shift, which change no order within a layer.
  const double* raw() const { return is_given() ? given_.scores : last_.empty() ? uses_.data() : last_.data(); }
  /// What a raw score of a layer counts.
  double at(int layer, double raw) const { return is_given() ? raw * given_.scale[layer] + given_.shift[layer] : raw; }
  /// Another number than before when raw scores of a layer may have changed.
  uint64_t version(int layer) const {
    return uint64_t(version_[size_t(layer)]) << 32 | (given_.version ? given_.version[layer] : 0);
  }

  /// Uses of each expert, where one of now counts 1 and one half as much kHalfLife tokens ago; counted also where
  /// something else decides.
  std::vector<double> uses() const;
  /// Starts from what `uses` said at another time. Throws std::invalid_argument where `uses` are not as many, or not
  /// finite or negative.
  void set_uses(const std::vector<double>& uses);
  size_t size() const { return uses_.size(); }

 private:
  bool is_given() const { return given_.scores && *given_.decides; }

  int num_experts_;
  GivenScores given_{};
  int layer_ = -1;       ///< of the pass under way
  int pass_tokens_ = 0;  ///< likewise
  double weight_ = 1;    ///< of a use now; grows, so that older ones count less, until uses are scaled down instead
  double step_ = 0;      ///< requests so far
  std::vector<double> uses_;
  std::vector<double> last_;       ///< of "lru" the step of the last use, else empty
  std::vector<uint32_t> version_;  ///< [layers], of its own scores
};

}  // namespace edgemoe
