// The core with a device whose queues are threads: copies that overlap, fences, a mailbox that a kernel writes while
// the host polls it, experts that are copied from the cache below. Meant for ThreadSanitizer above all.
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../cudasim/idle.h"
#include "cache.h"
#include "check.h"
#include "device/slots.h"
#include "device/space.h"

using namespace edgemoe;

namespace {

/// A device with a thread for each queue, which runs the queued work in order.
class ThreadedDevice final : public IdleDevice {
 public:
  ThreadedDevice() {
    for (int q = 0; q < kNumQueues; ++q) threads_.emplace_back([this, q] { serve(q); });
  }
  ~ThreadedDevice() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_over_ = true;
      changed_.notify_all();
    }
    for (std::thread& t : threads_) t.join();
  }

  /// Waits for all work, as the interface demands.
  void free(void* p, Room room) noexcept override {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] {
        for (int q = 0; q < kNumQueues; ++q) {
          if (busy_[q] || !queues_[q].empty()) return false;
        }
        return true;
      });
    }
    IdleDevice::free(p, room);
  }
  void fill(void* to, int byte, size_t n) override {
    push(kCompute, [=] { std::memset(to, byte, n); });
  }
  void copy_in(int queue, void* to, const void* pinned, size_t n) override {
    push(queue, [=] { std::memcpy(to, pinned, n); });
  }
  void copy_out(int queue, void* pinned, const void* from, size_t n) override {
    push(queue, [=] { std::memcpy(pinned, from, n); });
  }
  void copy(void* to, const void* from, size_t n) override {
    push(kCompute, [=] { std::memcpy(to, from, n); });
  }
  /// Reads what the kernel before it wrote, as products read an expert.
  void scale(float factor, size_t n, float* out) override {
    push(kCompute, [=] {
      for (size_t i = 0; i < n; ++i) out[i] *= factor;
    });
  }
  void post(const PostCall& call) override {
    push(kCompute, [call] {
      uint32_t* to = call.to;
      for (int i = 0; i < kMostPosted; to += call.sizes[i++]) {
        if (call.sizes[i]) std::memcpy(to, call.from[i], size_t(call.sizes[i]) * sizeof *to);
      }
      __atomic_store_n(call.turn, *call.number, __ATOMIC_RELEASE);
    });
  }

  void begin_noting() override {
    noted_.emplace_back();
    is_noting_ = true;
  }
  int end_noting() override {
    is_noting_ = false;
    return int(noted_.size()) - 1;
  }
  void forget(int noted) noexcept override { noted_[size_t(noted)].clear(); }
  /// How much work is recorded.
  size_t steps() const {
    size_t n = 0;
    for (const auto& work : noted_) n += work.size();
    return n;
  }
  void repeat(int noted) override {
    for (const std::function<void()>& work : noted_[size_t(noted)]) push(kCompute, work);
  }

  Fence make_fence() override {
    std::lock_guard<std::mutex> lock(mutex_);
    fences_.push_back({});
    return Fence(fences_.size() - 1);
  }
  void record(Fence f, int queue) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t turn = ++fences_[f].recorded;
    queues_[queue].push_back([this, f, turn] {
      std::lock_guard<std::mutex> inner(mutex_);
      fences_[f].reached = turn;
      changed_.notify_all();
    });
    changed_.notify_all();
  }
  void wait(int queue, Fence f) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t turn = fences_[f].recorded;
    queues_[queue].push_back([this, f, turn] {
      std::unique_lock<std::mutex> inner(mutex_);
      changed_.wait(inner, [&] { return fences_[f].reached >= turn; });
    });
    changed_.notify_all();
  }
  bool is_done(Fence f) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return fences_[f].reached >= fences_[f].recorded;
  }
  void sync(Fence f) override {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t turn = fences_[f].recorded;
    changed_.wait(lock, [&] { return fences_[f].reached >= turn; });
  }
  bool progress() override {
    std::lock_guard<std::mutex> lock(mutex_);
    return !queues_[kCompute].empty() || busy_[kCompute];
  }

 private:
  struct Point {
    uint64_t recorded = 0, reached = 0;
  };

  void push(int queue, std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (is_noting_) {
      noted_.back().push_back(std::move(work));
      return;
    }
    queues_[queue].push_back(std::move(work));
    changed_.notify_all();
  }
  void serve(int queue) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return is_over_ || !queues_[queue].empty(); });
      if (queues_[queue].empty()) return;
      const std::function<void()> work = std::move(queues_[queue].front());
      queues_[queue].pop_front();
      busy_[queue] = true;
      lock.unlock();
      work();
      lock.lock();
      busy_[queue] = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queues_[kNumQueues];
  bool busy_[kNumQueues] = {};
  std::deque<Point> fences_;
  bool is_over_ = false, is_noting_ = false;
  std::vector<std::vector<std::function<void()>>> noted_;
  std::vector<std::thread> threads_;
};

void test_copies_and_the_mailbox(bool mailbox) {
  auto space = std::make_shared<DeviceSpace>(std::make_unique<ThreadedDevice>(), size_t(64) << 20);
  space->use_mailbox(mailbox);
  std::mt19937 random(1);
  std::vector<DeviceMemory> there;
  std::vector<std::vector<float>> here;
  for (size_t n : {size_t(3), size_t(700), size_t(5000), size_t(700000)}) {  // the last takes several pieces
    there.emplace_back(space, n * sizeof(float));
    here.emplace_back(n, 0.0f);
  }
  for (int round = 0; round < 40; ++round) {
    const size_t i = random() % there.size(), bytes = here[i].size() * sizeof(float);
    for (float& x : here[i]) x = float(random() % 1000);
    space->upload(there[i].as(), here[i].data(), bytes);
    space->device().scale(2.0f, here[i].size(), there[i].as<float>());
    for (float& x : here[i]) x *= 2;
    const size_t j = round % 3 ? i : random() % there.size();
    std::vector<float> found(here[j].size());
    space->download({{found.data(), there[j].as(), found.size() * sizeof(float)}});
    if (round > 30) CHECK(found == here[j]);
    if (j == i) CHECK(found == here[i]);
    if (round == 10) {  // from now on all arrays have content
      for (size_t k = 0; k < there.size(); ++k) {
        space->upload(there[k].as(), here[k].data(), here[k].size() * sizeof(float));
      }
    }
  }
}

