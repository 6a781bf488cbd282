// A pool of compute threads that spins shortly between tasks and parks when idle.
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

/// Pieces for a loop over `count` items: enough that threads end together, few enough that starting one costs nothing.
inline int grain_for(int count, int threads) { return count / (threads * 16) > 1 ? count / (threads * 16) : 1; }

/// Memory that a thread will probably read next: runs side by side, of each as many steps.
struct Ahead {
  static constexpr int kRuns = 8;

  const uint8_t* from[kRuns] = {};
  uint32_t step[kRuns] = {};  ///< bytes; 0 from the last run on
  int steps = 0;
};

/// Runs loops on `num_threads` threads, the caller included. One caller at a time.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int size() const { return int(workers_.size()) + 1; }

  /// Whether loops throw std::logic_error from now on.
  void refuse(bool yes) { refuses_ = yes; }

  /// Inside a body: the number of the thread that runs it, 0 for the caller.
  static int worker();

  /// Where the share of a thread begins in a loop over `count` items in pieces of `grain`; that of the thread after the
  /// last is the end.
  int first(int count, int grain, int thread) const;

  /// What a thread reads into its cache while it waits for others or for the next loop, once: a hint, no more.
  void expect(int thread, const Ahead& ahead);

  /// Calls body(begin, end) over [0, count) in pieces of about `grain`, and returns when all are done. Each thread
  /// begins with a share of its own, from the front, so that it reads memory in one run; who has none left takes
  /// pieces from the end of another's. Which thread runs a piece is left to chance; bodies must write to disjoint
  /// places. `body` must not throw.
  template <class Body>
  void run(int count, int grain, const Body& body) {
    if (refuses_) throw std::logic_error("threads: work runs while it should be noted");
    if (count <= 0) return;
    if (workers_.empty() || count <= grain) return body(0, count);
    start(count, grain, [](const void* b, int begin, int end) { (*static_cast<const Body*>(b))(begin, end); }, &body);
  }

 private:
  using Call = void (*)(const void* body, int begin, int end);

  /// The pieces of one thread that nobody has taken: the round that they are of, the first and the end. One that is of
  /// another round stands for the whole share, so that starting a round need not write to each.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };

  /// What a thread was told to expect. Another may write a newer one while it looks: then it fetches what nobody needs.
  struct alignas(64) Expected {
    Relaxed<const uint8_t*> from[Ahead::kRuns];
    Relaxed<uint32_t> step[Ahead::kRuns];
    Relaxed<int> steps;
    Relaxed<uint32_t> version;
    uint32_t seen = 0;  ///< the thread's own, as the next
    int done = 0;
  };

  void start(int count, int grain, Call call, const void* body);
  void idle(int number);
  void work(int number);
  void pieces(int number);
  int take(int owner, bool first);
  void stop();

  // The state of a round: its number, whether it is over, and how many workers are in it. A worker that comes late,
  // because its core was taken, finds the round over; nobody waits for it.
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
