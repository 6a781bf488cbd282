// Where the bytes behind a cache's books lie, and how they come there: host pages with a loader, or nowhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "loader.h"

namespace edgemoe {

/// What a slot is to get: rungs [from, to) of an expert, which are bytes [begin, end) of its record and of the slot.
struct Fetch {
  int slot;
  int expert;
  int from, to;
  size_t begin, end;
  bool is_ahead;  ///< begins only when nothing else waits
};

/// A fetch that ended; `error` says why when it failed.
struct Arrival {
  int slot;
  std::exception_ptr error;
};

/// The bytes of a cache's slots. It keeps no books: `Cache` says what lies where, and calls from one thread. A slot
/// has at most one fetch under way. A tier is a cache whose backing takes its fetches from the cache below.
class Backing {
 public:
  virtual ~Backing() = default;

  /// Whether there are any; else every fetch ends at once and `view` has nothing to show.
  virtual bool keeps_bytes() const = 0;
  /// What slots take and give back is a multiple of this.
  virtual size_t granule() const = 0;

  /// Comes first and once: slots [0, num_slots) of `window` bytes, side by side, which take no room before something
  /// is fetched. Throws std::invalid_argument when it has not as many experts, OutOfBudget when there is no room.
  virtual void reserve(int num_experts, int num_slots, size_t window) = 0;
  /// Whether all of all experts fits, so that no slot will change hands.
  virtual void expect_all(bool yes) = 0;

  /// Begins to bring what a slot is to get; its bytes take room from now on. Returns whether it is there already; else
  /// `collect` tells.
  virtual bool fetch(const Fetch& what) = 0;
  /// Takes a slot's fetch back unless it has begun; such a one is not collected. Returns whether it did.
  virtual bool cancel(int slot) = 0;
  /// A slot's fetch that is ahead is wanted now.
  virtual void promote(int slot) = 0;
  /// Moves what ended to `done`; waits for one if `wait` and any is under way.
  virtual void collect(bool wait, std::vector<Arrival>* done) = 0;
  /// Fetches begun and not yet collected.
  virtual int num_pending() const = 0;

  /// Bytes [begin, end) of a slot, whole granules, take no room any more.
  virtual void release(int slot, size_t begin, size_t end) = 0;
  /// The first byte of a slot.
  virtual const uint8_t* view(int slot) const = 0;
  /// The same for the kernels of a device.
  virtual const uint8_t* view_there(int slot) const { return view(slot); }

  /// Any thread may ask.
  virtual LoaderStats stats() const = 0;
};

/// Where the experts lie in the file, or in files of others beside it; expert e is layer_index * num_experts + expert.
struct ExpertTable {
  std::vector<uint64_t> offsets;                      ///< [n], of records
  std::vector<uint32_t> crcs;                         ///< [n, rungs]
  std::vector<uint32_t> ends;                         ///< [rungs], rung r is [ends[r - 1], ends[r]) of a record
  std::vector<int> layers;                            ///< the layer numbers, for errors
  std::vector<std::shared_ptr<const File>> others{};  ///< files beside the first
  std::vector<uint8_t> file_of{};                     ///< [n], 0 for the first file; empty where there are no others
  std::vector<int32_t> names{};                       ///< [n], what errors call each in its layer; empty for its place
};

/// Host memory that a file is read into by `num_readers` threads; `verify` checks every rung's sum.
/// Throws std::invalid_argument when the table's parts do not fit each other.
std::unique_ptr<Backing> make_host_backing(std::shared_ptr<const File> file, ExpertTable table, bool verify,
                                           int num_readers);

/// Nothing is read or kept, every fetch ends at once: for replaying traces.
std::unique_ptr<Backing> make_dry_backing();

}  // namespace edgemoe
