// The order of reads, tested with a file whose reads wait for a permit and which keeps the order in which they began.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cache.h"
#include "check.h"
#include "loader.h"
#include "memory.h"

using namespace edgemoe;

namespace {

/// A file of pages, deleted at the end.
struct TempFile {
  std::string path = "/tmp/edgemoe_reads_test_XXXXXX";
  explicit TempFile(int pages) {
    const int fd = mkstemp(&path[0]);
    CHECK(fd >= 0 && ftruncate(fd, off_t(pages) * off_t(kPage)) == 0);
    ::close(fd);
  }
  ~TempFile() { unlink(path.c_str()); }
};

/// A file whose reads begin and then wait until the test permits them, in any order.
class GatedFile : public File {
 public:
  using File::File;

  void read_pages(uint64_t offset, size_t length, uint8_t* to) const override {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      begun_.push_back(int(offset / kPage));
      changed_.notify_all();
      changed_.wait(lock, [&] { return permits_ > 0; });
      --permits_;
    }
    File::read_pages(offset, length, to);
  }

  void permit(int reads) {
    std::lock_guard<std::mutex> lock(mutex_);
    permits_ += reads;
    changed_.notify_all();
  }

  /// The pages at which reads began, once there are `count`; fewer after ten seconds.
  std::vector<int> begun(size_t count) const {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(10), [&] { return begun_.size() >= count; });
    return begun_;
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  mutable std::vector<int> begun_;
  mutable int permits_ = 0;
};

/// Jobs of one page each: job i reads page i.
struct Jobs {
  explicit Jobs(int count) : memory(size_t(count) * kPage), jobs(size_t(count)) {
    for (int i = 0; i < count; ++i) {
      jobs[size_t(i)].offset = uint64_t(i) * kPage;
      jobs[size_t(i)].length = kPage;
      jobs[size_t(i)].to = memory.bytes() + size_t(i) * kPage;
      jobs[size_t(i)].tag = i;
    }
  }
  ReadJob* operator()(int i, bool is_ahead = false) {
    jobs[size_t(i)].is_ahead = is_ahead;
    return &jobs[size_t(i)];
  }
  Memory memory;
  std::vector<ReadJob> jobs;
};

using Pages = std::vector<int>;

/// A cache of one layer's experts, one page each and expert i at page i, read by one thread.
struct OnePageCache {
  static constexpr int kExperts = 16;

  OnePageCache(const std::string& path, int slots) : file(std::make_shared<GatedFile>(path)) {
    ExpertTable table{{}, std::vector<uint32_t>(kExperts, 0), {2176}, {0}};
    for (int e = 0; e < kExperts; ++e) table.offsets.push_back(uint64_t(e) * kPage);
    ExpertShape shape{Scheme::kNested, 1, kExperts, 64, 16, {{2, 2, 2}}, table.ends};
    cache = std::make_unique<Cache>(make_host_backing(file, table, false, 1), shape, std::vector<uint8_t>(kExperts, 1),
                                    1, size_t(slots) * system_page(), Policy("lfu", 1, kExperts));
  }

  void begin(const std::vector<int32_t>& now, const std::vector<int32_t>& ahead) {
    const std::vector<int8_t> levels(kExperts, 1);
    std::vector<int32_t> offsets;
    for (int i = 0; i <= int(now.size()); ++i) offsets.push_back(i);
    cache->begin({now.data(), levels.data(), int(now.size())}, offsets.data(), 1,
                 {ahead.data(), levels.data(), int(ahead.size())});
  }

  /// Permits every read and takes what the request asked for; returns how many experts came.
  int take_all() {
    file->permit(100);
    int count = 0;
    std::vector<int> group;
    for (cache->next(&group); !group.empty(); cache->next(&group)) count += int(group.size());
    return count;
  }

  /// Waits for a read ahead that is in flight: until the wanted `expert` has been read after it.
  void settle(int32_t expert) {
    begin({expert}, {});
    CHECK(take_all() == 1);
  }

  std::shared_ptr<GatedFile> file;
  std::unique_ptr<Cache> cache;
};

