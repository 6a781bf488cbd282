#include "device/slots.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cache.h"
#include "error.h"

namespace edgemoe {
namespace {

class DeviceBacking : public Backing {
 public:
  DeviceBacking(std::shared_ptr<DeviceSpace> space, const Cache& host, size_t window)
      : space_(std::move(space)), host_(host), window_(window), computed_(space_->device().make_fence()) {}

  bool keeps_bytes() const override { return true; }
  size_t granule() const override { return window_; }

  void reserve(int num_experts, int num_slots, size_t window) override {
    if (num_experts != host_.num_experts() || window != window_) {
      throw std::invalid_argument("Cache: expected the experts and the level of the cache below");
    }
    memory_ = DeviceMemory(space_, size_t(num_slots) * window);
    for (int i = 0; i < num_slots; ++i) arrived_.push_back(space_->device().make_fence());
  }
  void expect_all(bool) override {}

  bool fetch(const Fetch& what) override {
    std::exception_ptr failed;
    try {
      const uint8_t* from = host_.record(what.expert, what.to);
      // Slots are whole windows, so `what` has a whole window's bytes for any level; only the rungs' bytes are copied.
      const size_t begin = end_of(what.from), end = end_of(what.to);
      if (!from) throw DeviceError("expert " + std::to_string(what.expert) + " left the cache below too early");
      Device& device = space_->device();
      device.record(computed_, kCompute);
      device.wait(kCopy, computed_);
      space_->upload(at(what.slot) + begin, from + begin, end - begin, kCopy);
      device.record(arrived_[size_t(what.slot)], kCopy);
      bytes_ += end - begin;
      copies_ += 1;
    } catch (...) {
      failed = std::current_exception();
    }
    pending_.push_back({what.slot, failed});
    return false;
  }
  bool cancel(int) override { return false; }
  void promote(int) override {}

  void collect(bool wait, std::vector<Arrival>* done) override {
    std::vector<Arrival> left;
    for (Arrival& a : pending_) {
      const Fence fence = arrived_[size_t(a.slot)];
      try {
        if (!a.error && wait && done->empty()) space_->device().sync(fence);
        if (!a.error && !space_->device().is_done(fence)) {
          left.push_back(a);
          continue;
        }
      } catch (...) {
        a.error = std::current_exception();
      }
      done->push_back(a);
    }
    pending_ = std::move(left);
  }
  int num_pending() const override { return int(pending_.size()); }

  void release(int, size_t, size_t) override {}
  const uint8_t* view(int slot) const override { return at(slot); }
  LoaderStats stats() const override { return {bytes_, copies_, 0}; }

 private:
  /// Where the first `rungs` rungs of a record end.
  size_t end_of(int rungs) const { return rungs ? host_.shape().ends[size_t(rungs) - 1] : 0; }
  uint8_t* at(int slot) const { return memory_.as() + size_t(slot) * window_; }

  std::shared_ptr<DeviceSpace> space_;
  const Cache& host_;
  size_t window_;
  DeviceMemory memory_;
  Fence computed_;
  std::vector<Fence> arrived_;  ///< of each slot
  std::vector<Arrival> pending_;
  Relaxed<uint64_t> bytes_, copies_;
};

/// The slots of another backing, lent to a device.
class SharedBacking : public Backing {
 public:
  SharedBacking(std::shared_ptr<DeviceSpace> space, std::unique_ptr<Backing> from, std::vector<uint32_t> ends,
                size_t window)
      : space_(std::move(space)),
        from_(std::move(from)),
        ends_(std::move(ends)),
        window_(window),
        computed_(space_->device().make_fence()) {}
  ~SharedBacking() override {
    if (there_) space_->device().take_back(base());
  }

  bool keeps_bytes() const override { return true; }
  size_t granule() const override { return window_; }

  void reserve(int num_experts, int num_slots, size_t window) override {
    from_->reserve(num_experts, num_slots, window);
    const size_t bytes = size_t(num_slots) * window;
    std::memset(base(), 0, bytes);  // a page that is not resident cannot be lent
    there_ = static_cast<const uint8_t*>(space_->device().lend(base(), bytes));
  }
  void expect_all(bool) override {}

  bool fetch(const Fetch& what) override {
    try {  // else a queued kernel would read the next expert in this slot
      space_->device().record(computed_, kCompute);
      space_->device().sync(computed_);
    } catch (...) {
      failed_.push_back({what.slot, std::current_exception()});
      return false;
    }
    const auto end_of = [this](int rungs) { return rungs ? round_up(ends_[size_t(rungs) - 1], from_->granule()) : 0; };
    Fetch rungs = what;
    rungs.begin = end_of(what.from);
    rungs.end = end_of(what.to);
    return from_->fetch(rungs);
  }
  bool cancel(int slot) override {
    const auto is_its = [slot](const Arrival& a) { return a.slot == slot; };
    return std::none_of(failed_.begin(), failed_.end(), is_its) && from_->cancel(slot);
  }
  void promote(int slot) override { from_->promote(slot); }
  void collect(bool wait, std::vector<Arrival>* done) override {
    const bool any = !failed_.empty();
    done->insert(done->end(), failed_.begin(), failed_.end());
    failed_.clear();
    from_->collect(wait && !any, done);
  }
  int num_pending() const override { return from_->num_pending() + int(failed_.size()); }

  void release(int, size_t, size_t) override {}
  const uint8_t* view(int slot) const override { return from_->view(slot); }
  const uint8_t* view_there(int slot) const override { return there_ + size_t(slot) * window_; }
  LoaderStats stats() const override { return from_->stats(); }

 private:
  uint8_t* base() const { return const_cast<uint8_t*>(from_->view(0)); }

  std::shared_ptr<DeviceSpace> space_;
  std::unique_ptr<Backing> from_;
  std::vector<uint32_t> ends_;
  size_t window_;
  Fence computed_;
  const uint8_t* there_ = nullptr;
  std::vector<Arrival> failed_;
};

}  // namespace

std::unique_ptr<Backing> make_shared_backing(std::shared_ptr<DeviceSpace> space, std::unique_ptr<Backing> from,
                                             std::vector<uint32_t> ends, size_t window) {
  return std::make_unique<SharedBacking>(std::move(space), std::move(from), std::move(ends), window);
}

std::unique_ptr<Backing> make_device_backing(std::shared_ptr<DeviceSpace> space, const Cache& host, size_t window) {
  return std::make_unique<DeviceBacking>(std::move(space), host, window);
}

}  // namespace edgemoe
