#include "loader.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <utility>

#include "clock.h"
#include "crc32c.h"
#include "error.h"

namespace edgemoe {
namespace {

void verify(const File& file, const ReadJob& job) {
  for (const Checked& c : job.checks) {
    const uint32_t crc = crc32c(c.bytes, c.length);
    if (crc == c.crc) continue;
    char text[128];
    std::snprintf(text, sizeof text, ": checksum of expert %d of layer %d, rung %d, is %08x; expected %08x", c.expert,
                  c.layer, c.rung, crc, c.crc);
    throw FormatError(file.path() + text);
  }
}

}  // namespace

Loader::Loader(std::shared_ptr<const File> file, int num_threads)
    : file_(std::move(file)), most_ahead_(std::max(1, num_threads - 1)) {
  if (num_threads < 1 || num_threads > 64) throw std::invalid_argument("Loader: expected 1 to 64 threads");
  try {
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
  } catch (const std::exception&) {  // a limit on threads or memory
    stop();
    throw OutOfBudget("loader: the system refused to start " + std::to_string(num_threads) +
                      " threads; `ulimit -v` or `ulimit -u` is too small");
  }
}

Loader::~Loader() { stop(); }

void Loader::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    now_.clear();
    ahead_.clear();
  }
  has_job_.notify_all();
  for (auto& t : threads_) t.join();
  threads_.clear();
}

void Loader::submit(ReadJob* job) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    (job->is_ahead ? ahead_ : now_).push_back(job);
    ++pending_;
  }
  has_job_.notify_one();
}

bool Loader::cancel(ReadJob* job) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto* queue : {&now_, &ahead_}) {
    const auto at = std::find(queue->begin(), queue->end(), job);
    if (at == queue->end()) continue;
    queue->erase(at);
    --pending_;
    return true;
  }
  return false;
}

void Loader::promote(ReadJob* job) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto at = std::find(ahead_.begin(), ahead_.end(), job);
    if (at == ahead_.end()) return;
    ahead_.erase(at);
    job->is_ahead = false;
    now_.push_back(job);
  }
  has_job_.notify_one();
}

/// The next job to begin, or null. Called with the mutex held.
ReadJob* Loader::take() {
  auto& queue = now_.empty() && active_ahead_ < most_ahead_ ? ahead_ : now_;
  if (queue.empty()) return nullptr;
  ReadJob* job = queue.front();
  queue.pop_front();
  return job;
}

void Loader::collect(bool wait, std::vector<ReadJob*>* done) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (wait) has_done_.wait(lock, [&] { return !done_.empty() || pending_ == 0; });
  pending_ -= int(done_.size());
  done->insert(done->end(), done_.begin(), done_.end());
  done_.clear();
}

int Loader::num_pending() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return pending_;
}

LoaderStats Loader::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  LoaderStats s = stats_;
  if (active_ > 0) s.busy_s += now_s() - active_since_;
  return s;
}

void Loader::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    ReadJob* job = nullptr;
    has_job_.wait(lock, [&] { return stop_ || (job = take()) != nullptr; });
    if (stop_) return;
    const bool is_ahead = job->is_ahead;
    active_ahead_ += is_ahead;
    if (active_++ == 0) active_since_ = now_s();
    lock.unlock();
    bool is_read = false;
    try {
      if (job->length > 0) file_of(*job).read_pages(job->offset, job->length, job->to);
      is_read = true;
    } catch (...) {
      job->error = std::current_exception();
    }
    lock.lock();
    if (--active_ == 0) stats_.busy_s += now_s() - active_since_;
    active_ahead_ -= is_ahead;
    if (is_read) {
      stats_.bytes += job->length;
      stats_.reads += job->length > 0;
      lock.unlock();
      try {
        verify(file_of(*job), *job);
      } catch (...) {
        job->error = std::current_exception();
      }
      lock.lock();
    }
    done_.push_back(job);
    has_done_.notify_one();
  }
}

}  // namespace edgemoe