void finish(Loader* loader, GatedFile* file) {
  file->permit(100);
  std::vector<ReadJob*> done;
  while (loader->num_pending() > 0) loader->collect(true, &done);
  for (const ReadJob* job : done) CHECK(!job->error);
}

void test_what_is_wanted_comes_before_what_is_ahead(const std::string& path) {
  auto file = std::make_shared<GatedFile>(path);
  Jobs jobs(8);
  Loader loader(file, 1);
  loader.submit(jobs(0));
  CHECK(file->begun(1) == Pages({0}));
  for (int i : {1, 2}) loader.submit(jobs(i, true));
  for (int i : {3, 4}) loader.submit(jobs(i));
  finish(&loader, file.get());
  CHECK(file->begun(5) == Pages({0, 3, 4, 1, 2}));
}

void test_a_promoted_read_is_wanted(const std::string& path) {
  auto file = std::make_shared<GatedFile>(path);
  Jobs jobs(8);
  Loader loader(file, 1);
  loader.submit(jobs(0));
  CHECK(file->begun(1) == Pages({0}));
  for (int i : {1, 2, 3}) loader.submit(jobs(i, true));
  loader.submit(jobs(4));
  loader.promote(jobs(3, true));
  loader.promote(jobs(0));  // under way: nothing changes
  finish(&loader, file.get());
  CHECK(file->begun(5) == Pages({0, 4, 3, 1, 2}));
}

void test_a_read_is_taken_back_until_it_begins(const std::string& path) {
  auto file = std::make_shared<GatedFile>(path);
  Jobs jobs(8);
  Loader loader(file, 1);
  loader.submit(jobs(0));
  CHECK(file->begun(1) == Pages({0}));
  loader.submit(jobs(1));
  loader.submit(jobs(2, true));
  loader.submit(jobs(3));
  CHECK(!loader.cancel(jobs(0)));
  CHECK(loader.cancel(jobs(1)));
  CHECK(loader.cancel(jobs(2, true)));
  CHECK(!loader.cancel(jobs(1)));
  CHECK(loader.num_pending() == 2);
  finish(&loader, file.get());
  CHECK(file->begun(2) == Pages({0, 3}));
}

/// One thread is kept for urgent reads, however much is read ahead.
void test_reads_ahead_leave_a_thread(const std::string& path) {
  auto file = std::make_shared<GatedFile>(path);
  Jobs jobs(8);
  Loader loader(file, 3);
  for (int i : {1, 2, 3, 4}) loader.submit(jobs(i, true));
  CHECK(file->begun(2).size() == 2);
  loader.submit(jobs(5));
  const Pages begun = file->begun(3);
  CHECK(begun.size() == 3 && begun.back() == 5);
  loader.submit(jobs(6));
  file->permit(1);  // whichever ends, the next to begin is the urgent one
  CHECK(file->begun(4).back() == 6);
  finish(&loader, file.get());
}

/// A request's reads overtake reads ahead; so does a read ahead that the request wants.
void test_a_request_overtakes_what_is_ahead(const std::string& path) {
  OnePageCache c(path, 12);
  c.begin({0}, {4, 5, 6});
  CHECK(c.file->begun(1) == Pages({0}));
  c.file->permit(1);
  std::vector<int> group;
  c.cache->next(&group);
  CHECK(group == std::vector<int>({0}));
  CHECK(c.file->begun(2) == Pages({0, 4}));  // nothing else waits
  c.cache->next(&group);
  c.begin({1, 6}, {4, 5, 6});
  CHECK(c.take_all() == 2);
  const Pages begun = c.file->begun(4);
  CHECK(Pages(begun.begin(), begun.begin() + 4) == Pages({0, 4, 1, 6}));
  const CacheStats stats = c.cache->stats();
  CHECK(stats.ahead_late == 1);
  CHECK(stats.misses == 3);
  c.cache->check_integrity();
}

