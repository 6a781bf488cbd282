#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "cache.h"
#include "clock.h"
#include "error.h"

namespace edgemoe {

void Cache::start_read(int e, int slot, int level, bool is_ahead) {
  Slot& s = slots_[slot];
  const int from = levels_[e];
  const uint32_t need = pages_at(e, level);
  if (slot_of_[e] < 0) {
    free_.remove(slot);
    if (free_committed_.has(slot)) free_committed_.remove(slot);
    slot_of_[e] = slot;
    s.owner = e;
  }
  trim(slot, need);  // its last owner may have been larger
  committed_pages_ += need - s.pages;
  s.pages = need;
  peak_pages_ = std::max<uint32_t>(peak_pages_, committed_pages_);
  s.target = int8_t(level);
  s.is_ahead = is_ahead;
  pin(e, 1);
  stats_.ahead_reads += is_ahead;

  const Fetch what{slot, e, from, rungs_at(e, level), bytes_at(e, from), size_t(need) * kPage, is_ahead};
  if (backing_->fetch(what)) finish(slot, true, nullptr, nullptr);
}

Cache::Load Cache::try_load(int position) {
  Use* use = &uses_[position];
  const int e = use->expert;
  int slot = slot_of_[e];
  if (slot >= 0 && slots_[slot].target > 0) {  // under way
    if (slots_[slot].target < use->level) return Load::kBusy;
    if (slots_[slot].is_ahead) {
      slots_[slot].is_ahead = false;
      stats_.ahead_late += 1;
      backing_->promote(slot);
    }
    use->step = Step::kLoading;
    num_loading_ += 1;
    return Load::kStarted;
  }
  if (levels_[e] >= use->level) {  // read for an earlier use
    use->step = Step::kReady;
    ready_.push_back(position);
    pin(e, 1);
    return Load::kStarted;
  }
  const uint32_t need = pages_at(e, use->level);
  bool has_room = find_room(e, need, true, &slot);
  if (!has_room && !ahead_list_.empty()) {
    set_ahead({nullptr, nullptr, 0});  // gives up what is wanted soon, except for reads that have begun
    has_room = find_room(e, need, true, &slot);
  }
  // Experts that this request still wants are dropped only when nothing else can be and no read is pending.
  if (!has_room && given_.empty() && backing_->num_pending() == 0 && ready_.empty()) {
    has_room = find_room(e, need, false, &slot);
  }
  if (!has_room) return Load::kNoRoom;
  use->step = Step::kLoading;
  num_loading_ += 1;
  start_read(e, slot, use->level, false);
  return Load::kStarted;
}

/// Starts the waiting uses, in order, until there is no room. Returns whether there was room for all.
bool Cache::load_waiting() {
  size_t kept = 0, i = 0;
  bool has_room = true;
  for (; has_room && i < waiting_.size(); ++i) {
    const Load load = try_load(waiting_[i]);
    has_room = load != Load::kNoRoom;
    if (load != Load::kStarted) waiting_[kept++] = waiting_[i];
  }
  waiting_.erase(waiting_.begin() + std::ptrdiff_t(kept), waiting_.begin() + std::ptrdiff_t(i));
  return has_room;
}

void Cache::check(const Wish& wish) const {
  for (int i = 0; i < wish.count; ++i) {
    const int32_t e = wish.experts[i];
    if (e < 0 || e >= num_experts() || wish.levels[i] < 1 || wish.levels[i] > max_level_) {
      throw std::invalid_argument("Cache: expert " + std::to_string(e) + " at level " + std::to_string(wish.levels[i]) +
                                  " is outside the file or above the engine's bits");
    }
  }
}

void Cache::set_ahead(const Wish& ahead) {
  ahead_before_.swap(ahead_list_);
  ahead_list_.clear();
  for (int e : ahead_before_) ahead_[e] = 0;
  for (int i = 0; i < ahead.count; ++i) {
    const int e = ahead.experts[i];
    if (rungs_[size_t(e)] == 0) continue;  // a prediction may name a place without an expert
    if (ahead_[e] == 0) ahead_list_.push_back(e);
    ahead_[e] = std::max(ahead_[e], int8_t(level_of(e, ahead.levels[i])));
  }
  for (int e : ahead_list_) note(e);
  for (int e : ahead_before_) {
    note(e);
    const int slot = slot_of_[e];
    if (ahead_[e] || slot < 0 || slots_[slot].target == 0 || !slots_[slot].is_ahead || wanted_[e]) continue;
    if (!backing_->cancel(slot)) continue;
    stats_.ahead_reads -= 1;
    finish(slot, false, nullptr, nullptr);
  }
}

/// Starts reads ahead in order, as long as there is room without dropping anything wanted.
void Cache::load_ahead() {
  for (int e : ahead_list_) {
    if (levels_[e] >= ahead_[e] || (slot_of_[e] >= 0 && slots_[slot_of_[e]].target > 0)) continue;
    int slot;
    if (!find_room(e, pages_at(e, ahead_[e]), true, &slot)) return;
    start_read(e, slot, ahead_[e], true);
  }
}

void Cache::begin(const Wish& now, const int32_t* offsets, int num_tokens, const Wish& ahead) {
  require(!is_open_, "a request is open");
  check(now);
  check(ahead);
  expect_within("Cache num_tokens", num_tokens, 0, INT32_MAX);
  bool ascending = offsets[0] >= 0, are_there = true;
  for (int i = 0; i < now.count; ++i) {
    int8_t& asked = asked_[now.experts[i]];
    are_there = are_there && rungs_[size_t(now.experts[i])] > 0;
    ascending = ascending && asked < now.levels[i] && offsets[i] <= offsets[i + 1];
    asked = now.levels[i];
  }
  for (int i = 0; i < now.count; ++i) asked_[now.experts[i]] = 0;
  if (!ascending)
    throw std::invalid_argument(
        "Cache: offsets do not ascend from 0, or an expert is asked for twice, and not at more bits");
  if (!are_there) throw std::invalid_argument("Cache: an expert is asked for at a place that has none");
  std::exception_ptr ignored;  // of reads ahead; a use that wants the expert reads it again
  collect(false, &ignored);
  is_open_ = true;
  if (now.count > 0) policy_.advance(now.experts[0] / shape_.num_experts, num_tokens);
  for (int i = 0; i < now.count; ++i) {
    const int e = now.experts[i], level = level_of(e, now.levels[i]);
    const bool is_here = levels_[e] >= level;
    uses_.push_back({e, level, last_use_[e], is_here ? Step::kReady : Step::kWaiting});
    last_use_[e] = i;
    (is_here ? ready_ : waiting_).push_back(i);
    want(e, 1);
    policy_.use(e, offsets[i + 1] - offsets[i]);
    runs_[e] += uint32_t(offsets[i + 1] - offsets[i]);
    stats_.bits += level_bits_[size_t(rungs_at(e, level))];
    if (!is_here) {
      stats_.misses += 1;
      lacks_[e] += 1;
      continue;
    }
    pin(e, 1);
    hit(e);
  }
  set_ahead(ahead);
  if (load_waiting()) load_ahead();
}

/// Counts a use that found its expert resident; the expert may have been dropped since.
void Cache::hit(int e) {
  stats_.hits += 1;
  if (slot_of_[e] < 0) return;
  Slot& slot = slots_[slot_of_[e]];
  if (slot.target != 0 || !slot.is_ahead) return;
  slot.is_ahead = false;
  stats_.ahead_used += 1;
}

void Cache::count(const Wish& used) {
  require(!is_open_, "a request is open");
  check(used);
  for (int i = 0, layer = -1; i < used.count; ++i) {
    const int e = used.experts[i];
    if (e / shape_.num_experts != layer) policy_.advance(layer = e / shape_.num_experts, 1);
    policy_.use(e, 1);
    runs_[e] += 1;
    stats_.bits += level_bits_[size_t(rungs_at(e, level_of(e, used.levels[i])))];
    hit(e);
  }
}

/// Records the end of a fetch: it is done (`ok`), failed with the error `why`, or was cancelled. The first error that
/// concerns the request goes to `error`.
void Cache::finish(int slot, bool ok, const std::exception_ptr& why, std::exception_ptr* error) {
  Slot& s = slots_[slot];
  const int e = s.owner, level = s.target;
  s.target = 0;
  pins_[e] -= 1;
  if (ok) {
    if (levels_[e] == 0) stats_.resident_experts += 1;
    stats_.resident_bytes += bytes_at(e, level) - bytes_at(e, levels_[e]);
    levels_[e] = int8_t(level);
    reads_[e] += 1;
  }
  for (int i = last_use_[e]; i >= 0; i = uses_[i].next) {
    Use& use = uses_[i];
    if (use.step != Step::kLoading) continue;
    num_loading_ -= 1;
    if (!ok && error && !*error) *error = why;
    use.step = ok ? Step::kReady : Step::kDone;
    if (ok) ready_.push_back(i);
    pins_[e] += ok;
    wanted_[e] -= !ok;
  }
  note(e);
  if (ok) return;
  s.is_ahead = false;
  if (levels_[e] == 0) {
    free_slot(slot);
  } else {
    trim(slot, pages_at(e, levels_[e]));
  }
}

void Cache::collect(bool wait, std::exception_ptr* error) {
  arrived_.clear();
  const double start = wait ? now_s() : 0;
  backing_->collect(wait, &arrived_);
  if (wait) stats_.wait_s += now_s() - start;
  for (const Arrival& a : arrived_) finish(a.slot, !a.error, a.error, error);
}

void Cache::next(std::vector<int>* group) {
  group->clear();
  if (!is_open_) return;
  for (int i : given_) {
    uses_[i].step = Step::kDone;
    pin(uses_[i].expert, -1);
  }
  given_.clear();
  for (bool wait = false;; wait = true) {
    std::exception_ptr error;
    collect(wait, &error);
    if (error) {
      close();
      std::rethrow_exception(error);
    }
    // What may start now: an expert that this request evicted, an upgrade, or a read that waited for room.
    load_waiting();
    if (waiting_.empty()) load_ahead();
    if (!ready_.empty()) {
      std::sort(ready_.begin(), ready_.end());
      given_.swap(ready_);
      for (int i : given_) {
        uses_[i].step = Step::kGiven;
        want(uses_[i].expert, -1);
      }
      *group = given_;
      return;
    }
    if (waiting_.empty() && num_loading_ == 0) return close();
    if (backing_->num_pending() == 0) {
      close();
      throw OutOfBudget("cache: no slot can be freed for an expert");
    }
  }
}

void Cache::close() {
  if (!is_open_) return;
  std::exception_ptr ignored;
  for (const Use& use : uses_) {
    const int slot = slot_of_[use.expert];
    if (use.step == Step::kLoading && backing_->cancel(slot)) finish(slot, false, nullptr, nullptr);
  }
  while (num_loading_ > 0) collect(true, &ignored);
  for (const Use& use : uses_) {
    last_use_[use.expert] = -1;
    if (use.step == Step::kReady || use.step == Step::kGiven) pins_[use.expert] -= 1;
    if (use.step != Step::kGiven && use.step != Step::kDone) wanted_[use.expert] -= 1;
    note(use.expert);
  }
  uses_.clear();
  waiting_.clear();
  ready_.clear();
  given_.clear();
  is_open_ = false;
}

}  // namespace edgemoe
