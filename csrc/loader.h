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

/// A rung whose checksum is verified after the read.
struct Checked {
  const uint8_t* bytes;
  size_t length;
  uint32_t crc;
  int layer, expert, rung;  ///< identify it in an error
};

/// One read and its result. Owned by the caller; must outlive the read.
struct ReadJob {
  uint64_t offset = 0;
  size_t length = 0;
  uint8_t* to = nullptr;
  std::vector<Checked> checks;
  int tag = 0;            ///< for the caller's own use
  bool is_ahead = false;  ///< a read ahead of need: begins only when no other read waits
  std::exception_ptr error;
  const File* file = nullptr;  ///< null for the loader's own; must outlive the read
};

struct LoaderStats {
  uint64_t bytes = 0;
  uint64_t reads = 0;
  double busy_s = 0;  ///< time with at least one read in flight
};

/// Threads that run read jobs on one file, or on the file that a job names, several at a time. Jobs begin in the order
/// of their submission, reads ahead after all others. Thread-safe.
class Loader {
 public:
  /// At most `num_threads` - 1 threads take reads ahead, so that one remains for urgent reads; a single thread does
  /// both.
  Loader(std::shared_ptr<const File> file, int num_threads);
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;
  ~Loader();

  /// Queues a job. A job of length 0 is only verified.
  void submit(ReadJob* job);

  /// Cancels a job unless it has begun; a cancelled job is not collected. Returns whether it was cancelled.
  bool cancel(ReadJob* job);

  /// Moves a read ahead to the urgent reads, unless it has begun.
  void promote(ReadJob* job);

  /// Appends finished jobs to `done`; with `wait`, waits for one if any is pending.
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
  std::vector<std::thread> threads_;  // last: joins before everything it uses is destroyed
};

}  // namespace edgemoe
