// What the cache drops first: each expert has a score, and the lowest goes. Scores outlive residency.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace edgemoe {

/// Scores that are kept elsewhere and read live: expert e of layer l has the score scores[e] * scale[l] + shift[l].
struct GivenScores {
  const double* scores;         ///< [layers * experts]
  const double* scale;          ///< [layers], above 0
  const double* shift;          ///< [layers]
  const uint32_t* version;      ///< [layers]: incremented by the writer of a layer's scores
  const uint8_t* decides;       ///< [1]: 0 while the policy's own scores are to decide
  std::shared_ptr<void> owner;  ///< keeps all of these alive
};

/// The scores of all experts, computed from their uses or given from outside. One thread at a time.
class Policy {
 public:
  /// "lru": least recently used. "lfu": least frequently used, where a use counts half after kHalfLife tokens.
  /// Throws std::invalid_argument for another name.
  Policy(const std::string& name, int num_layers, int num_experts);

  /// Takes the scores `given`, and those of "lfu" while the given ones do not decide.
  Policy(GivenScores given, int num_layers, int num_experts);

  /// Tokens after which a use counts half. Values from 64 to 10^6 made no difference on a trace of real routing; a
  /// short half-life adapts sooner to a change of subject (benchmarks/LOG.md).
  static constexpr double kHalfLife = 64;

  /// Moves on to a layer that is about to run `num_tokens` tokens. All layers of one pass have the same time, so that
  /// the experts that a prompt used least go first, in whichever layer they are.
  void advance(int layer, int num_tokens);
  /// Counts `count` of these tokens as uses of an expert of that layer.
  void use(int expert, int count);

  double score(int expert) const { return at(expert / num_experts_, raw()[expert]); }

  /// The scores of all experts before their layer's scale and shift, which change no order within a layer.
  const double* raw() const { return is_given() ? given_.scores : last_.empty() ? uses_.data() : last_.data(); }
  /// The score of an expert of a layer whose raw score is `raw`.
  double at(int layer, double raw) const { return is_given() ? raw * given_.scale[layer] + given_.shift[layer] : raw; }
  /// A number that changes whenever raw scores of a layer may have changed.
  uint64_t version(int layer) const {
    return uint64_t(version_[size_t(layer)]) << 32 | (given_.version ? given_.version[layer] : 0);
  }

  /// Decayed uses of each expert: a use now counts 1, one kHalfLife tokens ago one half. They are counted even while
  /// something else decides.
  std::vector<double> uses() const;
  /// Starts from what `uses` returned earlier. Throws std::invalid_argument unless `uses` has one number per expert,
  /// each finite and not negative.
  void set_uses(const std::vector<double>& uses);
  size_t size() const { return uses_.size(); }

 private:
  bool is_given() const { return given_.scores && *given_.decides; }

  int num_experts_;
  GivenScores given_{};
  int layer_ = -1;       ///< that the present pass has reached
  int pass_tokens_ = 0;  ///< tokens of the present pass
  double weight_ = 1;    ///< of a use now; grows, so that older ones count less, until it is reset and uses scaled down
  double step_ = 0;      ///< calls of `advance` so far
  std::vector<double> uses_;
  std::vector<double> last_;       ///< for "lru" the step of each expert's last use, else empty
  std::vector<uint32_t> version_;  ///< [layers], of its own scores
};

}  // namespace edgemoe
