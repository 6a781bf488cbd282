// The expert cache: which experts are resident, in how many rungs, inside a budget of bytes. A rung holds the bits that
// one level adds to the level below it; an expert at level n has its first n rungs.
//
// A slot is a window of address space as large as one expert's record at the highest level in use. Its pages take
// memory only as far as the expert's level needs, so levels mix without fragmentation and the budget is exact to the
// page. A record's bytes lie in its slot as they lie in the file: one read brings any level, and one more any upgrade.
// The cache does the bookkeeping; the bytes themselves belong to its `Backing`.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "backing.h"
#include "kernels/kernels.h"
#include "memory.h"
#include "policy.h"
#include "relaxed.h"
#include "slot_list.h"
#include "victims.h"

namespace edgemoe {

/// What all experts of a file have in common.
struct ExpertShape {
  Scheme scheme;
  int num_layers;                                   ///< layers with routed experts
  int num_experts;                                  ///< per layer
  int hidden;                                       ///< D
  int expert_hidden;                                ///< H
  std::vector<std::array<uint8_t, 3>> rung_widths;  ///< per rung, the bits it adds to gate, up and down
  std::vector<uint32_t> ends;                       ///< rung r is [ends[r - 1], ends[r]) of a record
  bool gated = true;                                ///< else gate is a matrix of no rows
  uint8_t row_scales = 1;                           ///< see NestedMatrix
  /// For each of gate, up and down, the ranks of each rung's correction; empty for none. Only down has V in its rung 0.
  std::array<std::vector<uint8_t>, 3> ranks{};
};

/// The matrices of a resident expert.
struct ExpertView {
  NestedMatrix gate, up, down;
};

/// Counters of a cache. Each is right by itself, even while another thread uses the cache.
struct CacheStats {
  Relaxed<uint64_t> hits, misses, evictions;
  Relaxed<uint64_t> bits;           ///< summed over uses: the bits of w_gate at the level used
  Relaxed<uint64_t> ahead_reads;    ///< reads begun for a later layer
  Relaxed<uint64_t> ahead_used;     ///< of these, experts that were then wanted while still in memory
  Relaxed<uint64_t> ahead_late;     ///< of these, still being read when wanted; counted as misses too
  Relaxed<double> wait_s;           ///< time that `next` waited for reads
  Relaxed<size_t> resident_bytes;   ///< of experts
  Relaxed<size_t> committed_bytes;  ///< of slots; the budget bounds this
  Relaxed<size_t> peak_bytes;
  Relaxed<size_t> budget_bytes;
  Relaxed<int> resident_experts;
};

/// Experts at levels, in the order in which they should be read.
struct Wish {
  const int32_t* experts;
  const int8_t* levels;
  int count;
};

/// The bookkeeping of the slots. For one thread at a time, except where a member says otherwise; reads run in the
/// background. At most one request is open.
class Cache {
 public:
  /// An expert that has fewer rungs than `max_level` is complete at its last one: a request for any level from there on
  /// gets that rung, and the expert counts as resident at `max_level`. So a planner need not know how many rungs each
  /// expert has.
  ///
  /// `rungs` [n] says how many of the ladder's rungs, counted from the first, each expert has; an expert's index is
  /// layer_index * num_experts + expert. 0 marks a place without an expert, so that layers may have fewer than others.
  /// Slots are made for `most_bytes`, to which `set_budget` may raise the budget. Throws OutOfBudget when not even one
  /// expert fits at `max_level`.
  Cache(std::unique_ptr<Backing> backing, ExpertShape shape, std::vector<uint8_t> rungs, int max_level,
        size_t budget_bytes, Policy policy, size_t most_bytes = 0);
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
  ~Cache();

  /// Opens a request for experts of one layer; expert i runs offsets[i + 1] - offsets[i] of `num_tokens` tokens. An
  /// expert may occur again at a higher level. Resident experts are pinned; reads start as far as slots are free.
  ///
  /// `ahead` replaces the list of experts that later requests will probably want. They are read after all others, as
  /// long as nothing wanted has to be dropped for them, and are dropped last. Reads for experts that are no longer on
  /// the list are cancelled unless they have begun. Throws std::logic_error when a request is open.
  void begin(const Wish& now, const int32_t* offsets, int num_tokens, const Wish& ahead);

  /// Unpins the previous group and fills `group` with the positions in the request whose experts are resident now,
  /// waiting for reads if none is. An empty group means that all have been given; the request is then closed. When a
  /// read failed, its error is thrown, the request is closed, and the cache stays usable.
  void next(std::vector<int>* group);

