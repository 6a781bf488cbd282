#include "cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "clock.h"
#include "error.h"
#include "matrix.h"

namespace edgemoe {
namespace {

uint32_t pages_in(size_t bytes) { return uint32_t(std::min<size_t>(bytes / kPage, INT32_MAX)); }

void require(bool ok, const char* what) {
  if (!ok) throw std::logic_error(std::string("cache: ") + what);
}

/// Rows and columns of gate, up or down.
std::pair<int, int> matrix_shape(const ExpertShape& s, size_t m) {
  if (m == 2) return {s.hidden, s.expert_hidden};
  return {m == 0 && !s.gated ? 0 : s.expert_hidden, s.hidden};
}

/// Sets what the ranks of corrections are for matrix `m`, gate, up or down.
void set_ranks(const ExpertShape& s, size_t m, NestedMatrix* w) {
  const auto& ranks = s.ranks[m];
  std::copy(ranks.begin(), ranks.end(), w->ranks);
  if (m == 2) w->basis_rank = uint8_t(highest_rank(ranks));
}

/// Throws std::invalid_argument unless widths are ladders and rungs end where those of such experts do: `view` computes
/// pointers by them. A dry cache has no bytes; there they need only grow.
void check_shape(const ExpertShape& s, bool is_dry) {
  expect_within("Cache hidden", s.hidden, 1, kMaxSize);
  expect_within("Cache expert_hidden", s.expert_hidden, 1, kMaxSize);
  for (size_t m = 0; m < 3; ++m) {
    std::vector<uint8_t> widths;
    for (const auto& rung : s.rung_widths) widths.push_back(rung[m]);
    check_widths(s.scheme, widths);
    check_ranks(s.scheme, s.ranks[m]);
    if (!s.ranks[m].empty() && (s.ranks[m].size() != widths.size() || (m == 0 && !s.gated))) {
      throw std::invalid_argument("Cache: expected a rank for each rung of matrices that there are");
    }
  }
  uint64_t end = 0;
  for (size_t r = 0; r < s.ends.size(); ++r) {
    uint64_t expected = end;
    for (size_t m = 0; m < 3; ++m) {
      const auto [rows, cols] = matrix_shape(s, m);
      NestedMatrix w;
      set_ranks(s, m, &w);
      w.row_scales = s.row_scales;
      w.widths[r] = s.rung_widths[r][m];
      expected += rung_bytes(s.scheme, rows, cols, form_of(w, int(r)));
    }
    const bool ok = is_dry ? s.ends[r] > 0 && s.ends[r] >= end : s.ends[r] == expected;
    if (!ok) {
      throw std::invalid_argument("Cache: rung " + std::to_string(r) + " ends at " + std::to_string(s.ends[r]) +
                                  "; expected " + (is_dry ? "no less than before" : std::to_string(expected)));
    }
    end = s.ends[r];
  }
}

}  // namespace

Cache::Cache(std::unique_ptr<Backing> backing, ExpertShape shape, std::vector<uint8_t> rungs, int max_level,
             size_t budget_bytes, Policy policy, size_t most_bytes)
    : backing_(std::move(backing)),
      shape_(std::move(shape)),
      rungs_(std::move(rungs)),
      max_level_(max_level),
      budget_pages_(pages_in(budget_bytes)),
      most_pages_(pages_in(std::max(budget_bytes, most_bytes))),
      policy_(std::move(policy)),
      victims_(std::max(shape_.num_layers, 1), std::max(shape_.num_experts, 1)) {
  const size_t n = rungs_.size(), num_rungs = shape_.rung_widths.size();
  if (n == 0 || n > INT32_MAX || n != size_t(shape_.num_layers) * size_t(shape_.num_experts) ||
      shape_.ends.size() != num_rungs || max_level < 1 || size_t(max_level) > num_rungs || policy_.size() != n) {
    throw std::invalid_argument("Cache: expected rungs and a score of each expert and a level of the ladder");
  }
  check_shape(shape_, !backing_->keeps_bytes());
  int most = 0;
  for (const uint8_t have : rungs_) {
    if (have < 1 || have > num_rungs)
      throw std::invalid_argument("Cache: expected each expert to have some rungs of the ladder");
    most = std::max(most, std::min(max_level, int(have)));
  }
  for (size_t level = 0; level <= num_rungs; ++level) {
    level_pages_.push_back(uint32_t(slot_bytes(int(level)) / kPage));
    level_bits_.push_back(level == 0 ? 0 : level_bits_.back() + shape_.rung_widths[level - 1][0]);
  }
  window_bytes_ = slot_bytes(most);
  check_budget(budget_bytes);
  // Address space for as many as could be resident at the lowest level.
  const size_t num_slots = std::min<size_t>(n, size_t(most_pages_) * kPage / slot_bytes(1));
  slots_.resize(num_slots);
  levels_.assign(n, 0);
  reads_.assign(n, 0);
  runs_.assign(n, 0);
  backing_->reserve(int(n), int(num_slots), window_bytes_);
  backing_->expect_all(all_fit());
  free_.resize(num_slots);
  free_committed_.resize(num_slots);
  for (size_t i = num_slots; i-- > 0;) free_.push(int(i));
  slot_of_.assign(n, -1);
  pins_.assign(n, 0);
  wanted_.assign(n, 0);
  asked_.assign(n, 0);
  ahead_.assign(n, 0);
  last_use_.assign(n, -1);
}

Cache::~Cache() {
  try {
    close();
  } catch (...) {  // a read that failed after everybody lost interest
  }
}

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
  // A huge page is resident beside what was read into it. So there are none but where all fit from the start.
  if (!all_fit()) backing_->expect_all(false);
  if (make_room(0, -1, true)) return;
  set_ahead({nullptr, nullptr, 0});
  std::exception_ptr ignored;  // of reads ahead, whose slots nobody else can have while they are read
  while (backing_->num_pending() > 0) collect(true, &ignored);
  make_room(0, -1, true);
}

