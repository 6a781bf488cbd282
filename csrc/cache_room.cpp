#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "cache.h"
#include "error.h"

namespace edgemoe {

size_t Cache::slot_bytes(int level) const {
  if (level < 0 || level > int(shape_.ends.size())) throw std::invalid_argument("Cache: no such level");
  return level == 0 ? 0 : round_up(shape_.ends[size_t(level) - 1], backing_->granule());
}

void Cache::check_budget(size_t bytes) const {
  if (bytes / kPage * kPage >= window_bytes_) return;
  throw OutOfBudget("cache: one expert takes " + std::to_string(window_bytes_) + " bytes; the budget is " +
                    std::to_string(bytes));
}

void Cache::set_budget(size_t bytes) {
  require(!is_open_, "a request is open");
  check_budget(bytes);
  budget_pages_ = std::min(pages_in(bytes), most_pages_);
  // A huge page is resident as a whole, however little was read into it. So they are used only where all experts fit.
  if (!all_fit()) backing_->expect_all(false);
  if (make_room(0, -1, true)) return;
  set_ahead({nullptr, nullptr, 0});
  std::exception_ptr ignored;  // of reads ahead, whose slots cannot be freed before they end
  while (backing_->num_pending() > 0) collect(true, &ignored);
  make_room(0, -1, true);
}

void Cache::set_policy(Policy policy) {
  require(!is_open_, "a request is open");
  if (policy.size() != policy_.size()) throw std::invalid_argument("Cache: expected a score of each expert");
  policy.set_uses(policy_.uses());
  policy_ = std::move(policy);
  victims_ = lowerable_ = Victims(std::max(shape_.num_layers, 1), std::max(shape_.num_experts, 1));
  for (int e = 0; e < num_experts(); ++e) note(e);
}

void Cache::keep(int level) {
  require(!is_open_, "a request is open");
  if (level < 0 || level > max_level_) throw std::invalid_argument("Cache: no such level");
  kept_level_ = level;
  for (int e = 0; e < num_experts(); ++e) note(e);
}

/// Updates the sets of victims after an expert's level, or what `may_go` says of it, may have changed.
void Cache::note(int e) {
  if (may_be_lowered(e)) {
    lowerable_.add(e, slot_of_[e], policy_);
  } else {
    lowerable_.remove(e);
  }
  if (may_go(e)) {
    victims_.add(e, slot_of_[e], policy_);
  } else {
    victims_.remove(e);
  }
}

void Cache::pin(int e, int count) {
  pins_[e] += count;
  note(e);
}

void Cache::want(int e, int count) {
  wanted_[e] = uint8_t(wanted_[e] + count);
  note(e);
}

/// The expert to drop first: that with the lowest score and, among equals, in the lowest slot; -1 for none. With
/// `spare_wanted` it is not one that the request still wants. It is never one that is wanted soon.
int Cache::find_victim(bool spare_wanted) {
  int victim = victims_.lowest(policy_);
  if (spare_wanted) return victim;
  for (const Use& use : uses_) {
    const int e = use.expert;
    if (wanted_[e] == 0 || pins_[e] > 0 || levels_[e] == 0 || e == victim) continue;
    const double score = policy_.score(e), least = victim < 0 ? score : policy_.score(victim);
    if (victim < 0 || score < least || (score == least && slot_of_[e] < slot_of_[victim])) victim = e;
  }
  return victim;
}

void Cache::evict(int e) {
  require(pins_[e] == 0 && levels_[e] > 0, "evict of a pinned or absent expert");
  stats_.resident_bytes -= bytes_at(e, levels_[e]);
  stats_.resident_experts -= 1;
  stats_.evictions += 1;
  levels_[e] = 0;
  note(e);
  free_slot(slot_of_[e]);
}

/// Takes a slot from its owner.
void Cache::free_slot(int slot) {
  Slot& s = slots_[slot];
  slot_of_[s.owner] = -1;
  s.owner = -1;
  free_.push(slot);
  if (s.pages > 0) free_committed_.push(slot);
}

void Cache::trim(int slot, uint32_t keep) {
  Slot& s = slots_[slot];
  if (s.pages <= keep) return;
  backing_->release(slot, size_t(keep) * kPage, size_t(s.pages) * kPage);
  committed_pages_ -= s.pages - keep;
  s.pages = keep;
  if (keep == 0 && free_committed_.has(slot)) free_committed_.remove(slot);
}

/// Lowers the expert with the lowest score among those that may be lowered. Returns whether there was one.
bool Cache::lower_one() {
  const int victim = kept_level_ > 0 ? lowerable_.lowest(policy_) : -1;
  return victim >= 0 && shrink(victim, kept_level_);
}

/// Frees committed pages of unused slots, then lowers and evicts, until `pages` more fit.
bool Cache::make_room(uint32_t pages, int keep_slot, bool spare_wanted) {
  while (committed_pages_ + pages > budget_pages_) {
    int unused = free_committed_.first();
    if (unused >= 0 && unused == keep_slot) unused = free_committed_.after(unused);
    if (unused >= 0) {
      trim(unused, 0);
      continue;
    }
    if (lower_one()) continue;
    const int victim = find_victim(spare_wanted);
    if (victim < 0) return false;
    evict(victim);
  }
  return true;
}

/// Finds or frees a slot with `need` pages for an expert, which is wanted now or soon. Returns false if there is none.
bool Cache::find_room(int e, uint32_t need, bool spare_wanted, int* slot) {
  pins_[e] += 1;  // an upgrade must not evict its own lower rungs
  int candidate = slot_of_[e];
  if (candidate < 0) {
    // A slot that still has pages is better than an empty one: they need not be faulted in again.
    const int last = free_.last();
    const bool usable = last >= 0 && (slots_[last].pages > 0 || committed_pages_ + need <= budget_pages_);
    const int victim = usable || (last >= 0 && kept_level_ > 0) ? -1 : find_victim(spare_wanted);
    if (victim >= 0) evict(victim);
    candidate = free_.last();
  }
  bool found = candidate >= 0;
  if (found) {
    const uint32_t has = slots_[candidate].pages;
    found = make_room(need > has ? need - has : 0, candidate, spare_wanted);
  }
  pins_[e] -= 1;
  *slot = candidate;
  return found;
}

bool Cache::shrink(int e, int level) {
  if (e < 0 || e >= num_experts() || level < 0) throw std::invalid_argument("Cache: no such expert or level");
  level = level_of(e, level);
  if (level >= levels_[e]) return true;
  if (pins_[e] > 0) return false;
  if (level == 0) {
    evict(e);
    return true;
  }
  stats_.resident_bytes -= bytes_at(e, levels_[e]) - bytes_at(e, level);
  trim(slot_of_[e], pages_at(e, level));
  levels_[e] = int8_t(level);
  note(e);
  return true;
}

}  // namespace edgemoe
