// The order of reads: a file whose reads wait for a permit, and what was begun in which order.
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "error.h"
#include "loader.h"
#include "memory.h"

using namespace edgemoe;

namespace {

int failures = 0;

#define CHECK(ok)                                                   \
  do {                                                              \
    if (!(ok)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #ok); \
      ++failures;                                                   \
    }                                                               \
  } while (0)

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

/// Reads that begin and then wait until the test permits them, in whatever order they come.
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

  /// The pages at which reads began, once there are so many; fewer if no more begin for ten seconds.
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

/// Jobs of one page each, at page i.
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

/// One thread is kept for what is wanted, however much is read ahead.
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
  file->permit(1);  // whichever ends: the next is the one that is wanted
  CHECK(file->begun(4).back() == 6);
  finish(&loader, file.get());
}

}  // namespace

int main() {
  const TempFile file(16);
  test_what_is_wanted_comes_before_what_is_ahead(file.path);
  test_a_promoted_read_is_wanted(file.path);
  test_a_read_is_taken_back_until_it_begins(file.path);
  test_reads_ahead_leave_a_thread(file.path);
  std::printf("reads_test: %s\n", failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
