#include "roof.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <stdexcept>

#include "clock.h"
#include "error.h"
#include "kernels/kernels.h"
#include "loader.h"
#include "memory.h"
#include "threads.h"

namespace edgemoe {

double memory_rate(size_t bytes, int threads) {
  expect_within("memory_rate bytes", int64_t(std::min<size_t>(bytes, INT64_MAX)), 0, int64_t(1) << 40);
  constexpr size_t kBlock = size_t(1) << 20;
  Memory memory(round_up(std::max(bytes, kBlock), kBlock));
  memory.prefer_huge_pages();
  ThreadPool pool(threads);
  const int count = int(memory.size() / kBlock);
  std::memset(memory.bytes(), 1, memory.size());
  std::atomic<uint8_t> total{0};
  const Kernels& k = kernels();
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const double start = now_s();
    pool.run(count, std::max(1, count / (8 * threads)), [&](int begin, int end) {
      total |= k.read_all(memory.bytes() + size_t(begin) * kBlock, size_t(end - begin) * kBlock);
    });
    best = std::max(best, double(memory.size()) / (now_s() - start));
  }
  return best;
}

double disk_rate(const std::shared_ptr<const File>& file, const std::vector<uint64_t>& offsets, size_t length,
                 int num_readers) {
  expect_within("disk_rate num_readers", num_readers, 1, 64);
  expect_within("disk_rate length", int64_t(std::min<size_t>(length, INT64_MAX)), 1, int64_t(1) << 32);
  if (length % kPage) throw std::invalid_argument("disk_rate: length must be a multiple of 4096");
  const int slots = 2 * num_readers;
  Memory memory(size_t(slots) * length);
  std::deque<ReadJob> jobs(offsets.size());
  std::vector<ReadJob*> done;
  std::vector<int> free;
  for (int i = 0; i < slots; ++i) free.push_back(i);
  Loader loader(file, num_readers);  // last: ends before the memory that it writes to goes
  const double start = now_s();
  for (size_t i = 0; i < jobs.size();) {
    while (!free.empty() && i < jobs.size()) {
      jobs[i].offset = offsets[i];
      jobs[i].length = length;
      jobs[i].tag = free.back();
      jobs[i].to = memory.bytes() + size_t(free.back()) * length;
      free.pop_back();
      loader.submit(&jobs[i++]);
    }
    loader.collect(true, &done);
    for (const ReadJob* job : done) {
      if (job->error) std::rethrow_exception(job->error);
      free.push_back(job->tag);
    }
    done.clear();
  }
  while (loader.num_pending() > 0) loader.collect(true, &done);
  return double(length) * double(offsets.size()) / (now_s() - start);
}

}  // namespace edgemoe
