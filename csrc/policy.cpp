#include "policy.h"

#include <cmath>
#include <stdexcept>
#include <utility>

namespace edgemoe {

Policy::Policy(const std::string& name, size_t num_experts)
    : size_(num_experts), is_lru_(name == "lru"), scores_(num_experts, 0.0) {
  if (name != "lru" && name != "lfu") throw std::invalid_argument("policy: expected lru or lfu, got " + name);
}

Policy::Policy(const double* scores, size_t num_experts, std::shared_ptr<void> owner)
    : size_(num_experts), given_(scores), owner_(std::move(owner)) {}

void Policy::advance(int layer, int num_tokens) {
  if (given_) return;
  if (is_lru_) {
    weight_ += 1;
    return;
  }
  if (layer <= layer_) {
    weight_ *= std::exp2(pass_tokens_ / kHalfLife);
    if (weight_ > 1e200) {
      for (double& s : scores_) s *= 1e-200;
      weight_ *= 1e-200;
    }
  }
  layer_ = layer;
  pass_tokens_ = num_tokens;
}

void Policy::use(int expert, int count) {
  if (given_) return;
  double& s = scores_[size_t(expert)];
  if (is_lru_) {
    s = weight_;
  } else {
    s += weight_ * count;
  }
}

}  // namespace edgemoe