void Cache::set_policy(Policy policy) {
  require(!is_open_, "a request is open");
  if (policy.size() != policy_.size()) throw std::invalid_argument("Cache: expected a score of each expert");
  policy.set_uses(policy_.uses());
  policy_ = std::move(policy);
  victims_ = Victims(std::max(shape_.num_layers, 1), std::max(shape_.num_experts, 1));
  for (int e = 0; e < num_experts(); ++e) note(e);
}

/// What `may_go` says of an expert may have changed.
void Cache::note(int e) {
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

/// The expert to drop first: the lowest score, of equals that in the lowest slot; -1 for none. What the request still
/// wants is not dropped if it is to be spared, what is wanted soon never is.
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

/// Frees committed pages of unused slots, then evicts, until `pages` more fit.
bool Cache::make_room(uint32_t pages, int keep_slot, bool spare_wanted) {
  while (committed_pages_ + pages > budget_pages_) {
    int unused = free_committed_.first();
    if (unused >= 0 && unused == keep_slot) unused = free_committed_.after(unused);
    if (unused >= 0) {
      trim(unused, 0);
      continue;
    }
    const int victim = find_victim(spare_wanted);
    if (victim < 0) return false;
    evict(victim);
  }
  return true;
}

/// Finds or frees a slot with `need` pages for an expert, which is wanted now or soon. Returns false when there is none
/// to be had.
bool Cache::find_room(int e, uint32_t need, bool spare_wanted, int* slot) {
  pins_[e] += 1;  // an upgrade must not evict its own lower rungs
  int candidate = slot_of_[e];
  if (candidate < 0) {
    // A slot that has its pages is better than an empty one: nothing is faulted in again.
    const int last = free_.last();
    const bool usable = last >= 0 && (slots_[last].pages > 0 || committed_pages_ + need <= budget_pages_);
    const int victim = usable ? -1 : find_victim(spare_wanted);
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
  if (levels_[e] >= use->level) {  // came with an earlier use
    use->step = Step::kReady;
    ready_.push_back(position);
    pin(e, 1);
    return Load::kStarted;
  }
  const uint32_t need = pages_at(e, use->level);
  bool has_room = find_room(e, need, true, &slot);
  if (!has_room && !ahead_list_.empty()) {
    set_ahead({nullptr, nullptr, 0});  // gives up what is wanted soon, as far as it has not begun
    has_room = find_room(e, need, true, &slot);
  }
  // Experts that this request still wants are dropped only when nothing else can be and nothing is under way.
  if (!has_room && given_.empty() && backing_->num_pending() == 0 && ready_.empty()) {
    has_room = find_room(e, need, false, &slot);
  }
  if (!has_room) return Load::kNoRoom;
  use->step = Step::kLoading;
  num_loading_ += 1;
  start_read(e, slot, use->level, false);
  return Load::kStarted;
}

/// Starts what waits, in order, until there is no room. Returns whether there was for all.
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
  const std::vector<int> before = std::move(ahead_list_);
  ahead_list_.clear();
  for (int e : before) ahead_[e] = 0;
  for (int i = 0; i < ahead.count; ++i) {
    const int e = ahead.experts[i];
    if (ahead_[e] == 0) ahead_list_.push_back(e);
    ahead_[e] = std::max(ahead_[e], int8_t(level_of(e, ahead.levels[i])));
  }
  for (int e : ahead_list_) note(e);
  for (int e : before) {
    note(e);
    const int slot = slot_of_[e];
    if (ahead_[e] || slot < 0 || slots_[slot].target == 0 || !slots_[slot].is_ahead || wanted_[e]) continue;
    if (!backing_->cancel(slot)) continue;
    stats_.ahead_reads -= 1;
    finish(slot, false, nullptr, nullptr);
  }
}

/// Starts reads ahead in their order, as long as there is room that nothing wanted takes.
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
  bool ascending = offsets[0] >= 0;
  for (int i = 0; i < now.count; ++i) {
    int8_t& asked = asked_[now.experts[i]];
    ascending = ascending && asked < now.levels[i] && offsets[i] <= offsets[i + 1];
    asked = now.levels[i];
  }
  for (int i = 0; i < now.count; ++i) asked_[now.experts[i]] = 0;
  if (!ascending)
    throw std::invalid_argument(
        "Cache: offsets do not ascend from 0, or an expert is asked for twice, and not at more bits");
  std::exception_ptr ignored;  // of reads ahead; who wants the expert reads it again
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
      continue;
    }
    pin(e, 1);
    stats_.hits += 1;
    Slot& slot = slots_[slot_of_[e]];
    if (slot.target == 0 && slot.is_ahead) {
      slot.is_ahead = false;
      stats_.ahead_used += 1;
    }
  }
  set_ahead(ahead);
  if (load_waiting()) load_ahead();
}

