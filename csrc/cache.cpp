#include "cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "error.h"
#include "matrix.h"

namespace edgemoe {
namespace {

/// Rows and columns of gate, up or down.
std::pair<int, int> matrix_shape(const ExpertShape& s, size_t m) {
  if (m == 2) return {s.hidden, s.expert_hidden};
  return {m == 0 && !s.gated ? 0 : s.expert_hidden, s.hidden};
}

/// Sets the ranks of the corrections of matrix `m`: gate, up or down.
void set_ranks(const ExpertShape& s, size_t m, NestedMatrix* w) {
  const auto& ranks = s.ranks[m];
  std::copy(ranks.begin(), ranks.end(), w->ranks);
  if (m == 2) w->basis_rank = uint8_t(highest_rank(ranks));
}

/// Throws std::invalid_argument unless the widths are valid ladders and each rung ends where it must for experts of
/// this shape: `view` computes pointers from both. A dry cache has no bytes; there the ends need only ascend.
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

uint32_t Cache::pages_in(size_t bytes) { return uint32_t(std::min<size_t>(bytes / kPage, INT32_MAX)); }

void Cache::require(bool ok, const char* what) {
  if (!ok) throw std::logic_error(std::string("cache: ") + what);
}

Cache::Cache(std::unique_ptr<Backing> backing, ExpertShape shape, std::vector<uint8_t> rungs, int max_level,
             size_t budget_bytes, Policy policy, size_t most_bytes)
    : backing_(std::move(backing)),
      shape_(std::move(shape)),
      rungs_(std::move(rungs)),
      max_level_(max_level),
      budget_pages_(pages_in(budget_bytes)),
      most_pages_(pages_in(std::max(budget_bytes, most_bytes))),
      policy_(std::move(policy)),
      victims_(std::max(shape_.num_layers, 1), std::max(shape_.num_experts, 1)),
      lowerable_(victims_) {
  const size_t n = rungs_.size(), num_rungs = shape_.rung_widths.size();
  if (n == 0 || n > INT32_MAX || n != size_t(shape_.num_layers) * size_t(shape_.num_experts) ||
      shape_.ends.size() != num_rungs || max_level < 1 || size_t(max_level) > num_rungs || policy_.size() != n) {
    throw std::invalid_argument("Cache: expected rungs and a score of each expert and a level of the ladder");
  }
  check_shape(shape_, !backing_->keeps_bytes());
  int most = 0;
  for (const uint8_t have : rungs_) {
    if (have > num_rungs) throw std::invalid_argument("Cache: expected no expert to have more rungs than the ladder");
    most = std::max(most, std::min(max_level, int(have)));
    num_there_ += have > 0;
  }
  if (num_there_ == 0) throw std::invalid_argument("Cache: expected some experts to have rungs of the ladder");
  for (size_t level = 0; level <= num_rungs; ++level) {
    level_pages_.push_back(uint32_t(slot_bytes(int(level)) / kPage));
    level_bits_.push_back(level == 0 ? 0 : level_bits_.back() + shape_.rung_widths[level - 1][0]);
  }
  window_bytes_ = slot_bytes(most);
  check_budget(budget_bytes);
  // Address space for as many experts as could be resident at the lowest level.
  const size_t num_slots = std::min<size_t>(num_there_, size_t(most_pages_) * kPage / slot_bytes(1));
  slots_.resize(num_slots);
  levels_.assign(n, 0);
  reads_.assign(n, 0);
  runs_.assign(n, 0);
  lacks_.assign(n, 0);
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
  } catch (...) {  // a read failed that nobody waits for any more
  }
}

ExpertView Cache::view(int e, int level, bool there) const {
  require(backing_->keeps_bytes(), "view of an expert that was never read: the cache is dry");
  require(e >= 0 && e < num_experts() && level >= 1 && levels_[e] >= level && pins_[e] > 0,
          "view of an expert that is not pinned at that level");
  return laid_out(e, rungs_at(e, level), there);
}

std::optional<ExpertView> Cache::glance(int e, int level, bool there) const {
  require(e >= 0 && e < num_experts() && level >= 1, "glance at no expert");
  if (!backing_->keeps_bytes() || levels_[e] < level) return std::nullopt;
  return laid_out(e, rungs_at(e, level), there);
}

/// Where the first `level` rungs of an expert that has a slot lie in it.
ExpertView Cache::laid_out(int e, int level, bool there) const {
  ExpertView v;
  NestedMatrix* matrices[3] = {&v.gate, &v.up, &v.down};
  for (size_t m = 0; m < 3; ++m) {
    matrices[m]->scheme = shape_.scheme;
    matrices[m]->row_scales = shape_.row_scales;
    set_ranks(shape_, m, matrices[m]);
    std::tie(matrices[m]->rows, matrices[m]->cols) = matrix_shape(shape_, m);
    matrices[m]->num_rungs = level;
  }
  const uint8_t* base = there ? backing_->view_there(slot_of_[e]) : backing_->view(slot_of_[e]);
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
    require(lowerable_.has(e) == may_be_lowered(e), "an expert that cannot be lowered, or one that is missing");
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
  require(victims_.is_sound(policy_) && lowerable_.is_sound(policy_), "a layer's lowest score is not its lowest");
}

}  // namespace edgemoe
