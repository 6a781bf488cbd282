#include "policy.h"

#include <cmath>
#include <stdexcept>
#include <utility>

#include "error.h"

namespace edgemoe {
namespace {

constexpr double kLargest = 1e200;

/// The share of a use that is left after some tokens; 0 after very many, never infinite.
double decay(int num_tokens) { return std::exp2(-num_tokens / Policy::kHalfLife); }

}  // namespace

Policy::Policy(const std::string& name, int num_layers, int num_experts)
    : Policy(GivenScores{}, num_layers, num_experts) {
  if (name != "lru" && name != "lfu") throw std::invalid_argument("policy: expected lru or lfu, got " + name);
  if (name == "lru") last_.assign(uses_.size(), 0.0);
}

Policy::Policy(GivenScores given, int num_layers, int num_experts)
    : num_experts_(num_experts), given_(std::move(given)) {
  expect_within("policy layers", num_layers, 1, kMaxSize);
  expect_within("policy experts", num_experts, 1, INT32_MAX / num_layers);
  uses_.assign(size_t(num_layers) * size_t(num_experts), 0.0);
  version_.assign(size_t(num_layers), 0);
}

void Policy::advance(int layer, int num_tokens) {
  step_ += 1;
  if (layer <= layer_) {
    // Later uses weigh more, so that earlier ones need not be touched. Only when the weight would grow too large are
    // the earlier ones scaled down.
    const double left = decay(pass_tokens_);
    if (weight_ < kLargest * left) {
      weight_ /= left;
    } else {
      for (double& u : uses_) u = u / weight_ * left;
      weight_ = 1;
      for (uint32_t& v : version_) ++v;
    }
  }
  layer_ = layer;
  pass_tokens_ = num_tokens;
}

void Policy::use(int expert, int count) {
  uses_[size_t(expert)] += weight_ * count;
  if (!last_.empty()) last_[size_t(expert)] = step_;
  version_[size_t(expert / num_experts_)] += 1;
}

std::vector<double> Policy::uses() const {
  const double left = decay(pass_tokens_);  // as of the start of the next pass
  std::vector<double> uses(uses_);
  for (double& u : uses) u = u / weight_ * left;
  return uses;
}

void Policy::set_uses(const std::vector<double>& uses) {
  if (uses.size() != uses_.size()) throw std::invalid_argument("policy: expected one number of uses per expert");
  for (const double u : uses) {
    if (!(u >= 0 && u < kLargest))
      throw std::invalid_argument("policy: expected uses that are finite and not negative");
  }
  uses_ = uses;
  weight_ = 1;
  layer_ = -1;
  pass_tokens_ = 0;
  for (uint32_t& v : version_) ++v;
}

}  // namespace edgemoe
