#include "cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "clock.h"
#include "error.h"

namespace edgemoe {
namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::logic_error(std::string("cache: ") + what);
}

}  // namespace

Cache::Cache(std::shared_ptr<const File> file, ExpertShape shape, ExpertTable table, int max_level, size_t budget_bytes,
             bool verify, int num_readers, const std::string& policy)
    : shape_(std::move(shape)),
      table_(std::move(table)),
      max_level_(max_level),
      verify_(verify),
      budget_pages_(uint32_t(std::min<size_t>(budget_bytes / kPage, UINT32_MAX))),
      policy_(policy, int(table_.offsets.size())),
      loader_(std::move(file), num_readers) {
  const size_t n = table_.offsets.size(), rungs = shape_.rung_widths.size();
  if (n == 0 || n > INT32_MAX || n != size_t(shape_.num_layers) * size_t(shape_.num_experts) ||
      table_.layers.size() != size_t(shape_.num_layers) || table_.crcs.size() != n * rungs ||
      shape_.ends.size() != rungs || max_level < 1 || size_t(max_level) > rungs) {
    throw std::invalid_argument("Cache: expected one offset per expert, one sum per rung and a level of the ladder");
  }
  window_bytes_ = slot_bytes(max_level);
  if (size_t(budget_pages_) * kPage < window_bytes_) {
    throw OutOfBudget("cache: one expert takes " + std::to_string(window_bytes_) + " bytes; the budget is " +
                      std::to_string(budget_bytes));
  }
  // Address space for as many as could be resident at the lowest level.
  const size_t num_slots = std::min<size_t>(n, size_t(budget_pages_) * kPage / slot_bytes(1));
  memory_ = Memory(num_slots * window_bytes_);
  if (num_slots == n && num_slots * window_bytes_ <= size_t(budget_pages_) * kPage) memory_.prefer_huge_pages();
  slots_.resize(num_slots);
  for (size_t i = num_slots; i-- > 0;) free_slots_.push_back(int(i));
  levels_.assign(n, 0);
  slot_of_.assign(n, -1);
  pins_.assign(n, 0);
  wanted_.assign(n, 0);
}

Cache::~Cache() {
  try {
    close();
  } catch (...) {  // a read that failed after everybody lost interest
  }
}

size_t Cache::slot_bytes(int level) const {
  if (level < 0 || level > int(shape_.ends.size())) throw std::invalid_argument("Cache: no such level");
  return level == 0 ? 0 : round_up(shape_.ends[size_t(level) - 1], system_page());
}

int Cache::find_victim(bool spare_request) const {
  int victim = -1;
  for (const Slot& slot : slots_) {
    const int e = slot.owner;
    if (e < 0 || pins_[e] > 0 || levels_[e] == 0 || (spare_request && wanted_[e])) continue;
    if (victim < 0 || policy_.score(e) < policy_.score(victim)) victim = e;
  }
  return victim;
}

void Cache::evict(int e) {
  require(pins_[e] == 0 && levels_[e] > 0, "evict of a pinned or absent expert");
  stats_.resident_bytes -= slot_bytes(levels_[e]);
  stats_.resident_experts -= 1;
  stats_.evictions += 1;
  levels_[e] = 0;
  slots_[slot_of_[e]].owner = -1;
  free_slots_.push_back(slot_of_[e]);
  slot_of_[e] = -1;
}

void Cache::trim(int slot, uint32_t keep) {
  Slot& s = slots_[slot];
  if (s.pages <= keep) return;
  memory_.release(size_t(slot) * window_bytes_ + size_t(keep) * kPage, size_t(s.pages - keep) * kPage);
  committed_pages_ -= s.pages - keep;
  s.pages = keep;
}

/// Frees committed pages of unused slots, then evicts, until `pages` more fit.
bool Cache::make_room(uint32_t pages, int keep_slot, bool spare_request) {
  while (committed_pages_ + pages > budget_pages_) {
    bool trimmed = false;
    for (int s : free_slots_) {
      if (s == keep_slot || slots_[s].pages == 0) continue;
      trim(s, 0);
      trimmed = true;
      break;
    }
    if (trimmed) continue;
    const int victim = find_victim(spare_request);
    if (victim < 0) return false;
    evict(victim);
  }
  return true;
}

