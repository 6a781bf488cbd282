// Which expert goes when room is needed, without looking at all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "policy.h"

namespace edgemoe {

/// Keeps of the experts that may go, layer by layer, the one with the lowest score. A layer is looked through again
/// only when its scores changed or when its lowest went, so that a search costs as much as there are layers and
/// experts in one of them, not as much as there are experts.
class Victims {
 public:
  Victims(int num_layers, int num_experts);

  /// An expert, which lies in `slot`, may go from now on.
  void add(int expert, int slot, const Policy& policy);
  /// It may not. Both do nothing where that is so already.
  void remove(int expert);
  bool has(int expert) const { return members_[word(expert)] >> bit(expert) & 1; }

  /// Of all that may go, the one with the lowest score, of equals that in the lowest slot; -1 for none.
  int lowest(const Policy& policy);

  /// Whether what is kept is what looking through all that may go finds.
  bool is_sound(const Policy& policy) const;

 private:
  struct Row {
    int best = -1;  ///< its lowest before the layer's scale and shift, of equals that in the lowest slot; -1 for none
    double least = 0;      ///< what that one scores
    double next = 0;       ///< none of the others that score more than it scores less than this
    uint64_t version = 0;  ///< of the policy's scores of the layer that this is true for
    bool is_known = false;
  };
  size_t word(int expert) const { return size_t(expert / num_experts_) * words_ + size_t(expert % num_experts_) / 64; }
  int bit(int expert) const { return expert % num_experts_ % 64; }
  template <typename Visit>
  void each(int layer, Visit visit) const;
  Row look_through(int layer, const Policy& policy) const;

  int num_experts_;
  size_t words_;                   ///< per layer
  std::vector<uint64_t> members_;  ///< [layers, words], a bit per expert
  std::vector<int> slots_;         ///< of members
  std::vector<Row> rows_;
};

}  // namespace edgemoe