/// A fetch ended, failed for the reason `why`, or was taken back; the first reason that concerns the request goes to
/// `error`.
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
    // An expert that was evicted for this request's sake, an upgrade, or a read that waited for room.
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
  return true;
}

ExpertView Cache::view(int e, int level) const {
  require(backing_->keeps_bytes(), "view of an expert that was never read: the cache is dry");
  require(e >= 0 && e < num_experts() && level >= 1 && levels_[e] >= level && pins_[e] > 0,
          "view of an expert that is not pinned at that level");
  level = rungs_at(e, level);
  ExpertView v;
  NestedMatrix* matrices[3] = {&v.gate, &v.up, &v.down};
  for (size_t m = 0; m < 3; ++m) {
    matrices[m]->scheme = shape_.scheme;
    matrices[m]->row_scales = shape_.row_scales;
    set_ranks(shape_, m, matrices[m]);
    std::tie(matrices[m]->rows, matrices[m]->cols) = matrix_shape(shape_, m);
    matrices[m]->num_rungs = level;
  }
  const uint8_t* base = backing_->view(slot_of_[e]);
  for (int r = 0; r < level; ++r) {
    const uint8_t* p = base + (r == 0 ? 0 : shape_.ends[r - 1]);
    for (int m = 0; m < 3; ++m) {
      matrices[m]->widths[r] = shape_.rung_widths[r][m];
      matrices[m]->rungs[r] = p;
      p += rung_bytes(shape_.scheme, matrices[m]->rows, matrices[m]->cols, form_of(*matrices[m], r));
    }
  }
  if (v.down.basis_rank) v.down.basis = own_basis_of(v.down);
  return v;
}