/// Finds room for an expert and starts its read. Returns false when everything is pinned.
bool Cache::try_load(Use* use, int position) {
  const int e = use->expert, from = levels_[e];
  const uint32_t need = pages_at(use->level);
  pins_[e] += 1;  // an upgrade must not evict its own lower rungs
  bool has_room = false;
  int slot = slot_of_[e];
  for (const bool spare_request : {true, false}) {
    // Experts that this request still wants are dropped only when nothing else can be and nothing is under way.
    if (!spare_request) {
      if (!given_.empty() || loader_.num_pending() > 0) break;
      if (std::any_of(uses_.begin(), uses_.end(), [](const Use& u) { return u.step == Step::kReady; })) break;
    }
    int candidate = slot;
    if (candidate < 0) {
      // A slot that has its pages is better than an empty one: nothing is faulted in again.
      const bool usable =
          !free_slots_.empty() && (slots_[free_slots_.back()].pages > 0 || committed_pages_ + need <= budget_pages_);
      const int victim = usable ? -1 : find_victim(spare_request);
      if (victim >= 0) evict(victim);
      if (free_slots_.empty()) continue;
      candidate = free_slots_.back();
    }
    const uint32_t has = slots_[candidate].pages;
    if (make_room(need > has ? need - has : 0, candidate, spare_request)) {
      slot = candidate;
      has_room = true;
      break;
    }
  }
  pins_[e] -= 1;
  if (!has_room) return false;

  ReadJob& job = use->job;
  const size_t begin = slot_bytes(from);
  job.offset = table_.offsets[e] + begin;
  job.length = size_t(need) * kPage - begin;
  job.to = slot_base(slot) + begin;
  job.tag = position;
  for (int r = from; verify_ && r < use->level; ++r) {
    const uint32_t start = r == 0 ? 0 : shape_.ends[r - 1];
    job.checks.push_back({slot_base(slot) + start, shape_.ends[r] - start, table_.crcs[e * shape_.ends.size() + r],
                          table_.layers[e / shape_.num_experts], e % shape_.num_experts, r});
  }
  if (slot_of_[e] < 0) {
    // Mostly the last one.
    free_slots_.erase(std::find(free_slots_.rbegin(), free_slots_.rend(), slot).base() - 1);
    slot_of_[e] = slot;
    slots_[slot].owner = e;
  }
  trim(slot, need);  // its last owner may have been larger
  committed_pages_ += need - slots_[slot].pages;
  slots_[slot].pages = need;
  peak_pages_ = std::max(peak_pages_, committed_pages_);
  loader_.submit(&job);
  pins_[e] += 1;
  use->step = Step::kLoading;
  return true;
}

void Cache::check_request(const int32_t* experts, const int8_t* levels, const int32_t* offsets, int n) const {
  std::vector<uint8_t> seen(levels_.size(), 0);
  for (int i = 0; i < n; ++i) {
    const int32_t e = experts[i];
    if (e < 0 || e >= num_experts() || levels[i] < 1 || levels[i] > max_level_ || offsets[i + 1] < offsets[i]) {
      throw std::invalid_argument("Cache: expert " + std::to_string(e) + " at level " + std::to_string(levels[i]) +
                                  " is outside the file or above the engine's bits");
    }
    if (seen[size_t(e)]++) throw std::invalid_argument("Cache: an expert is asked for twice");
  }
}

void Cache::begin(const int32_t* experts, const int8_t* levels, const int32_t* offsets, int n, int num_tokens) {
  require(!is_open_, "a request is open");
  check_request(experts, levels, offsets, n);
  is_open_ = true;
  if (n > 0) policy_.advance(experts[0] / shape_.num_experts, num_tokens);
  for (int i = 0; i < n; ++i) {
    const int e = experts[i];
    uses_.push_back({e, levels[i], Step::kWaiting, {}});
    wanted_[e] = 1;
    policy_.use(e, offsets[i + 1] - offsets[i]);
    for (int r = 0; r < levels[i]; ++r) stats_.bits += shape_.rung_widths[r][0];
    if (levels_[e] >= levels[i]) {
      uses_.back().step = Step::kReady;
      pins_[e] += 1;
      stats_.hits += 1;
    } else {
      stats_.misses += 1;
    }
  }
  for (int i = 0; i < n; ++i) {
    if (uses_[i].step == Step::kWaiting && !try_load(&uses_[i], i)) break;
  }
}

void Cache::finish(ReadJob* job, std::exception_ptr* error) {
  Use& use = uses_[job->tag];
  const int e = use.expert;
  if (job->error || job->is_cancelled) {
    if (!*error) *error = job->error;
    job->error = nullptr;
    pins_[e] -= 1;
    use.step = Step::kDone;
    if (levels_[e] == 0) {
      free_slots_.push_back(slot_of_[e]);
      slots_[slot_of_[e]].owner = -1;
      slot_of_[e] = -1;
    } else {
      trim(slot_of_[e], pages_at(levels_[e]));
    }
    return;
  }
  if (levels_[e] == 0) stats_.resident_experts += 1;
  stats_.resident_bytes += slot_bytes(use.level) - slot_bytes(levels_[e]);
  levels_[e] = int8_t(use.level);
  use.step = Step::kReady;
}

