#include "backing.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "memory.h"
#include "relaxed.h"

namespace edgemoe {
namespace {

class HostBacking : public Backing {
 public:
  HostBacking(std::shared_ptr<const File> file, ExpertTable table, bool verify, int num_readers)
      : table_(std::move(table)),
        num_rungs_(table_.ends.size()),
        verify_(verify),
        loader_(std::move(file), num_readers) {
    const size_t n = table_.offsets.size(), layers = table_.layers.size();
    if (layers == 0 || n == 0 || n % layers || table_.crcs.size() != n * num_rungs_) {
      throw std::invalid_argument("Cache: expected one offset per expert and one sum per rung");
    }
    const auto& of = table_.file_of;
    if ((!of.empty() && of.size() != n) || (!table_.names.empty() && table_.names.size() != n) ||
        std::any_of(of.begin(), of.end(), [this](uint8_t i) { return i > table_.others.size(); })) {
      throw std::invalid_argument("Cache: expected one file and one name per expert");
    }
    num_experts_ = int(n / layers);
  }

  bool keeps_bytes() const override { return true; }
  size_t granule() const override { return system_page(); }

  void reserve(int num_experts, int num_slots, size_t window) override {
    if (size_t(num_experts) != table_.offsets.size()) {
      throw std::invalid_argument("Cache: expected one offset per expert");
    }
    window_ = window;
    memory_ = Memory(size_t(num_slots) * window);
    jobs_.resize(size_t(num_slots));
  }

  void expect_all(bool yes) override { memory_.prefer_huge_pages(yes); }

  bool fetch(const Fetch& what) override {
    const size_t e = size_t(what.expert);
    uint8_t* to = base(what.slot);
    ReadJob& job = jobs_[size_t(what.slot)];
    const uint8_t file = table_.file_of.empty() ? 0 : table_.file_of[e];
    const int name = table_.names.empty() ? what.expert % num_experts_ : table_.names[e];
    job = {table_.offsets[e] + what.begin,
           what.end - what.begin,
           to + what.begin,
           {},
           what.slot,
           what.is_ahead,
           nullptr,
           file ? table_.others[size_t(file) - 1].get() : nullptr};
    for (int r = what.from; verify_ && r < what.to; ++r) {
      const uint32_t start = r == 0 ? 0 : table_.ends[size_t(r) - 1];
      job.checks.push_back({to + start, table_.ends[size_t(r)] - start, table_.crcs[e * num_rungs_ + size_t(r)],
                            table_.layers[e / size_t(num_experts_)], name, r});
    }
    loader_.submit(&job);
    return false;
  }

  bool cancel(int slot) override { return loader_.cancel(&jobs_[size_t(slot)]); }
  void promote(int slot) override { loader_.promote(&jobs_[size_t(slot)]); }

  void collect(bool wait, std::vector<Arrival>* done) override {
    ended_.clear();
    loader_.collect(wait, &ended_);
    for (ReadJob* job : ended_) done->push_back({job->tag, std::exchange(job->error, nullptr)});
  }

  int num_pending() const override { return loader_.num_pending(); }

  void release(int slot, size_t begin, size_t end) override {
    memory_.release(size_t(slot) * window_ + begin, end - begin);
  }

  const uint8_t* view(int slot) const override { return memory_.bytes() + size_t(slot) * window_; }
  LoaderStats stats() const override { return loader_.stats(); }

 private:
  uint8_t* base(int slot) { return memory_.bytes() + size_t(slot) * window_; }

  ExpertTable table_;
  size_t num_rungs_;
  int num_experts_ = 0;  ///< per layer
  bool verify_;
  size_t window_ = 0;
  Memory memory_;
  std::vector<ReadJob> jobs_;  ///< per slot
  std::vector<ReadJob*> ended_;
  Loader loader_;  // last: its threads end before the memory that they write to is destroyed
};

class DryBacking : public Backing {
 public:
  bool keeps_bytes() const override { return false; }
  size_t granule() const override { return system_page(); }
  void reserve(int, int, size_t) override {}
  void expect_all(bool) override {}

  bool fetch(const Fetch& what) override {
    bytes_ += what.end - what.begin;
    reads_ += what.end > what.begin;
    return true;
  }

  bool cancel(int) override { return false; }
  void promote(int) override {}
  void collect(bool, std::vector<Arrival>*) override {}
  int num_pending() const override { return 0; }
  void release(int, size_t, size_t) override {}
  const uint8_t* view(int) const override { return nullptr; }
  LoaderStats stats() const override { return {bytes_, reads_, 0}; }

 private:
  Relaxed<uint64_t> bytes_, reads_;
};

}  // namespace

std::unique_ptr<Backing> make_host_backing(std::shared_ptr<const File> file, ExpertTable table, bool verify,
                                           int num_readers) {
  return std::make_unique<HostBacking>(std::move(file), std::move(table), verify, num_readers);
}

std::unique_ptr<Backing> make_dry_backing() { return std::make_unique<DryBacking>(); }

}  // namespace edgemoe
