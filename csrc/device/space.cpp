#include "device/space.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace edgemoe {

DeviceSpace::DeviceSpace(std::unique_ptr<Device> device, size_t budget_bytes) : device_(std::move(device)) {
  stats_.budget_bytes = budget_bytes;
  for (int i = 0; i < kPieces; ++i) {
    pieces_.push_back({static_cast<uint8_t*>(device_->alloc(kPieceBytes, Room::kPinned)), device_->make_fence()});
  }
  mail_ = static_cast<uint32_t*>(device_->alloc(kMailBytes + sizeof(uint32_t), Room::kPinned));
  mail_[kMailBytes / sizeof *mail_] = 0;
}

DeviceSpace::~DeviceSpace() {
  for (const Piece& p : pieces_) device_->free(p.bytes, Room::kPinned);
  if (mail_) device_->free(mail_, Room::kPinned);
}

void* DeviceSpace::alloc(size_t bytes) {
  const size_t whole = taken(bytes);
  const size_t left = stats_.budget_bytes - std::min(size_t(stats_.used_bytes), size_t(stats_.budget_bytes));
  if (whole > left) {
    throw OutOfBudget("the device's budget has " + std::to_string(left) + " bytes left, and " + std::to_string(whole) +
                      " are needed");
  }
  void* p = device_->alloc(whole, Room::kDevice);
  stats_.used_bytes += whole;
  stats_.peak_bytes = std::max(size_t(stats_.peak_bytes), size_t(stats_.used_bytes));
  return p;
}

void DeviceSpace::free(void* p, size_t bytes) noexcept {
  device_->free(p, Room::kDevice);
  stats_.used_bytes -= taken(bytes);
}

DeviceSpace::Piece& DeviceSpace::next_piece() {
  Piece& p = pieces_[turn_++ % pieces_.size()];
  device_->sync(p.done);
  return p;
}

void DeviceSpace::upload(void* to, const void* from, size_t n, int queue) {
  for (size_t at = 0; at < n; at += kPieceBytes) {
    const size_t here = std::min(kPieceBytes, n - at);
    const Piece& piece = next_piece();
    std::memcpy(piece.bytes, static_cast<const uint8_t*>(from) + at, here);
    device_->copy_in(queue, static_cast<uint8_t*>(to) + at, piece.bytes, here);
    device_->record(piece.done, queue);
  }
  stats_.bytes_in += n;
}

bool DeviceSpace::fits_mailbox(const std::vector<Fetch>& what) {
  size_t total = 0;
  for (const Fetch& f : what) {
    if (f.n % sizeof(uint32_t)) return false;
    total += f.n;
  }
  return what.size() <= kMostPosted && total <= kMailBytes;
}

void DeviceSpace::receive(const std::vector<Fetch>& what) {
  PostCall call{};
  for (size_t i = 0; i < what.size(); ++i) {
    call.from[i] = static_cast<const uint32_t*>(what[i].from);
    call.sizes[i] = int(what[i].n / sizeof(uint32_t));
  }
  call.to = mail_;
  call.turn = mail_ + kMailBytes / sizeof *mail_;
  call.number = ++posted_;
  device_->post(call);
  const auto is_there = [&] { return __atomic_load_n(call.turn, __ATOMIC_ACQUIRE) == call.number; };
  constexpr int kLooks = 64;  // a question to the driver takes as long as so many
  for (int looks = 1; !is_there(); ++looks) {
    if (looks % kLooks || device_->progress() || is_there()) continue;
    throw DeviceError("the device has nothing left to do, and what it was to send is not there");
  }
  const uint32_t* from = mail_;
  for (const Fetch& f : what) {
    std::memcpy(f.to, from, f.n);
    from += f.n / sizeof *from;
    stats_.bytes_out += f.n;
  }
}

void DeviceSpace::download(const std::vector<Fetch>& what) {
  if (uses_mailbox_ && fits_mailbox(what)) return receive(what);
  struct Part {
    uint8_t* to;
    const uint8_t* from;
    size_t n;
  };
  std::vector<Part> under_way;
  Fence last{};
  const auto collect = [&] {
    if (under_way.empty()) return;
    device_->sync(last);
    for (const Part& p : under_way) std::memcpy(p.to, p.from, p.n);
    under_way.clear();
  };
  for (const Fetch& f : what) {
    for (size_t at = 0; at < f.n; at += kPieceBytes) {
      if (under_way.size() == pieces_.size()) collect();
      const size_t here = std::min(kPieceBytes, f.n - at);
      const Piece& piece = next_piece();
      device_->copy_out(kCompute, piece.bytes, static_cast<const uint8_t*>(f.from) + at, here);
      device_->record(piece.done, kCompute);
      under_way.push_back({static_cast<uint8_t*>(f.to) + at, piece.bytes, here});
      last = piece.done;
    }
    stats_.bytes_out += f.n;
  }
  collect();
}

}  // namespace edgemoe
