// Where the bytes of a cache's slots lie and how they get there: host pages that a loader fills, or nowhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "loader.h"

namespace edgemoe {

/// What to bring into a slot: rungs [from, to) of an expert, bytes [begin, end) of its record and of the slot.
struct Fetch {
  int slot;
  int expert;
  int from, to;
  size_t begin, end;
  bool is_ahead;  ///< ahead of need: begins only when nothing else waits
};

/// A fetch that ended; `error` says why when it failed.
struct Arrival {
  int slot;
  std::exception_ptr error;
};

/// The bytes of a cache's slots. It does no bookkeeping: `Cache` knows what lies where, and calls from one thread. A
/// slot has at most one fetch in flight. A tier is a cache whose backing fetches from the cache below it.
class Backing {
 public:
  virtual ~Backing() = default;

  /// Whether there are bytes at all; if not, every fetch ends at once and `view` has nothing to show.
  virtual bool keeps_bytes() const = 0;
  /// What slots take and give back is a multiple of this many bytes.
  virtual size_t granule() const = 0;

  /// Called once, before all else: makes slots [0, num_slots) of `window` bytes, side by side, which take no memory
  /// before something is fetched. Throws std::invalid_argument unless the backing has `num_experts` experts,
  /// OutOfBudget when there is no room.
  virtual void reserve(int num_experts, int num_slots, size_t window) = 0;
  /// Says whether all experts fit at the highest level, so that no slot will ever get another expert.
  virtual void expect_all(bool yes) = 0;

  /// Begins a fetch, whose bytes take memory from now on. Returns whether it is done; else `collect` reports its end.
  virtual bool fetch(const Fetch& what) = 0;
  /// Cancels a slot's fetch unless it has begun; a cancelled fetch is not collected. Returns whether it was cancelled.
  virtual bool cancel(int slot) = 0;
  /// Makes a slot's fetch ahead of need an urgent one.
  virtual void promote(int slot) = 0;
  /// Appends the fetches that ended to `done`; with `wait`, waits for one if any is pending.
  virtual void collect(bool wait, std::vector<Arrival>* done) = 0;
  /// Fetches begun and not yet collected.
  virtual int num_pending() const = 0;

  /// Gives back the memory of bytes [begin, end) of a slot, whole granules.
  virtual void release(int slot, size_t begin, size_t end) = 0;
  /// The first byte of a slot.
  virtual const uint8_t* view(int slot) const = 0;
  /// The same for the kernels of a device.
  virtual const uint8_t* view_there(int slot) const { return view(slot); }

  /// Any thread may call this.
  virtual LoaderStats stats() const = 0;
};

/// Where the experts lie in the file, or in other files beside it; expert e is layer_index * num_experts + expert.
struct ExpertTable {
  std::vector<uint64_t> offsets;                      ///< [n], of records
  std::vector<uint32_t> crcs;                         ///< [n, rungs]
  std::vector<uint32_t> ends;                         ///< [rungs], rung r is [ends[r - 1], ends[r]) of a record
  std::vector<int> layers;                            ///< the layer numbers, for errors
  std::vector<std::shared_ptr<const File>> others{};  ///< files beside the first
  std::vector<uint8_t> file_of{};                     ///< [n], 0 for the first file, i for others[i - 1]; empty: all 0
  std::vector<int32_t> names{};                       ///< [n], each one's number in error messages; empty: its index
};

/// Returns host memory that `num_readers` threads read the file into; with `verify`, every rung's checksum is checked.
/// Throws std::invalid_argument when the sizes of the table's parts do not agree.
std::unique_ptr<Backing> make_host_backing(std::shared_ptr<const File> file, ExpertTable table, bool verify,
                                           int num_readers);

/// Returns a backing for replaying traces: nothing is read or kept, and every fetch ends at once.
std::unique_ptr<Backing> make_dry_backing();

}  // namespace edgemoe
