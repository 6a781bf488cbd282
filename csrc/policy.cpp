#include "policy.h"

#include <cmath>
#include <stdexcept>
#include <utility>

namespace edgemoe {
namespace {

constexpr double kLargest = 1e200;

/// What is left of a use after some tokens; 0 after very many, never infinite.
double decay(int num_tokens) { return std::exp2(-num_tokens / Policy::kHalfLife); }

}  // namespace

Policy::Policy(const std::string& name, size_t num_experts)
    : size_(num_experts), is_lru_(name == "lru"), scores_(num_experts, 0.0) {
  if (name != "lru" && name != "lfu") throw std::invalid_argument("policy: expected lru or lfu, got " + name);
}

Policy::Policy(const double* scores, size_t num_experts, std::shared_ptr<void> owner)
    : size_(num_experts), given_(scores), owner_(std::move(owner)), scores_(num_experts, 0.0) {}

void Policy::advance(int layer, int num_tokens) {
  if (is_lru_) {
    weight_ += 1;
    return;
  }
  if (layer <= layer_) {
    // Uses from now on weigh more, so that nothing else need be touched; where that ends, the old ones weigh less.
    const double left = decay(pass_tokens_);
    if (weight_ < kLargest * left) {
      weight_ /= left;
    } else {
      for (double& s : scores_) s = s / weight_ * left;
      weight_ = 1;
    }
  }
  layer_ = layer;
  pass_tokens_ = num_tokens;
}

void Policy::use(int expert, int count) {
  double& s = scores_[size_t(expert)];
  if (is_lru_) {
    s = weight_;
  } else {
    s += weight_ * count;
  }
}

std::vector<double> Policy::uses() const {
  if (is_lru_) throw std::logic_error("policy: lru counts no uses");
  const double left = decay(pass_tokens_);  // when the next pass begins
  std::vector<double> uses(scores_);
  for (double& u : uses) u = u / weight_ * left;
  return uses;
}

void Policy::set_uses(const std::vector<double>& uses) {
  if (is_lru_ || uses.size() != size_) throw std::invalid_argument("policy: expected one number of uses per expert");
  for (const double u : uses) {
    if (!(u >= 0 && u < kLargest))
      throw std::invalid_argument("policy: expected uses that are finite and not negative");
  }
  scores_ = uses;
  weight_ = 1;
  layer_ = -1;
  pass_tokens_ = 0;
}

}  // namespace edgemoe
