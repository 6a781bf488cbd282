// The expert cache: which experts are resident, in how many rungs, inside a budget of bytes.
//
// A slot is a window of address space as large as one expert's record at the highest level in use; its pages take
// room only as far as the expert's level needs, so levels mix without fragmentation and the budget is exact to the
// page. A record's bytes lie in its slot as they lie in the file: one read brings any level, one more any upgrade.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "loader.h"
#include "memory.h"
#include "policy.h"

namespace edgemoe {

/// What all experts of a file have in common.
struct ExpertShape {
  int num_layers;                                   ///< layers with routed experts
  int num_experts;                                  ///< per layer
  int hidden;                                       ///< D
  int expert_hidden;                                ///< H
  std::vector<std::array<uint8_t, 3>> rung_widths;  ///< per rung, the bits it adds to gate, up and down
  std::vector<uint32_t> ends;                       ///< rung r is [ends[r - 1], ends[r]) of a record
};

/// Where the experts lie in the file; expert e is layer_index * num_experts + expert.
struct ExpertTable {
  std::vector<uint64_t> offsets;  ///< [n], of records
  std::vector<uint32_t> crcs;     ///< [n, rungs]
  std::vector<int> layers;        ///< the layer numbers, for errors
};

/// The matrices of a resident expert.
struct ExpertView {
  NestedMatrix gate, up, down;
};

struct CacheStats {
  uint64_t hits = 0, misses = 0, evictions = 0;
  uint64_t bits = 0;           ///< summed over uses, as the ladder counts them for w_gate
  double wait_s = 0;           ///< time that `next` waited for reads
  size_t resident_bytes = 0;   ///< of experts
  size_t committed_bytes = 0;  ///< of slots; what the budget bounds
  size_t peak_bytes = 0;
  size_t budget_bytes = 0;
  int resident_experts = 0;
};

/// Owns the slots. One thread at a time; reads run beside it. At most one request is open.
class Cache {
 public:
  /// Throws OutOfBudget when not even one expert fits at `max_level`.
  Cache(std::shared_ptr<const File> file, ExpertShape shape, ExpertTable table, int max_level, size_t budget_bytes,
        bool verify, int num_readers, const std::string& policy);
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
  ~Cache();

  /// Opens a request: the experts of one layer at their levels, in the order in which they should be read; expert i
  /// runs offsets[i + 1] - offsets[i] of `num_tokens` tokens. Resident ones are pinned; reads start as far as slots are
  /// free. Throws std::logic_error when one is open.
  void begin(const int32_t* experts, const int8_t* levels, const int32_t* offsets, int n, int num_tokens);

  /// Unpins the group given before and fills `group` with positions of the request that are resident now, waiting
  /// for reads if none is. An empty group means that all have been given; the request is closed then. When a read
  /// failed its error is thrown, the request is closed, and the cache stays usable.
  void next(std::vector<int>* group);

  /// Closes the open request, if any: reads that have not started are cancelled, the others waited for.
  void close();

  /// A resident expert's matrices at `level`. Valid while pinned.
  ExpertView view(int expert, int level) const;

  /// Level of each expert, 0 = absent.
  const std::vector<int8_t>& residency() const { return levels_; }
  int num_experts() const { return int(levels_.size()); }
  const ExpertShape& shape() const { return shape_; }

  /// Lowers an expert that is not pinned to `level`. Returns false when it is pinned.
  bool shrink(int expert, int level);

  CacheStats stats() const;
  LoaderStats loader_stats() const { return loader_.stats(); }

  /// Throws std::logic_error when the books do not agree.
  void check_integrity() const;

  /// Bytes that an expert takes in a slot at `level`, whole pages of the system.
  size_t slot_bytes(int level) const;

 private:
  enum class Step : uint8_t { kWaiting, kLoading, kReady, kGiven, kDone };
  struct Use {
    int expert;
    int level;
    Step step;
    ReadJob job;
  };
  struct Slot {
    int owner = -1;
    uint32_t pages = 0;  ///< committed
  };

  bool try_load(Use* use, int position);
  int find_victim(bool spare_request) const;
  bool make_room(uint32_t pages, int keep_slot, bool spare_request);
  void evict(int expert);
  void trim(int slot, uint32_t keep);
  void finish(ReadJob* job, std::exception_ptr* error);
  void check_request(const int32_t* experts, const int8_t* levels, const int32_t* offsets, int n) const;
  uint8_t* slot_base(int slot) const { return memory_.bytes() + size_t(slot) * window_bytes_; }
  uint32_t pages_at(int level) const { return uint32_t(slot_bytes(level) / kPage); }

  ExpertShape shape_;
  ExpertTable table_;
  int max_level_;
  bool verify_;
  size_t window_bytes_ = 0;
  uint32_t budget_pages_ = 0;
  uint32_t committed_pages_ = 0;
  uint32_t peak_pages_ = 0;

  std::vector<int8_t> levels_;
  std::vector<int> slot_of_;
  std::vector<int> pins_;
  std::vector<uint8_t> wanted_;  ///< belongs to the open request and has not been given
  std::vector<Slot> slots_;
  std::vector<int> free_slots_;  ///< last freed first
  std::deque<Use> uses_;         ///< of the open request; a deque, as reads hold pointers into it
  std::vector<int> given_;
  bool is_open_ = false;
  Policy policy_;
  CacheStats stats_;
  Memory memory_;
  Loader loader_;  // last: its threads end before the memory that they write to goes
};

}  // namespace edgemoe