const uint8_t* Cache::record(int e, int rungs) const {
  require(e >= 0 && e < num_experts(), "record of no expert");
  return levels_[e] > 0 && rungs_at(e, levels_[e]) >= rungs ? backing_->view(slot_of_[e]) : nullptr;
}

std::vector<std::pair<const uint8_t*, size_t>> Cache::resident() const {
  std::vector<std::pair<const uint8_t*, size_t>> out;
  for (int i = 0; backing_->keeps_bytes() && i < int(slots_.size()); ++i) {
    const Slot& s = slots_[size_t(i)];
    if (s.owner >= 0 && s.target == 0 && s.pages > 0) out.push_back({backing_->view(i), size_t(s.pages) * kPage});
  }
  return out;
}

CacheStats Cache::stats() const {
  CacheStats s = stats_;
  s.committed_bytes = size_t(committed_pages_) * kPage;
  s.peak_bytes = size_t(peak_pages_) * kPage;
  s.budget_bytes = size_t(budget_pages_) * kPage;
  return s;
}

void Cache::check_integrity() const {
  size_t resident = 0, committed = 0;
  int count = 0;
  for (int e = 0; e < num_experts(); ++e) {
    require(levels_[e] >= 0 && levels_[e] <= max_level_, "level outside the ladder");
    const int slot = slot_of_[e], target = slot >= 0 ? slots_[slot].target : 0;
    require(pins_[e] >= (target > 0) && (is_open_ || pins_[e] == (target > 0)), "a pin was not released");
    require(is_open_ || wanted_[e] == 0, "wanted by nobody");
    require(slot >= 0 || levels_[e] == 0, "resident without a slot");
    require(victims_.has(e) == may_go(e), "a victim that may not go, or one that is missing");
    if (slot < 0) continue;
    require(slots_[slot].owner == e, "slot and expert disagree");
    require(slots_[slot].pages == pages_at(e, std::max(target, int(levels_[e]))), "slot and expert differ in size");
    if (levels_[e] == 0) continue;
    resident += bytes_at(e, levels_[e]);
    ++count;
  }
  for (const Slot& s : slots_) committed += s.pages;
  require(committed == committed_pages_ && committed <= budget_pages_, "committed pages do not add up");
  require(resident == stats_.resident_bytes && count == stats_.resident_experts, "residents do not add up");
  const size_t owned = size_t(std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.owner >= 0; }));
  const auto is_idle = [](const Slot& s) { return s.owner < 0 && s.pages > 0; };
  const size_t idle = size_t(std::count_if(slots_.begin(), slots_.end(), is_idle));
  require(owned + size_t(free_.count()) == slots_.size(), "slots do not add up");
  require(idle == size_t(free_committed_.count()), "free slots with pages do not add up");
  const auto count_of = [this](Step step) {
    return std::count_if(uses_.begin(), uses_.end(), [step](const Use& u) { return u.step == step; });
  };
  require(count_of(Step::kWaiting) == std::ptrdiff_t(waiting_.size()) && count_of(Step::kLoading) == num_loading_ &&
              count_of(Step::kReady) == std::ptrdiff_t(ready_.size()) &&
              count_of(Step::kGiven) == std::ptrdiff_t(given_.size()),
          "steps of the request do not add up");
  require(victims_.is_sound(policy_), "a layer's lowest score is not its lowest");
}

}  // namespace edgemoe