/// Reads ahead that are no longer listed are cancelled, unless they have begun or the request waits for them.
void test_only_what_nobody_wants_is_taken_back(const std::string& path) {
  OnePageCache c(path, 12);
  c.begin({0}, {4, 5, 6, 7});
  CHECK(c.file->begun(1) == Pages({0}));
  c.file->permit(1);
  std::vector<int> group;
  c.cache->next(&group);
  c.cache->next(&group);
  CHECK(c.file->begun(2) == Pages({0, 4}));
  CHECK(c.cache->stats().ahead_reads == 4);
  c.begin({6, 1}, {});  // 4 has begun, 5 and 7 are cancelled, 6 is wanted
  const CacheStats stats = c.cache->stats();
  CHECK(stats.ahead_reads == 2);
  CHECK(stats.ahead_late == 1);
  CHECK(c.take_all() == 2);
  c.settle(8);
  CHECK(c.file->begun(5) == Pages({0, 4, 6, 1, 8}));
  c.cache->check_integrity();
}

/// A closed request's reads that have not begun are not made.
void test_a_closed_request_reads_no_more(const std::string& path) {
  OnePageCache c(path, 12);
  c.begin({0, 1, 2, 3}, {8});
  CHECK(c.file->begun(1) == Pages({0}));
  c.file->permit(100);
  std::vector<int> group;
  c.cache->next(&group);
  c.cache->close();
  const Pages at_close = c.file->begun(1);
  c.begin({1, 2, 3}, {});
  CHECK(c.take_all() == 3);
  Pages all = c.file->begun(5);
  std::sort(all.begin(), all.end());
  CHECK(std::unique(all.begin(), all.end()) == all.end());  // nothing is read twice
  CHECK(at_close.size() <= all.size());
  c.cache->check_integrity();
}

/// Where nothing else can be dropped, reads ahead that have not begun make room; what the request still wants does not.
void test_what_is_ahead_makes_room_for_what_is_wanted(const std::string& path) {
  OnePageCache c(path, 3);
  c.begin({0}, {4, 5});
  CHECK(c.file->begun(1) == Pages({0}));
  c.file->permit(1);
  std::vector<int> group;
  c.cache->next(&group);
  CHECK(c.file->begun(2) == Pages({0, 4}));
  c.cache->next(&group);
  c.begin({1, 5, 2}, {4, 5});  // slots: 0, which may go, 4, which is being read, 5, which is wanted
  CHECK(c.take_all() == 3);
  const Pages begun = c.file->begun(5);
  CHECK(Pages(begun.begin(), begun.begin() + 4) == Pages({0, 4, 1, 5}));
  CHECK(c.cache->stats().ahead_late == 1);
  c.cache->check_integrity();
}

/// A budget is lowered at once: reads ahead are cancelled, and those that have begun are waited for.
void test_a_lower_budget_takes_reads_back(const std::string& path) {
  OnePageCache c(path, 8);
  c.begin({0}, {4, 5, 6, 7});
  c.file->permit(1);
  std::vector<int> group;
  c.cache->next(&group);
  CHECK(c.file->begun(2) == Pages({0, 4}));
  c.cache->next(&group);
  std::thread lowers([&] { c.cache->set_budget(system_page()); });
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (c.cache->stats().ahead_reads > 1 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  CHECK(c.cache->stats().ahead_reads == 1);
  c.file->permit(1);
  lowers.join();
  c.cache->check_integrity();
  CHECK(c.cache->stats().committed_bytes <= system_page());
  c.settle(9);
  CHECK(c.file->begun(3) == Pages({0, 4, 9}));
}

}  // namespace

int main() {
  const TempFile file(16);
  test_what_is_wanted_comes_before_what_is_ahead(file.path);
  test_a_promoted_read_is_wanted(file.path);
  test_a_read_is_taken_back_until_it_begins(file.path);
  test_reads_ahead_leave_a_thread(file.path);
  test_a_request_overtakes_what_is_ahead(file.path);
  test_only_what_nobody_wants_is_taken_back(file.path);
  test_a_closed_request_reads_no_more(file.path);
  test_what_is_ahead_makes_room_for_what_is_wanted(file.path);
  test_a_lower_budget_takes_reads_back(file.path);
  std::printf("reads_test: %s\n", failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
