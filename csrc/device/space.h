// What one engine takes of a device: its memory, inside a budget, and the traffic with it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/device.h"
#include "relaxed.h"

namespace edgemoe {

/// Each is right by itself, also while another thread uses the device.
struct SpaceStats {
  Relaxed<size_t> used_bytes, peak_bytes, budget_bytes;
  Relaxed<uint64_t> bytes_in, bytes_out;  ///< copied to the device and from it
};

/// Bytes per second: over the link to the device, and of reading and writing its memory together.
struct DeviceRates {
  double link, memory;
};

/// Owns an open device. One thread at a time.
class DeviceSpace {
 public:
  DeviceSpace(std::unique_ptr<Device> device, size_t budget_bytes);
  DeviceSpace(const DeviceSpace&) = delete;
  DeviceSpace& operator=(const DeviceSpace&) = delete;
  ~DeviceSpace();

  Device& device() { return *device_; }

  /// Changes what may be taken from now on.
  void limit(size_t budget_bytes) { stats_.budget_bytes = budget_bytes; }

  /// Device memory. Throws OutOfBudget above the budget, and when the device has no room.
  void* alloc(size_t bytes);
  void free(void* p, size_t bytes) noexcept;
  /// What `bytes` take: whole units of the device's addresses.
  static constexpr size_t taken(size_t bytes) { return (bytes > 0 ? (bytes + kUnit - 1) / kUnit : 1) * kUnit; }

  /// Queues copies, on `queue`; `from` may change as soon as this returns.
  void upload(void* to, const void* from, size_t n, int queue = kCompute);

  struct Fetch {
    void* to;
    const void* from;  ///< of the device
    size_t n;
  };
  /// Waits for all kernels before, and copies what they have made. What is small comes through a mailbox: a kernel
  /// writes it to the host's memory, where the host looks for it.
  void download(const std::vector<Fetch>& what);
  /// The first half of `download` through the mailbox: queues that what kernels have made by then is sent. False, and
  /// nothing is queued, for what does not fit or without a mailbox.
  bool post(const std::vector<Fetch>& what);
  /// The second: waits for what was posted last, and copies it to `what`, of which only `to` and `n` count.
  void collect(const std::vector<Fetch>& what);
  /// Copies `bytes` to the device over the link, and as many within its memory, which has room for twice as many.
  /// Waits. Throws OutOfBudget.
  DeviceRates measure(size_t bytes);

  /// Switches the mailbox on or off; what comes is the same.
  void use_mailbox(bool yes) { uses_mailbox_ = yes; }

  /// See Device. While work is noted memory may neither be taken nor copied, and what is given back is freed after.
  void begin_noting();
  int end_noting();
  /// Returns whether it posts something.
  bool repeat(int noted);
  void forget(int noted) noexcept;

  SpaceStats stats() const { return stats_; }

 private:
  /// Without anything yet, so that what is taken before the other constructor fails is given back.
  explicit DeviceSpace(std::unique_ptr<Device> device) : device_(std::move(device)) {}

  static constexpr size_t kUnit = 512;
  static constexpr int kPieces = 4;
  static constexpr size_t kPieceBytes = size_t(1) << 20;

  /// A pinned buffer, and when its copy is done.
  struct Piece {
    uint8_t* bytes = nullptr;
    Fence done{};
  };
  Piece& next_piece();
  static bool fits_mailbox(const std::vector<Fetch>& what);
  void wait_for_post();
  void expect_running() const;

  std::unique_ptr<Device> device_;
  std::vector<Piece> pieces_;
  size_t turn_ = 0;
  static constexpr size_t kMailBytes = size_t(1) << 16;
  uint32_t* mail_ = nullptr;  ///< kMailBytes, the number of what is there, and that of what is sent next
  uint32_t* turn_of_mail_ = nullptr;
  bool is_posted_ = false;  ///< and not collected
  bool is_noting_ = false;
  int noted_posts_ = 0;
  std::vector<std::pair<void*, size_t>> left_;  ///< memory that was given back while work is noted
  std::vector<int> posts_;                      ///< of what was noted, by its number
  bool uses_mailbox_ = true;
  SpaceStats stats_;
};

/// Device memory that somebody owns. Move-only.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(std::shared_ptr<DeviceSpace> space, size_t bytes)
      : space_(std::move(space)), bytes_(bytes), p_(space_->alloc(bytes)) {}
  DeviceMemory(DeviceMemory&& other) noexcept { swap(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceMemory() {
    if (p_) space_->free(p_, bytes_);
  }

  template <class T = uint8_t>
  T* as() const {
    return static_cast<T*>(p_);
  }
  size_t size() const { return bytes_; }
  DeviceSpace& space() const { return *space_; }

 private:
  void swap(DeviceMemory& other) noexcept {
    std::swap(space_, other.space_);
    std::swap(bytes_, other.bytes_);
    std::swap(p_, other.p_);
  }

  std::shared_ptr<DeviceSpace> space_;
  size_t bytes_ = 0;
  void* p_ = nullptr;
};

}  // namespace edgemoe
