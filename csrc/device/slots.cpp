#include "device/slots.h"

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
      // Slots are taken whole, and so are the cache's bytes of any level: what is copied is that of the rungs.
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

}  // namespace

std::unique_ptr<Backing> make_device_backing(std::shared_ptr<DeviceSpace> space, const Cache& host, size_t window) {
  return std::make_unique<DeviceBacking>(std::move(space), host, window);
}

}  // namespace edgemoe
