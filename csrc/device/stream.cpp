#include "device/stream.h"

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "clock.h"

namespace edgemoe {

DeviceStream::DeviceStream(std::shared_ptr<DeviceSpace> space, size_t window)
    : space_(std::move(space)), window_(window), memory_(space_, kPlaces * window) {
  for (int i = 0; i < kPlaces; ++i) {
    arrived_[i] = space_->device().make_fence();
    left_[i] = space_->device().make_fence();
  }
}

ExpertView DeviceStream::bring(const Cache& host, int expert, int level) {
  ExpertView view = host.view(expert, level);  // throws unless it is pinned
  const int rungs = view.up.num_rungs;
  const uint8_t* const from = host.record(expert, rungs);
  const size_t n = host.shape().ends[size_t(rungs) - 1];
  if (n > window_) throw std::invalid_argument("DeviceStream: an expert is larger than its place");
  uint8_t* const to = place();
  Device& device = space_->device();
  device.wait(kCopy, left_[turn_]);
  space_->upload(to, from, n, kCopy);
  device.record(arrived_[turn_], kCopy);
  device.wait(kCompute, arrived_[turn_]);
  bytes_in_ += n;
  for (NestedMatrix* w : {&view.gate, &view.up, &view.down}) {
    for (int r = 0; r < w->num_rungs; ++r) w->rungs[r] = to + (w->rungs[r] - from);
    if (w->basis) w->basis = reinterpret_cast<const int8_t*>(to + (reinterpret_cast<const uint8_t*>(w->basis) - from));
  }
  return view;
}

void DeviceStream::leave() {
  space_->device().record(left_[turn_], kCompute);
  turn_ = (turn_ + 1) % kPlaces;
}

double DeviceStream::measure() {
  constexpr size_t kBytes = size_t(16) << 20;
  const std::vector<uint8_t> from(window_);
  const auto seconds = [&](size_t total) {
    const double start = now_s();
    for (size_t at = 0; at < total; at += window_) space_->upload(place(), from.data(), window_, kCopy);
    space_->device().record(arrived_[turn_], kCopy);
    space_->device().sync(arrived_[turn_]);
    return std::max(now_s() - start, 1e-9);
  };
  seconds(window_);  // clocks may be low the first time
  const size_t total = std::max(kBytes / window_, size_t(1)) * window_;
  return double(total) / seconds(total);
}

}  // namespace edgemoe
