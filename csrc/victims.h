// Which expert to drop when room is needed, found without looking at all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "policy.h"

namespace edgemoe {

/// The experts that may be dropped and, for each layer, the one of them with the lowest score. A layer is searched
/// again only when its scores changed or its lowest was removed. So finding the lowest of all takes time in proportion
/// to the number of layers plus the experts of one layer, not to the number of all experts.
class Victims {
 public:
  Victims(int num_layers, int num_experts);

  /// Adds an expert, which lies in `slot`; does nothing if it is a member.
  void add(int expert, int slot, const Policy& policy);
  /// Removes an expert; does nothing if it is not a member.
  void remove(int expert);
  bool has(int expert) const { return members_[word(expert)] >> bit(expert) & 1; }

  /// The member with the lowest score and, among equals, in the lowest slot; -1 for none.
  int lowest(const Policy& policy);

  /// Whether what is kept of each layer agrees with a search through all members.
  bool is_sound(const Policy& policy) const;

 private:
  struct Row {
    int best = -1;         ///< the member with the lowest raw score, among equals in the lowest slot; -1 for none
    double least = 0;      ///< its raw score
    double next = 0;       ///< a lower bound of the raw scores that are above `least`
    uint64_t version = 0;  ///< of the layer's scores for which this row is right
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