void Cache::next(std::vector<int>* group) {
  group->clear();
  if (!is_open_) return;
  for (int i : given_) {
    pins_[uses_[i].expert] -= 1;
    uses_[i].step = Step::kDone;
  }
  given_.clear();
  std::vector<ReadJob*> done;
  for (bool wait = false;; wait = true) {
    const double start = wait ? now_s() : 0;
    loader_.collect(wait, &done);
    if (wait) stats_.wait_s += now_s() - start;
    std::exception_ptr error;
    for (ReadJob* job : done) finish(job, &error);
    done.clear();
    if (error) {
      close();
      std::rethrow_exception(error);
    }
    bool left = false;
    for (int i = 0; i < int(uses_.size()); ++i) {
      if (uses_[i].step != Step::kWaiting) continue;
      left = true;
      // An expert that was evicted for this request's sake, or a reading that waited for room.
      if (!try_load(&uses_[i], i)) break;
    }
    for (int i = 0; i < int(uses_.size()); ++i) {
      if (uses_[i].step != Step::kReady) continue;
      uses_[i].step = Step::kGiven;
      wanted_[uses_[i].expert] = 0;
      group->push_back(i);
    }
    if (!group->empty()) {
      given_ = *group;
      return;
    }
    if (loader_.num_pending() == 0) {
      if (!left) return close();
      close();
      throw OutOfBudget("cache: no slot can be freed for an expert");
    }
  }
}

void Cache::close() {
  if (!is_open_) return;
  std::vector<ReadJob*> done;
  std::exception_ptr ignored;
  loader_.cancel();
  while (loader_.num_pending() > 0) loader_.collect(true, &done);
  for (ReadJob* job : done) finish(job, &ignored);
  for (const Use& use : uses_) {
    if (use.step == Step::kReady || use.step == Step::kGiven) pins_[use.expert] -= 1;
    wanted_[use.expert] = 0;
  }
  uses_.clear();
  given_.clear();
  is_open_ = false;
}

bool Cache::shrink(int e, int level) {
  if (e < 0 || e >= num_experts() || level < 0) throw std::invalid_argument("Cache: no such expert or level");
  if (level >= levels_[e]) return true;
  if (pins_[e] > 0) return false;
  if (level == 0) {
    evict(e);
    return true;
  }
  stats_.resident_bytes -= slot_bytes(levels_[e]) - slot_bytes(level);
  trim(slot_of_[e], pages_at(level));
  levels_[e] = int8_t(level);
  return true;
}

ExpertView Cache::view(int e, int level) const {
  require(e >= 0 && e < num_experts() && level >= 1 && levels_[e] >= level && pins_[e] > 0,
          "view of an expert that is not pinned at that level");
  ExpertView v;
  const int d = shape_.hidden, h = shape_.expert_hidden;
  NestedMatrix* matrices[3] = {&v.gate, &v.up, &v.down};
  for (int m = 0; m < 3; ++m) {
    matrices[m]->rows = m == 2 ? d : h;
    matrices[m]->cols = m == 2 ? h : d;
    matrices[m]->num_rungs = level;
  }
  const uint8_t* base = slot_base(slot_of_[e]);
  for (int r = 0; r < level; ++r) {
    const uint8_t* p = base + (r == 0 ? 0 : shape_.ends[r - 1]);
    for (int m = 0; m < 3; ++m) {
      const int width = shape_.rung_widths[r][m];
      matrices[m]->widths[r] = uint8_t(width);
      matrices[m]->rungs[r] = p;
      p += rung_bytes(matrices[m]->rows, matrices[m]->cols, width, r == 0);
    }
  }
  return v;
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
    require(pins_[e] >= 0 && (is_open_ || pins_[e] == 0), "a pin was not released");
    require((slot_of_[e] >= 0) || levels_[e] == 0, "resident without a slot");
    if (slot_of_[e] >= 0) require(slots_[slot_of_[e]].owner == e, "slot and expert disagree");
    if (levels_[e] == 0) continue;
    require(is_open_ || slots_[slot_of_[e]].pages == pages_at(levels_[e]), "slot and expert differ in size");
    resident += slot_bytes(levels_[e]);
    ++count;
  }
  for (const Slot& s : slots_) committed += s.pages;
  require(committed == committed_pages_ && committed <= budget_pages_, "committed pages do not add up");
  require(resident == stats_.resident_bytes && count == stats_.resident_experts, "residents do not add up");
  const size_t owned = size_t(std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.owner >= 0; }));
  require(owned + free_slots_.size() == slots_.size(), "slots do not add up");
}

}  // namespace edgemoe