/// The mailbox holds one result, so work that sends two is refused as a whole, and nothing of it stays.
void test_recorded_work_posts_once() {
  auto threaded = std::make_unique<ThreadedDevice>();
  const ThreadedDevice& device = *threaded;
  const auto space = std::make_shared<DeviceSpace>(std::move(threaded), size_t(1) << 20);
  const DeviceMemory there(space, 8);
  const uint32_t here[] = {3, 4};
  space->upload(there.as(), here, 8);
  for (const bool twice : {true, false}) {
    space->begin_noting();
    CHECK(space->post({{nullptr, there.as(), 8}}));
    if (twice) {
      CHECK(space->post({{nullptr, there.as(), 8}}));
      CHECK(throws<std::logic_error>([&] { space->end_noting(); }));
      CHECK(device.steps() == 0);
      continue;
    }
    const int noted = space->end_noting();
    CHECK(device.steps() == 1);
    uint32_t found[2] = {};
    CHECK(space->repeat(noted));
    space->collect({{found, nullptr, 8}});
    CHECK(found[0] == 3 && found[1] == 4);
  }
}

constexpr int kExperts = 24;

/// A file of experts of one page each: expert e is page e, filled with e + 1.
struct TempFile {
  std::string path = "/tmp/edgemoe_device_test_XXXXXX";
  TempFile() {
    const int fd = mkstemp(&path[0]);
    CHECK(fd >= 0);
    for (int e = 0; e < kExperts; ++e) {
      const std::vector<uint8_t> page(kPage, uint8_t(e + 1));
      CHECK(::write(fd, page.data(), page.size()) == ssize_t(page.size()));
    }
    ::close(fd);
  }
  ~TempFile() { unlink(path.c_str()); }
};

void begin(Cache& cache, const std::vector<int32_t>& now, const std::vector<int32_t>& ahead) {
  const std::vector<int8_t> levels(kExperts, 1);
  std::vector<int32_t> offsets;
  for (int i = 0; i <= int(now.size()); ++i) offsets.push_back(i);
  cache.begin({now.data(), levels.data(), int(now.size())}, offsets.data(), 1,
              {ahead.data(), levels.data(), int(ahead.size())});
}

void take_all(Cache& cache, size_t count) {
  std::vector<int> group;
  size_t taken = 0;
  for (cache.next(&group); !group.empty(); cache.next(&group)) taken += group.size();
  CHECK(taken == count);
}

/// The device has the bytes of the file, although experts are copied to slots that queued kernels have yet to read.
void test_experts_of_both_tiers() {
  const TempFile temp;
  const auto file = std::make_shared<File>(temp.path);
  ExpertTable table{{}, std::vector<uint32_t>(kExperts, 0), {2176}, {0}};
  for (int e = 0; e < kExperts; ++e) table.offsets.push_back(uint64_t(e) * kPage);
  const ExpertShape shape{Scheme::kNested, 1, kExperts, 64, 16, {{2, 2, 2}}, table.ends};
  const std::vector<uint8_t> rungs(kExperts, 1);
  Cache host(make_host_backing(file, table, false, 2), shape, rungs, 1, size_t(8) * system_page(),
             Policy("lfu", 1, kExperts));
  auto space = std::make_shared<DeviceSpace>(std::make_unique<ThreadedDevice>(), size_t(64) << 20);
  DeviceMemory seen(space, 4 * sizeof(float));
  Cache device(make_device_backing(space, host, kPage), shape, rungs, 1, size_t(5) * kPage, Policy("lfu", 1, kExperts));
  std::mt19937 random(2);
  std::vector<int32_t> promoted;
  for (int round = 0; round < 200; ++round) {
    std::vector<int32_t> there, here;
    for (int32_t e = 0; e < kExperts && here.size() < 3; ++e) {
      if (random() % 6 == 0) (device.residency()[size_t(e)] > 0 && there.size() < 3 ? there : here).push_back(e);
    }
    for (size_t i = promoted.size(); i-- > 0;) {
      if (host.residency()[size_t(promoted[i])] < 1) promoted.erase(promoted.begin() + ptrdiff_t(i));
    }
    begin(device, there, promoted);
    begin(host, here, {});
    std::vector<int> group;
    if (!there.empty()) device.next(&group);
    CHECK(group.size() == there.size());
    for (int32_t e : there) {  // a kernel that reads the expert, and what it found
      const uint8_t* base = device.view(e, 1).gate.rungs[0];
      space->device().copy(seen.as(), base, 4);
      uint32_t found = 0;
      space->download({{&found, seen.as(), 4}});
      CHECK(found == uint32_t(e + 1) * 0x01010101u);
    }
    take_all(host, here.size());
    host.close();
    device.close();
    promoted = here;
    device.check_integrity();
    host.check_integrity();
  }
  CHECK(device.stats().hits > 50);
}

}  // namespace

int main() {
  test_copies_and_the_mailbox(true);
  test_copies_and_the_mailbox(false);
  test_recorded_work_posts_once();
  test_experts_of_both_tiers();
  if (!failures) std::puts("device_test: all passed");
  return failures ? 1 : 0;
}
