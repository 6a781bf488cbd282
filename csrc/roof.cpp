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

double read_rate(const std::vector<std::pair<const uint8_t*, size_t>>& pieces, int threads) {
  constexpr size_t kBlock = size_t(1) << 20;
  std::vector<std::pair<const uint8_t*, size_t>> blocks;
  size_t total = 0;
  for (const auto& [bytes, size] : pieces) {
    for (size_t at = 0; at < size; at += kBlock) blocks.push_back({bytes + at, std::min(kBlock, size - at)});
    total += size;
  }
  if (total == 0) return 0;
  ThreadPool pool(threads);
  std::atomic<uint8_t> all{0};
  const Kernels& k = kernels();
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const double start = now_s();
    pool.run(int(blocks.size()), 1, [&](int begin, int end) {
      for (int i = begin; i < end; ++i) all |= k.read_all(blocks[size_t(i)].first, blocks[size_t(i)].second);
    });
    best = std::max(best, double(total) / (now_s() - start));
  }
  return best;
}

double memory_rate(size_t bytes, int threads) {
  expect_within("memory_rate bytes", int64_t(std::min<size_t>(bytes, INT64_MAX)), 0, int64_t(1) << 40);
  constexpr size_t kLeast = size_t(1) << 20;
  Memory memory(round_up(std::max(bytes, kLeast), kLeast));
  memory.prefer_huge_pages();
  std::memset(memory.bytes(), 1, memory.size());
  return read_rate({{memory.bytes(), memory.size()}}, threads);
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
  Loader loader(file, num_readers);  // last: its threads end before the memory that they write to is destroyed
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
