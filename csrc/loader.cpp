#include "loader.h"

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

Loader::Loader(std::shared_ptr<const File> file, int num_threads) : file_(std::move(file)) {
  if (num_threads < 1 || num_threads > 64) throw std::invalid_argument("Loader: expected 1 to 64 threads");
  try {
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
  } catch (const std::exception&) {  // a limit on threads or memory
    stop();
    throw std::runtime_error("loader: the system refused to start " + std::to_string(num_threads) + " threads");
  }
}

Loader::~Loader() { stop(); }

void Loader::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    queue_.clear();
  }
  has_job_.notify_all();
  for (auto& t : threads_) t.join();
  threads_.clear();
}

void Loader::cancel() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (ReadJob* job : queue_) {
    job->is_cancelled = true;
    done_.push_back(job);
  }
  queue_.clear();
  has_done_.notify_one();
}

void Loader::submit(ReadJob* job) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(job);
    ++pending_;
  }
  has_job_.notify_one();
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
    has_job_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (stop_) return;
    ReadJob* job = queue_.front();
    queue_.pop_front();
    if (active_++ == 0) active_since_ = now_s();
    lock.unlock();
    bool is_read = false;
    try {
      if (job->length > 0) file_->read_pages(job->offset, job->length, job->to);
      is_read = true;
    } catch (...) {
      job->error = std::current_exception();
    }
    lock.lock();
    if (--active_ == 0) stats_.busy_s += now_s() - active_since_;
    if (is_read) {
      stats_.bytes += job->length;
      stats_.reads += job->length > 0;
      lock.unlock();
      try {
        verify(*file_, *job);
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
