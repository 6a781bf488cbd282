// A pool of compute threads that spin briefly between tasks and park when idle.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "relaxed.h"

namespace edgemoe {

/// Items per piece for a loop over `count` items: small enough that threads finish together, large enough that starting
/// a piece costs next to nothing.
inline int grain_for(int count, int threads) { return count / (threads * 16) > 1 ? count / (threads * 16) : 1; }

/// Memory that a thread will probably read next: up to kRuns runs, read side by side in `steps` steps each.
struct Ahead {
  static constexpr int kRuns = 8;

  const uint8_t* from[kRuns] = {};
  uint32_t step[kRuns] = {};  ///< bytes per step; 0 after the last run
  int steps = 0;
};

/// A pool that runs loops on `num_threads` threads, the caller's included. One caller at a time.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int size() const { return int(workers_.size()) + 1; }

  /// Sets whether loops throw std::logic_error from now on.
  void refuse(bool yes) { refuses_ = yes; }

  /// Inside a body: the number of the thread that runs it, 0 for the caller.
  static int worker();

  /// Returns the first item of a thread's share in a loop over `count` items in pieces of `grain`; `count` for the
  /// thread after the last.
  int first(int count, int grain, int thread) const;

  /// Sets what a thread prefetches into its cache, once, while it waits for others or for the next loop. Only a hint.
  void expect(int thread, const Ahead& ahead);

  /// Calls body(begin, end) over [0, count) in pieces of about `grain`, and returns when all are done. Each thread
  /// begins at the front of its own share, so that it reads memory in one run; a thread whose share is done steals
  /// pieces from the end of another's. Which thread runs a piece is not determined; bodies must write to disjoint
  /// places. `body` must not throw.
  template <class Body>
  void run(int count, int grain, const Body& body) {
    if (refuses_) throw std::logic_error("threads: this work cannot be recorded");
    if (count <= 0) return;
    if (workers_.empty() || count <= grain) return body(0, count);
    start(count, grain, [](const void* b, int begin, int end) { (*static_cast<const Body*>(b))(begin, end); }, &body);
  }

 private:
  using Call = void (*)(const void* body, int begin, int end);

  /// The pieces of one thread that nobody has taken: the round that they belong to (32 bits), the first and the end (16
  /// bits each). A value of another round stands for the whole share, so that starting a round need not write to each.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };

  /// What a thread was told to expect. The caller may overwrite this while the thread reads it; at worst the thread
  /// then prefetches something useless.
  struct alignas(64) Expected {
    Relaxed<const uint8_t*> from[Ahead::kRuns];
    Relaxed<uint32_t> step[Ahead::kRuns];
    Relaxed<int> steps;
    Relaxed<uint32_t> version;
    uint32_t seen = 0;  ///< accessed by the thread alone, like `done`
    int done = 0;
  };

  void start(int count, int grain, Call call, const void* body);
  void idle(int number);
  void work(int number);
  void pieces(int number);
  int take(int owner, bool first);
  void stop();

  // The state of a round: its number, whether it is over, and how many workers are in it. A worker that comes late,
  // because it had lost its core, finds the round over; nobody waits for it.
  static constexpr uint64_t kWorkers = 0xffff, kOver = 0x10000, kRound = 0x20000;

  bool refuses_ = false;
  Call call_ = nullptr;
  const void* body_ = nullptr;
  int count_ = 0;
  int grain_ = 1;
  int num_pieces_ = 0;
  uint32_t round_ = 0;
  int spins_;
  std::vector<Share> shares_;       ///< one per thread
  std::vector<Expected> expected_;  ///< likewise
  alignas(64) std::atomic<uint64_t> state_{kOver};
  std::atomic<int> parked_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;  // last: starts after, and joins before, everything it uses
};

}  // namespace edgemoe
