// The expert cache: which experts are resident, in how many rungs, inside a budget of bytes.
//
// A slot is a window of address space as large as one expert's record at the highest level in use; its pages take
// room only as far as the expert's level needs, so levels mix without fragmentation and the budget is exact to the
// page. A record's bytes lie in its slot as they lie in the file: one read brings any level, one more any upgrade.
// The cache keeps the books; the bytes themselves are its `Backing`'s.
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
  /// Of gate, up and down, the ranks of each rung's correction; empty for none. V is in rung 0 only for down.
  std::array<std::vector<uint8_t>, 3> ranks{};
};

/// The matrices of a resident expert.
struct ExpertView {
  NestedMatrix gate, up, down;
};

/// Each is right by itself, also while another thread uses the cache.
struct CacheStats {
  Relaxed<uint64_t> hits, misses, evictions;
  Relaxed<uint64_t> bits;           ///< summed over uses, as the ladder counts them for w_gate
  Relaxed<uint64_t> ahead_reads;    ///< reads begun for a later layer
  Relaxed<uint64_t> ahead_used;     ///< of these, experts that were then wanted while still in memory
  Relaxed<uint64_t> ahead_late;     ///< of these, still being read when wanted; counted as misses too
  Relaxed<double> wait_s;           ///< time that `next` waited for reads
  Relaxed<size_t> resident_bytes;   ///< of experts
  Relaxed<size_t> committed_bytes;  ///< of slots; what the budget bounds
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

/// Keeps the books of the slots. One thread at a time, but for what says otherwise; reads run beside it. At most one
/// request is open.
class Cache {
 public:
  /// An expert that has fewer rungs than `max_level` is whole at its last: whatever level from there on is asked for,
  /// it gives that one, and counts as resident at `max_level`. So whoever plans need not know who has how many.
  ///
  /// `rungs` [n] says how many of the ladder's each expert has: the first ones; e is layer_index * num_experts +
  /// expert. One that has none is a place without an expert, so that layers may have fewer than others. Slots are made
  /// for `most_bytes`, to which `set_budget` may raise the budget. Throws OutOfBudget when not even one expert fits at
  /// `max_level`.
  Cache(std::unique_ptr<Backing> backing, ExpertShape shape, std::vector<uint8_t> rungs, int max_level,
        size_t budget_bytes, Policy policy, size_t most_bytes = 0);
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
  ~Cache();

  /// Opens a request: experts of one layer; expert i runs offsets[i + 1] - offsets[i] of `num_tokens` tokens. One may
  /// come again at a higher level. Resident ones are pinned; reads start as far as slots are free.
  ///
  /// `ahead` replaces the experts that later requests will probably want. These are read after all others, as far as
  /// nothing wanted has to go, and are dropped last. Reads for those that are no longer on the list are taken back
  /// unless they have begun. Throws std::logic_error when a request is open.
  void begin(const Wish& now, const int32_t* offsets, int num_tokens, const Wish& ahead);

  /// Unpins the group given before and fills `group` with positions of the request that are resident now, waiting
  /// for reads if none is. An empty group means that all have been given; the request is closed then. When a read
  /// failed its error is thrown, the request is closed, and the cache stays usable.
  void next(std::vector<int>* group);

  /// Closes the open request, if any: its reads that have not started are cancelled, the others waited for. Reads
  /// ahead go on.
  void close();

  /// Counts uses that nothing was asked for: one token's of experts that were here, layer after layer.
  void count(const Wish& used);

  /// A resident expert's matrices at `level`, or at its last. Valid while pinned.
  ExpertView view(int expert, int level) const { return view(expert, level, false); }
  /// The same for the kernels of a device, where its memory holds the slots, or shares them.
  ExpertView view_there(int expert, int level) const { return view(expert, level, true); }
  /// One of both, `there` or not, where it is resident so, pinned or not: what lies there may change.
  std::optional<ExpertView> glance(int expert, int level, bool there) const;

  /// Level of each expert, 0 = absent; `max_level` once all that it has is there. Any thread may look.
  const std::vector<Relaxed<int8_t>>& residency() const { return levels_; }
  int num_experts() const { return int(levels_.size()); }

  /// How often each expert was read since the start, in whole or in part; how many tokens it ran; how often it was
  /// wanted while it was not there, or not at these bits. They wrap around. Any thread may look.
  const std::vector<Relaxed<uint32_t>>& reads() const { return reads_; }
  const std::vector<Relaxed<uint32_t>>& runs() const { return runs_; }
  const std::vector<Relaxed<uint32_t>>& lacks() const { return lacks_; }