  /// Closes the open request, if any: its reads that have not started are cancelled, the others waited for. Reads
  /// ahead go on.
  void close();

  /// Counts the uses of one token for which no request was made, as its experts were resident; layer after layer.
  void count(const Wish& used);

  /// A resident expert's matrices at `level`, or at its last level. Valid while pinned.
  ExpertView view(int expert, int level) const { return view(expert, level, false); }
  /// The same for the kernels of a device, where the device's memory holds the slots, or shares them.
  ExpertView view_there(int expert, int level) const { return view(expert, level, true); }
  /// The view, or with `there` the device's, of an expert that is resident at `level`, pinned or not. If it is not
  /// pinned, the bytes may change at any time.
  std::optional<ExpertView> glance(int expert, int level, bool there) const;

  /// Level of each expert, 0 = absent; `max_level` once all of its rungs are resident. Any thread may read it.
  const std::vector<Relaxed<int8_t>>& residency() const { return levels_; }
  int num_experts() const { return int(levels_.size()); }

  /// Per expert since the start: how often it was read, in whole or in part; how many tokens it ran; how often it was
  /// wanted while it was absent, or at fewer bits. The counters wrap around. Any thread may read them.
  const std::vector<Relaxed<uint32_t>>& reads() const { return reads_; }
  const std::vector<Relaxed<uint32_t>>& runs() const { return runs_; }
  const std::vector<Relaxed<uint32_t>>& lacks() const { return lacks_; }

  /// How much each expert was used; see Policy.
  std::vector<double> uses() const { return policy_.uses(); }
  void set_uses(const std::vector<double>& uses) { policy_.set_uses(uses); }

  const ExpertShape& shape() const { return shape_; }
  const std::vector<uint8_t>& rungs() const { return rungs_; }
  int max_level() const { return max_level_; }
  /// The level at which w_gate has `bits` bits; 0 if there is none.
  int8_t level_of_bits(int bits) const {
    size_t level = level_bits_.size() - 1;
    while (level > 0 && level_bits_[level] != uint32_t(bits)) --level;
    return int8_t(level);
  }
  /// Slots that hold an expert or are being read into.
  int taken_slots() const { return int(slots_.size()) - free_.count(); }

  /// The bytes of an expert's first `rungs` rungs, null unless all are resident. Valid until the next call of a member.
  const uint8_t* record(int expert, int rungs) const;

  /// Lowers an expert to `level`; 0 evicts it. Returns false when that needs a change and the expert is pinned.
  bool shrink(int expert, int level);

  /// From now on, room is made by lowering experts to `level` first. Experts are evicted only once none of those that
  /// may go has more than that. 0 evicts at once. Throws std::logic_error when a request is open.
  void keep(int level);

  /// Replaces the policy; the new one starts from the uses so far. Throws std::logic_error when a request is open.
  void set_policy(Policy policy);

  /// Changes how many bytes the slots may take, at most the `most_bytes` that they were made for. Experts that no
  /// longer fit are dropped, and their pages given back, before this returns. Throws std::logic_error when a request is
  /// open, OutOfBudget when not even one expert fits; the budget then stays as it was.
  void set_budget(size_t bytes);

  /// All slots, one after the other. For tests, which look at which pages of them are resident.
  const uint8_t* slots() const { return backing_->view(0); }
  /// Whether `next` can give a group without waiting, reads that have finished since the last call not considered.
  bool has_ready() const { return !ready_.empty(); }
  size_t slots_bytes() const { return backing_->keeps_bytes() ? slots_.size() * window_bytes_ : 0; }

  /// The pages of each resident expert that is not being read, as {first byte, bytes}.
  std::vector<std::pair<const uint8_t*, size_t>> resident() const;

  /// Any thread may call this.
  CacheStats stats() const;
  LoaderStats loader_stats() const { return backing_->stats(); }

  /// Checks the bookkeeping. Throws std::logic_error when it is inconsistent.
  void check_integrity() const;

  /// Bytes that an expert with all rungs takes in a slot at `level`, in whole granules of the backing.
  size_t slot_bytes(int level) const;

 private:
  static uint32_t pages_in(size_t bytes);
  static void require(bool ok, const char* what);
  ExpertView view(int expert, int level, bool there) const;
  ExpertView laid_out(int expert, int level, bool there) const;
  enum class Step : uint8_t { kWaiting, kLoading, kReady, kGiven, kDone };
  struct Use {
    int expert;
    int level;
    int next;  ///< the expert's use before this one, -1 = none
    Step step;
  };
  struct Slot {
    int owner = -1;
    uint32_t pages = 0;     ///< committed
    int8_t target = 0;      ///< level that is being read, 0 = none; such a slot is pinned by the read
    bool is_ahead = false;  ///< read for a later layer, and not wanted since
  };
  enum class Load : uint8_t { kStarted, kBusy, kNoRoom };

