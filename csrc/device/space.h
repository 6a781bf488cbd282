// One engine's share of a device: memory inside a budget, and the transfers to and from it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/device.h"
#include "relaxed.h"

namespace edgemoe {

/// Counters of a device. Each is right by itself, even while another thread uses the device.
struct SpaceStats {
  Relaxed<size_t> used_bytes, peak_bytes, budget_bytes;
  Relaxed<uint64_t> bytes_in, bytes_out;  ///< copied to the device and from it
};

/// Bytes per second: over the link to the device, and of its memory, with reads and writes added up.
struct DeviceRates {
  double link, memory;
};

/// An open device, its memory budget and its transfers. One thread at a time.
class DeviceSpace {
 public:
  DeviceSpace(std::unique_ptr<Device> device, size_t budget_bytes);
  DeviceSpace(const DeviceSpace&) = delete;
  DeviceSpace& operator=(const DeviceSpace&) = delete;
  ~DeviceSpace();

  Device& device() { return *device_; }

  /// Changes the budget; what is taken already stays.
  void limit(size_t budget_bytes) { stats_.budget_bytes = budget_bytes; }

  /// Returns device memory. Throws OutOfBudget above the budget, and when the device has no room.
  void* alloc(size_t bytes);
  void free(void* p, size_t bytes) noexcept;
  /// Bytes of the budget that an allocation of `bytes` takes, in whole units.
  static constexpr size_t taken(size_t bytes) { return (bytes > 0 ? (bytes + kUnit - 1) / kUnit : 1) * kUnit; }

  /// Queues copies on `queue`; `from` may change as soon as this returns.
  void upload(void* to, const void* from, size_t n, int queue = kCompute);

  struct Fetch {
    void* to;
    const void* from;  ///< in device memory
    size_t n;
  };
  /// Waits for all kernels queued before, and copies their results to the host. Small results come through a mailbox: a
  /// kernel writes them to host memory, which the host polls.
  void download(const std::vector<Fetch>& what);
  /// The first half of `download` through the mailbox: queues a kernel that sends the results of those before it.
  /// Returns false, and queues nothing, if `what` does not fit or the mailbox is off.
  bool post(const std::vector<Fetch>& what);
  /// The second half: waits for what was posted last, and copies it to `what`, of which only `to` and `n` are used.
  void collect(const std::vector<Fetch>& what);
  /// Measures rates by copying `bytes` to the device over the link, and as many within its memory; takes twice as many
  /// of its bytes meanwhile. Waits. Throws OutOfBudget.
  DeviceRates measure(size_t bytes);

  /// Switches the mailbox on or off; results are the same.
  void use_mailbox(bool yes) { uses_mailbox_ = yes; }

  /// See Device. While work is recorded, memory may be neither taken nor copied, and what is given back is freed later.
  void begin_noting();
  int end_noting();
  /// Queues recorded work again. Returns whether it posts something.
  bool repeat(int noted);
  void forget(int noted) noexcept;

  SpaceStats stats() const { return stats_; }

 private:
  /// Takes nothing yet. The other constructor delegates to it, so that the destructor runs if that one fails halfway.
  explicit DeviceSpace(std::unique_ptr<Device> device) : device_(std::move(device)) {}

  static constexpr size_t kUnit = 512;
  static constexpr int kPieces = 4;
  static constexpr size_t kPieceBytes = size_t(1) << 20;

  /// A pinned buffer, and the fence of its last copy.
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
  uint32_t* mail_ = nullptr;  ///< kMailBytes, then two numbers: of the mail that has arrived, and of that sent next
  uint32_t* turn_of_mail_ = nullptr;
  bool is_posted_ = false;  ///< something is posted and not collected
  bool is_noting_ = false;
  int noted_posts_ = 0;
  std::vector<std::pair<void*, size_t>> left_;  ///< memory that was given back while work is recorded
  std::vector<int> posts_;                      ///< how often recorded work posts, by its number
  bool uses_mailbox_ = true;
  SpaceStats stats_;
};

/// An owned range of device memory. Move-only.
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
