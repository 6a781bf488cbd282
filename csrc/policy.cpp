#include "policy.h"

#include <cmath>
#include <stdexcept>

namespace edgemoe {

Policy::Policy(const std::string& name, int num_experts, int num_layers)
    : is_lru_(name == "lru"), growth_(std::exp2(1.0 / (kHalfLife * num_layers))), scores_(size_t(num_experts), 0.0) {
  if (name != "lru" && name != "lfu") throw std::invalid_argument("policy: expected lru or lfu, got " + name);
}

void Policy::advance(int num_tokens) {
  if (is_lru_) {
    weight_ += 1;
    return;
  }
  weight_ *= std::pow(growth_, num_tokens);
  if (weight_ > 1e200) {
    for (double& s : scores_) s *= 1e-200;
    weight_ *= 1e-200;
  }
}

void Policy::use(int expert, int count) {
  double& s = scores_[size_t(expert)];
  if (is_lru_) {
    s = weight_;
  } else {
    s += weight_ * count;
  }
}

}  // namespace edgemoe