  /// How much each expert was used; see Policy.
  std::vector<double> uses() const { return policy_.uses(); }
  void set_uses(const std::vector<double>& uses) { policy_.set_uses(uses); }

  const ExpertShape& shape() const { return shape_; }
  const std::vector<uint8_t>& rungs() const { return rungs_; }
  int max_level() const { return max_level_; }
  /// The level of a precision, as the ladder counts it for w_gate; 0 for none.
  int8_t level_of_bits(int bits) const {
    size_t level = level_bits_.size() - 1;
    while (level > 0 && level_bits_[level] != uint32_t(bits)) --level;
    return int8_t(level);
  }
  /// Slots that an expert has, or is being read to.
  int taken_slots() const { return int(slots_.size()) - free_.count(); }

  /// The bytes of an expert's first `rungs` rungs, null unless all are resident; until the next call of anything here.
  const uint8_t* record(int expert, int rungs) const;

  /// Lowers an expert that is not pinned to `level`. Returns false when it is pinned.
  bool shrink(int expert, int level);

  /// What has to go is from now on lowered to `level` first, and goes as a whole only when all that may go has no more
  /// than that; 0 for evicting at once. Throws std::logic_error when a request is open.
  void keep(int level);

  /// Another policy decides from now on; it starts from the uses so far. Throws std::logic_error when a request is
  /// open.
  void set_policy(Policy policy);

  /// Changes what the slots may take from now on, at most what they were made for. What no longer fits is dropped and
  /// its pages are given back before this returns. Throws std::logic_error when a request is open, OutOfBudget when not
  /// even one expert fits; the budget is as before then.
  void set_budget(size_t bytes);

  /// All slots, one after the other, for tests: what is touched of it is resident.
  const uint8_t* slots() const { return backing_->view(0); }
  /// Whether `next` has something to give without waiting, of what was there when the request began.
  bool has_ready() const { return !ready_.empty(); }
  size_t slots_bytes() const { return backing_->keeps_bytes() ? slots_.size() * window_bytes_ : 0; }

  /// The pages of whole experts, as {first byte, size}.
  std::vector<std::pair<const uint8_t*, size_t>> resident() const;

  /// Any thread may ask.
  CacheStats stats() const;
  LoaderStats loader_stats() const { return backing_->stats(); }

  /// Throws std::logic_error when the books do not agree.
  void check_integrity() const;

  /// Bytes that an expert with all rungs takes in a slot at `level`, whole granules of the backing.
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
  /// Whether nothing needs an expert: neither the request nor a read, and it is not wanted soon.
  bool may_go(int expert) const {
    return levels_[expert] > 0 && pins_[expert] == 0 && wanted_[expert] == 0 && ahead_[expert] == 0;
  }
  /// Whether it may go and has more than what is kept for longer.
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
  /// Of the rungs that `level` asks for, how many an expert has.
  int rungs_at(int expert, int level) const { return std::min(level, int(rungs_[size_t(expert)])); }
  /// The level that an expert is at when `level` is asked for: the highest of those that are the same for it.
  int level_of(int expert, int level) const { return level < rungs_[size_t(expert)] ? level : max_level_; }
  uint32_t pages_at(int expert, int level) const { return level_pages_[size_t(rungs_at(expert, level))]; }
  size_t bytes_at(int expert, int level) const { return size_t(pages_at(expert, level)) * kPage; }

  std::unique_ptr<Backing> backing_;
  ExpertShape shape_;
  std::vector<uint8_t> rungs_;
  int max_level_;
  size_t num_there_ = 0;  ///< experts that have rungs
  size_t window_bytes_ = 0;
  std::vector<uint32_t> level_pages_;  ///< that an expert takes, by rungs
  std::vector<uint32_t> level_bits_;   ///< of w_gate, likewise
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
  SlotList free_;              ///< slots without an owner; the last one that was freed is taken first
  SlotList free_committed_;    ///< those of them that have pages
  std::vector<Use> uses_;      ///< of the open request
  std::vector<int> last_use_;  ///< of each expert, -1 = none
  std::vector<int> waiting_, ready_,
      given_;            ///< positions in the request whose step this is, in order but for `ready_`
  int num_loading_ = 0;  ///< likewise
  bool is_open_ = false;
  Policy policy_;
  Victims victims_;    ///< all that may go
  Victims lowerable_;  ///< those of them that may be lowered
  int kept_level_ = 0;
  CacheStats stats_;
  std::vector<Arrival> arrived_;  ///< scratch of `collect`
};

}  // namespace edgemoe
