// Experts that only pass through a device's memory, as a prompt needs each of them once for many tokens.
#pragma once

#include "cache.h"
#include "device/space.h"

namespace edgemoe {

/// Two buffers for an expert: kernels read one while the other is copied to. One thread at a time.
class DeviceStream {
 public:
  /// `window` bytes hold any expert. Throws OutOfBudget.
  DeviceStream(std::shared_ptr<DeviceSpace> space, size_t window);

  /// Bytes that it takes of a device.
  static size_t bytes(size_t window) { return DeviceSpace::taken(kPlaces * window); }

  /// Copies an expert that is pinned in `host` at `level`, after the kernels that read the expert before it in the same
  /// buffer. Kernels that are queued from now on can read it, until `leave`.
  ExpertView bring(const Cache& host, int expert, int level);
  /// Says that all kernels that read the expert are queued.
  void leave();

  /// Measures the bytes per second of such copies. Waits.
  double measure();

  uint64_t bytes_in() const { return bytes_in_; }

 private:
  static constexpr int kPlaces = 2;
  uint8_t* place() const { return memory_.as() + size_t(turn_) * window_; }

  std::shared_ptr<DeviceSpace> space_;
  size_t window_;
  DeviceMemory memory_;
  Fence arrived_[kPlaces], left_[kPlaces];
  int turn_ = 0;
  Relaxed<uint64_t> bytes_in_;
};

}  // namespace edgemoe