  Load try_load(int position);
  bool load_waiting();
  void load_ahead();
  bool find_room(int expert, uint32_t need, bool spare_wanted, int* slot);
  void start_read(int expert, int slot, int level, bool is_ahead);
  void collect(bool wait, std::exception_ptr* error);
  void finish(int slot, bool ok, const std::exception_ptr& why, std::exception_ptr* error);
  void set_ahead(const Wish& ahead);
  void cancel_ahead();
  int find_victim(bool spare_wanted);
  bool lower_one();
  bool make_room(uint32_t pages, int keep_slot, bool spare_wanted);
  void evict(int expert);
  void free_slot(int slot);
  void pin(int expert, int count);
  void want(int expert, int count);
  /// Whether an expert may be dropped: neither the open request nor a read needs it, and it is not wanted soon.
  bool may_go(int expert) const {
    return levels_[expert] > 0 && pins_[expert] == 0 && wanted_[expert] == 0 && ahead_[expert] == 0;
  }
  /// Whether an expert may go and takes more bytes than at the level that `keep` has set.
  bool may_be_lowered(int expert) const {
    return kept_level_ > 0 && may_go(expert) && bytes_at(expert, levels_[expert]) > bytes_at(expert, kept_level_);
  }
  void note(int expert);
  void hit(int expert);
  void trim(int slot, uint32_t keep);
  void check(const Wish& wish) const;
  void check_budget(size_t bytes) const;
  /// Whether every expert can be resident at the highest level.
  bool all_fit() const {
    return slots_.size() == num_there_ && slots_.size() * window_bytes_ <= size_t(budget_pages_) * kPage;
  }
  /// How many of the rungs of `level` an expert has.
  int rungs_at(int expert, int level) const { return std::min(level, int(rungs_[size_t(expert)])); }
  /// The level at which an expert is recorded when `level` is asked for: the highest with the same rungs.
  int level_of(int expert, int level) const { return level < rungs_[size_t(expert)] ? level : max_level_; }
  uint32_t pages_at(int expert, int level) const { return level_pages_[size_t(rungs_at(expert, level))]; }
  size_t bytes_at(int expert, int level) const { return size_t(pages_at(expert, level)) * kPage; }

  std::unique_ptr<Backing> backing_;
  ExpertShape shape_;
  std::vector<uint8_t> rungs_;
  int max_level_;
  size_t num_there_ = 0;  ///< experts that have rungs
  size_t window_bytes_ = 0;
  std::vector<uint32_t> level_pages_;  ///< pages that an expert takes, by its number of rungs
  std::vector<uint32_t> level_bits_;   ///< bits of w_gate, likewise
  Relaxed<uint32_t> budget_pages_;
  uint32_t most_pages_ = 0;
  Relaxed<uint32_t> committed_pages_;
  Relaxed<uint32_t> peak_pages_;

  std::vector<Relaxed<int8_t>> levels_;
  std::vector<Relaxed<uint32_t>> reads_, runs_, lacks_;
  std::vector<int> slot_of_;
  std::vector<int> pins_;
  std::vector<uint8_t> wanted_;  ///< uses of the open request that have not been given
  std::vector<int8_t> asked_;    ///< scratch of `begin`
  std::vector<int8_t> ahead_;    ///< level that is wanted soon, 0 = not
  std::vector<int> ahead_list_;
  std::vector<int> ahead_before_;  ///< scratch of `set_ahead`
  std::vector<Slot> slots_;
  SlotList free_;              ///< slots without an owner; the one freed last is taken first
  SlotList free_committed_;    ///< those of them that have pages
  std::vector<Use> uses_;      ///< of the open request
  std::vector<int> last_use_;  ///< of each expert, -1 = none
  std::vector<int> waiting_, ready_,
      given_;            ///< positions in the request at this step, in order except for `ready_`
  int num_loading_ = 0;  ///< uses of the open request that are being read
  bool is_open_ = false;
  Policy policy_;
  Victims victims_;    ///< experts for which `may_go`
  Victims lowerable_;  ///< those of them for which `may_be_lowered`
  int kept_level_ = 0;
  CacheStats stats_;
  std::vector<Arrival> arrived_;  ///< scratch of `collect`
};

}  // namespace edgemoe
