#include "device/space.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "clock.h"
#include "error.h"

namespace edgemoe {

DeviceSpace::DeviceSpace(std::unique_ptr<Device> device, size_t budget_bytes) : DeviceSpace(std::move(device)) {
  stats_.budget_bytes = budget_bytes;
  pieces_.resize(kPieces);
  for (Piece& p : pieces_) {
    p.bytes = static_cast<uint8_t*>(device_->alloc(kPieceBytes, Room::kPinned));
    p.done = device_->make_fence();
  }
  mail_ = static_cast<uint32_t*>(device_->alloc(kMailBytes + 2 * sizeof(uint32_t), Room::kPinned));
  turn_of_mail_ = mail_ + kMailBytes / sizeof *mail_;
  turn_of_mail_[0] = turn_of_mail_[1] = 0;
}

DeviceSpace::~DeviceSpace() {
  for (const Piece& p : pieces_) {
    if (p.bytes) device_->free(p.bytes, Room::kPinned);
  }
  if (mail_) device_->free(mail_, Room::kPinned);
}

void* DeviceSpace::alloc(size_t bytes) {
  expect_running();
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
  if (is_noting_) return left_.push_back({p, bytes});  // Python's garbage collector may run at any time
  device_->free(p, Room::kDevice);
  stats_.used_bytes -= taken(bytes);
}

void DeviceSpace::expect_running() const {
  if (is_noting_) throw std::logic_error("device: memory is used while work is recorded");
}

DeviceSpace::Piece& DeviceSpace::next_piece() {
  expect_running();
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

DeviceRates DeviceSpace::measure(size_t bytes) {
  bytes = std::max(bytes / kPieceBytes, size_t(1)) * kPieceBytes;
  const auto give_back = [this, bytes](uint8_t* p) { free(p, bytes); };
  const auto taken = [&] {
    return std::unique_ptr<uint8_t, decltype(give_back)>(static_cast<uint8_t*>(alloc(bytes)), give_back);
  };
  const auto to = taken(), from = taken();
  const Piece& piece = next_piece();
  const auto rate = [&](int queue, double moved, const auto& copy) {
    const auto seconds = [&] {
      const double start = now_s();
      copy();
      device_->record(piece.done, queue);
      device_->sync(piece.done);
      return std::max(now_s() - start, 1e-9);
    };
    seconds();  // clocks may be low the first time
    return moved / seconds();
  };
  return {rate(kCopy, double(bytes),
               [&] {
                 for (size_t at = 0; at < bytes; at += kPieceBytes) {
                   device_->copy_in(kCopy, to.get() + at, piece.bytes, kPieceBytes);
                 }
               }),
          rate(kCompute, 2.0 * double(bytes), [&] { device_->copy(to.get(), from.get(), bytes); })};
}

bool DeviceSpace::fits_mailbox(const std::vector<Fetch>& what) {
  size_t total = 0;
  for (const Fetch& f : what) {
    if (f.n % sizeof(uint32_t)) return false;
    total += f.n;
  }
  return what.size() <= kMostPosted && total <= kMailBytes;
}

bool DeviceSpace::post(const std::vector<Fetch>& what) {
  if (!uses_mailbox_ || !fits_mailbox(what)) return false;
  if (is_posted_ && !is_noting_) wait_for_post();  // the kernel that sends it reads its number only when it runs
  PostCall call{};
  for (size_t i = 0; i < what.size(); ++i) {
    call.from[i] = static_cast<const uint32_t*>(what[i].from);
    call.sizes[i] = int(what[i].n / sizeof(uint32_t));
  }
  call.to = mail_;
  call.turn = turn_of_mail_;
  call.number = turn_of_mail_ + 1;
  if (!is_noting_) turn_of_mail_[1] += 1;
  device_->post(call);
  if (is_noting_) {
    noted_posts_ += 1;
  } else {
    is_posted_ = true;
  }
  return true;
}

void DeviceSpace::wait_for_post() {
  is_posted_ = false;  // even if it never arrives
  const auto is_there = [&] { return __atomic_load_n(turn_of_mail_, __ATOMIC_ACQUIRE) == turn_of_mail_[1]; };
  constexpr int kLooks = 64;  // a call to the driver takes as long as this many looks
  for (int looks = 1; !is_there(); ++looks) {
    if (looks % kLooks || device_->progress() || is_there()) continue;
    throw DeviceError("the device has nothing left to do, and what it was to send is not there");
  }
}

void DeviceSpace::collect(const std::vector<Fetch>& what) {
  if (!is_posted_) throw std::logic_error("device: nothing was posted");
  wait_for_post();
  const uint32_t* from = mail_;
  for (const Fetch& f : what) {
    std::memcpy(f.to, from, f.n);
    from += f.n / sizeof *from;
    stats_.bytes_out += f.n;
  }
}

void DeviceSpace::begin_noting() {
  expect_running();
  device_->begin_noting();
  is_noting_ = true;
  noted_posts_ = 0;
}

int DeviceSpace::end_noting() {
  is_noting_ = false;
  const auto free_left = [&] {
    for (const auto& [p, bytes] : left_) free(p, bytes);
    left_.clear();
  };
  int noted;
  try {
    noted = device_->end_noting();
  } catch (...) {
    free_left();
    throw;
  }
  free_left();
  if (noted_posts_ > 1) {
    device_->forget(noted);
    throw std::logic_error("device: recorded work may post only once");
  }
  posts_.resize(std::max(posts_.size(), size_t(noted) + 1));
  posts_[size_t(noted)] = noted_posts_;
  return noted;
}

bool DeviceSpace::repeat(int noted) {
  const bool posts = posts_.at(size_t(noted)) > 0;
  if (posts) {
    if (is_posted_) wait_for_post();
    turn_of_mail_[1] += 1;
  }
  device_->repeat(noted);
  is_posted_ = is_posted_ || posts;
  return posts;
}

void DeviceSpace::forget(int noted) noexcept { device_->forget(noted); }

void DeviceSpace::download(const std::vector<Fetch>& what) {
  if (post(what)) return collect(what);
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
