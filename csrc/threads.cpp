#include "threads.h"

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edgemoe {
namespace {

// About 50 microseconds: longer than Python needs between two calls of one layer, shorter than a read.
constexpr int kSpins = 2000;

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

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads < 1 || num_threads > 1024) {
    throw std::invalid_argument("ThreadPool: expected 1 to 1024 threads, got " + std::to_string(num_threads));
  }
  try {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::exception&) {  // a limit on threads or memory
    stop();
    throw std::runtime_error("threads: the system refused to start " + std::to_string(num_threads) + " threads");
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    round_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
  workers_.clear();
}

void ThreadPool::pieces() {
  for (;;) {
    const int begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= count_) return;
    call_(body_, begin, begin + grain_ < count_ ? begin + grain_ : count_);
  }
}

void ThreadPool::start(int count, int grain, Call call, const void* body) {
  call_ = call;
  body_ = body;
  count_ = count;
  grain_ = grain < 1 ? 1 : grain;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(int(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_seq_cst);
  if (parked_.load(std::memory_order_seq_cst) > 0) {
    // The lock orders this with a worker between its last look and its wait.
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  pieces();
  for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins) {
    // A worker that lost its core needs ours to finish.
    if (spins < kSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::work(int number) {
  worker_number = number;
  uint64_t seen = 0;
  for (;;) {
    int spins = 0;
    while (round_.load(std::memory_order_acquire) == seen && spins < kSpins) {
      pause();
      ++spins;
    }
    if (round_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      parked_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return round_.load(std::memory_order_seq_cst) != seen; });
      parked_.fetch_sub(1, std::memory_order_relaxed);
    }
    seen = round_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    pieces();
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace edgemoe
