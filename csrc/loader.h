// Asynchronous reads: a few threads that each keep one large read in flight.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "file.h"

namespace edgemoe {

/// A rung whose sum is checked after the read.
struct Checked {
  const uint8_t* bytes;
  size_t length;
  uint32_t crc;
  int layer, expert, rung;  ///< names it in an error
};

/// One read and what became of it. Owned by who asked; must outlive the read.
struct ReadJob {
  uint64_t offset = 0;
  size_t length = 0;
  uint8_t* to = nullptr;
  std::vector<Checked> checks;
  int tag = 0;            ///< the asker's own
  bool is_ahead = false;  ///< begins only when no other read waits
  std::exception_ptr error;
  const File* file = nullptr;  ///< null for the loader's; outlives the read
};

struct LoaderStats {
  uint64_t bytes = 0;
  uint64_t reads = 0;
  double busy_s = 0;  ///< time with at least one read under way
};

/// Reads jobs of one file, or of those that jobs name, several at a time: in the order of their submission, and those
/// ahead after the others. Thread-safe.
class Loader {
 public:
  /// All threads but one may be busy with reads ahead.
  Loader(std::shared_ptr<const File> file, int num_threads);
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;
  ~Loader();

  /// A job of no bytes is only verified.
  void submit(ReadJob* job);

  /// Takes a job back unless it has begun; such a job is not collected. Returns whether it did.
  bool cancel(ReadJob* job);

  /// A job that is ahead is wanted now.
  void promote(ReadJob* job);

  /// Moves finished jobs to `done`; waits for one if `wait` and any is under way.
  void collect(bool wait, std::vector<ReadJob*>* done);

  /// Jobs submitted and not yet collected.
  int num_pending() const;
  LoaderStats stats() const;
  const File& file() const { return *file_; }

 private:
  void work();
  void stop();
  ReadJob* take();
  const File& file_of(const ReadJob& job) const { return job.file ? *job.file : *file_; }

  std::shared_ptr<const File> file_;
  mutable std::mutex mutex_;
  std::condition_variable has_job_, has_done_;
  std::deque<ReadJob*> now_, ahead_;
  std::vector<ReadJob*> done_;
  int pending_ = 0;
  int active_ = 0;
  int active_ahead_ = 0;
  int most_ahead_;
  double active_since_ = 0;
  LoaderStats stats_;
  bool stop_ = false;
  std::vector<std::thread> threads_;  // last: joins before everything it uses goes
};

}  // namespace edgemoe
