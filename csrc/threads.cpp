#include "threads.h"

#include <sched.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edgemoe {
namespace {

// Some tens of microseconds: how long the caller spins for the others before it yields its core.
constexpr int kSpins = 2000;
// A worker spins this many times as long for the next loop: longer than Python needs between two calls of one token
// (the longest gap is before the output head's) and shorter than a read. Waking it would cost as much.
constexpr int kPatience = 3;

/// Cores that this process may use.
int num_cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : int(std::thread::hardware_concurrency());
}

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

thread_local int worker_number = 0;

}  // namespace

int ThreadPool::worker() { return worker_number; }

// With more threads than cores, a spinning thread would keep a core from one that has work.
ThreadPool::ThreadPool(int num_threads)
    : spins_(num_threads <= num_cores() ? kSpins : 0),
      shares_(size_t(std::clamp(num_threads, 1, 1024))),
      expected_(shares_.size()) {
  if (num_threads < 1 || num_threads > 1024) {
    throw std::invalid_argument("ThreadPool: expected 1 to 1024 threads, got " + std::to_string(num_threads));
  }
  try {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::exception&) {  // a limit on threads or memory
    stop();
    throw OutOfBudget("threads: the system refused to start " + std::to_string(num_threads) +
                      " threads; `ulimit -v` or `ulimit -u` is too small");
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    state_.fetch_add(kRound);
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
  workers_.clear();
}

int ThreadPool::first(int count, int grain, int thread) const {
  const int pieces = (count - 1) / grain + 1;
  return std::min(int(int64_t(pieces) * thread / size()) * grain, count);
}

void ThreadPool::expect(int thread, const Ahead& ahead) {
  Expected& e = expected_[size_t(thread)];
  for (int r = 0; r < Ahead::kRuns; ++r) {
    e.from[r] = ahead.from[r];
    e.step[r] = ahead.step[r];
    if (ahead.step[r] == 0) break;
  }
  e.steps = ahead.steps;
  e.version += 1;
}

/// Prefetches one step of what is expected, or pauses when nothing is left.
void ThreadPool::idle(int number) {
  Expected& e = expected_[size_t(number)];
  if (const uint32_t version = e.version; version != e.seen) {
    e.seen = version;
    e.done = 0;
  }
  if (e.done >= e.steps) return pause();
  for (int r = 0; r < Ahead::kRuns; ++r) {
    const uint32_t step = e.step[r];
    if (step == 0) break;
    // An integer, as the address may lie outside any object.
    const uintptr_t at = reinterpret_cast<uintptr_t>(static_cast<const uint8_t*>(e.from[r])) + size_t(e.done) * step;
    for (uint32_t byte = 0; byte < step; byte += 64) __builtin_prefetch(reinterpret_cast<const void*>(at + byte), 0, 2);
  }
  ++e.done;
}

/// Takes the first or the last piece of a thread's share; -1 when none is left.
int ThreadPool::take(int owner, bool first) {
  std::atomic<uint64_t>& left = shares_[size_t(owner)].left;
  uint64_t before = left.load(std::memory_order_acquire);
  for (;;) {
    uint64_t begin = before >> 16 & 0xffff, end = before & 0xffff;
    if (uint32_t(before >> 32) != round_) {
      const uint64_t threads = uint64_t(size());
      begin = uint64_t(num_pieces_) * uint64_t(owner) / threads;
      end = uint64_t(num_pieces_) * uint64_t(owner + 1) / threads;
    } else if (begin == end) {
      return -1;
    }
    const bool is_empty =
        begin == end;  // stored with this round's number too, so that no later round mistakes a stale value for its own
    const int piece = is_empty ? -1 : int(first ? begin++ : --end);
    if (left.compare_exchange_weak(before, uint64_t(round_) << 32 | begin << 16 | end, std::memory_order_acq_rel,
                                   std::memory_order_acquire)) {
      return piece;
    }
  }
}

void ThreadPool::pieces(int number) {
  for (int i = 0; i < size(); ++i) {
    const int owner = (number + i) % size();
    for (int piece; (piece = take(owner, i == 0)) >= 0;) {
      call_(body_, piece * grain_, piece + 1 < num_pieces_ ? (piece + 1) * grain_ : count_);
    }
  }
}

void ThreadPool::start(int count, int grain, Call call, const void* body) {
  constexpr int kMost = 0xffff;
  call_ = call;
  body_ = body;
  count_ = count;
  grain_ = std::max({grain, 1, (count - 1) / kMost + 1});
  num_pieces_ = (count - 1) / grain_ + 1;
  ++round_;
  // The next round: open, with no worker in it.
  state_.store((state_.load(std::memory_order_relaxed) & ~(kRound - 1)) + kRound, std::memory_order_seq_cst);
  if (parked_.load(std::memory_order_seq_cst) > 0) {
    // The lock orders this with a worker that is between its last check and its wait.
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  pieces(0);
  state_.fetch_or(kOver, std::memory_order_acq_rel);
  for (int spins = 0; (state_.load(std::memory_order_acquire) & kWorkers) != 0; ++spins) {
    // A worker that lost its core needs ours to finish.
    if (spins < spins_) {
      idle(0);
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::work(int number) {
  worker_number = number;
  uint64_t seen = 0;
  const auto is_new = [&](uint64_t state) { return state / kRound != seen; };
  for (;;) {
    for (int spins = 0; spins < kPatience * spins_ && !is_new(state_.load(std::memory_order_acquire)); ++spins)
      idle(number);
    if (!is_new(state_.load(std::memory_order_acquire))) {
      std::unique_lock<std::mutex> lock(mutex_);
      parked_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return is_new(state_.load(std::memory_order_seq_cst)); });
      parked_.fetch_sub(1, std::memory_order_relaxed);
    }
    uint64_t state = state_.load(std::memory_order_acquire);
    seen = state / kRound;
    if (stop_.load()) return;  // read after the state: no worker that has seen the pool's final round goes on
    bool is_in = false;
    while (state / kRound == seen && !(state & kOver) && !is_in) {
      is_in = state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel);
    }
    if (!is_in) continue;
    pieces(number);
    state_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace edgemoe
