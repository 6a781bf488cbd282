// The core's own tests, run under sanitizers: the cache under random requests, failing reads, the thread pool.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cache.h"
#include "check.h"
#include "crc32c.h"
#include "error.h"
#include "expert.h"
#include "kv.h"
#include "matrix.h"
#include "mixers/attention.h"
#include "quantize.h"

using namespace edgemoe;

namespace {

int num_threads = 2;  ///< for computing; the first argument

/// Those of this processor; the scalar one, whose bits all others must give, comes first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names = {"scalar"};
  std::istringstream all(usable_isas());
  for (std::string name; all >> name;) {
    if (name != "scalar") names.push_back(name);
  }
  return names;
}

constexpr int kExperts = 12, kHidden = 80, kExpertHidden = 48;
const std::vector<int32_t> kOffsets = [] {
  std::vector<int32_t> v(5 * kExperts + 1);
  for (size_t i = 0; i < v.size(); ++i) v[i] = int32_t(i);
  return v;
}();
const int32_t* const kRange = kOffsets.data();
const std::vector<uint8_t> kWidths = {2, 1, 1, 2, 2};

/// A file of quantised experts, deleted at the end.
struct ExpertFile {
  std::string path = "/tmp/edgemoe_core_test_XXXXXX";
  ExpertTable table{{}, {}, {}, {0}};
  std::vector<uint8_t> have = std::vector<uint8_t>(kExperts, 5);

  ExpertFile() {
    const int fd = mkstemp(&path[0]);
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    ThreadPool pool(num_threads);
    const float weights[8] = {0, 1, 4, 16, 64, 256, 1024, 4096};
    uint64_t at = kPage;
    for (int e = 0; e < kExperts; ++e) {
      std::vector<std::vector<uint8_t>> rungs(kWidths.size());
      for (const auto& shape :
           {std::pair<int, int>{kExpertHidden, kHidden}, {kExpertHidden, kHidden}, {kHidden, kExpertHidden}}) {
        std::vector<float> w(size_t(shape.first) * shape.second);
        for (float& x : w) x = normal(rng);
        std::vector<uint8_t*> outs;
        for (size_t r = 0; r < kWidths.size(); ++r) {
          const size_t old = rungs[r].size();
          rungs[r].resize(old + rung_bytes(Scheme::kNested, shape.first, shape.second, {kWidths[r], r == 0, r == 0}));
          outs.push_back(rungs[r].data() + old);
        }
        const std::vector<float> squares(size_t(shape.second), 1.0f);
        const Objective objective{weights, nullptr, nullptr, 0, squares.data(), 0, false};
        quantize_nested(pool, w.data(), shape.first, shape.second, kWidths, {1}, objective, outs);
      }
      uint32_t end = 0;
      table.ends.clear();
      for (const auto& rung : rungs) {
        CHECK(pwrite(fd, rung.data(), rung.size(), off_t(at + end)) == ssize_t(rung.size()));
        end += uint32_t(rung.size());
        table.ends.push_back(end);
        table.crcs.push_back(crc32c(rung.data(), rung.size()));
      }
      table.offsets.push_back(at);
      if (e % 3 == 2) have[size_t(e)] = uint8_t(1 + e / 3);  // as if the rest had not been stored
      at = round_up(at + end, kPage);
    }
    CHECK(ftruncate(fd, off_t(at)) == 0);
    ::close(fd);
  }
  ~ExpertFile() { unlink(path.c_str()); }

  ExpertShape shape() const {
    ExpertShape s{Scheme::kNested, 1, kExperts, kHidden, kExpertHidden, {}, table.ends};
    for (uint8_t w : kWidths) s.rung_widths.push_back({w, w, w});
    return s;
  }
  std::unique_ptr<Cache> open(size_t budget) const {
    return std::make_unique<Cache>(backing(false), shape(), have, 5, budget, Policy("lfu", 1, kExperts));
  }
  std::unique_ptr<Backing> backing(bool is_dry) const {
    return is_dry ? make_dry_backing() : make_host_backing(std::make_shared<File>(path), table, true, 3);
  }
};

constexpr Wish kNone{nullptr, nullptr, 0};

/// Experts that may or may not be asked for next.
Wish soon(std::mt19937* rng, std::vector<int32_t>* ids, std::vector<int8_t>* levels) {
  ids->clear();
  levels->clear();
  for (int e = 0; e < kExperts; ++e) {
    if ((*rng)() % 4) continue;
    ids->push_back(e);
    levels->push_back(int8_t(1 + (*rng)() % 5));
  }
  return {ids->data(), levels->data(), int(ids->size())};
}

size_t record_bytes(const ExpertFile& file) { return round_up(file.table.ends.back(), system_page()); }

void test_random_requests_on(const ExpertFile& file, double experts) {
  auto cache = file.open(size_t(experts * double(record_bytes(file))));
  std::mt19937 rng(7);
  std::vector<int> group;
  for (int round = 0; round < 300; ++round) {
    std::vector<int32_t> ids, soon_ids;
    std::vector<int8_t> levels, soon_levels;
    for (int e = 0; e < kExperts; ++e) {
      for (int level = 1 + int(rng() % 15); level <= 5; level += 1 + int(rng() % 3)) {
        ids.push_back(e);
        levels.push_back(int8_t(level));
      }
    }
    cache->begin({ids.data(), levels.data(), int(ids.size())}, kRange, 1, soon(&rng, &soon_ids, &soon_levels));
    std::set<int> given;
    for (cache->next(&group); !group.empty(); cache->next(&group)) {
      for (int i : group) {
        CHECK(given.insert(i).second);
        const ExpertView v = cache->view(ids[size_t(i)], levels[size_t(i)]);
        float sum = 0;  // touches every byte of the first rung
        for (size_t b = 0; b < rung_bytes(Scheme::kNested, v.gate.rows, v.gate.cols, {2, true, true}); ++b)
          sum += v.gate.rungs[0][b];
        CHECK(sum > 0);
      }
      if (rng() % 40 == 0) break;
    }
    cache->close();
    cache->check_integrity();
    if (rng() % 4 == 0) cache->shrink(int(rng() % kExperts), int(rng() % 5));
    if (rng() % 8 == 0) {  // a smaller budget for a while
      cache->set_budget(record_bytes(file));
      cache->check_integrity();
      cache->set_budget(size_t(experts * double(record_bytes(file))));
    }
    cache->check_integrity();
  }
  CHECK(cache->stats().peak_bytes <= cache->stats().budget_bytes);
}

void test_failing_reads(const ExpertFile& file) {
  ExpertFile broken;
  auto cache = broken.open(4 * record_bytes(file));
  CHECK(truncate(broken.path.c_str(), off_t(broken.table.offsets[6])) == 0);
  std::vector<int> group;
  for (int round = 0; round < 50; ++round) {
    const int32_t ids[] = {0, 7, 1, 8, 2};
    const int8_t levels[] = {5, 5, 3, 2, 1};
    bool failed = false;
    try {
      cache->begin({ids, levels, 5}, kRange, 1, kNone);
      do cache->next(&group);
      while (!group.empty());
    } catch (const ReadError& e) {
      failed = std::string(e.what()).find(broken.path) == 0;
    }
    CHECK(failed);
    cache->check_integrity();
  }
}

void test_destruction_during_reads(const ExpertFile& file) {
  for (int round = 0; round < 50; ++round) {
    auto cache = file.open(8 * record_bytes(file));
    const int32_t ids[] = {0, 1, 2, 3, 4};
    const int8_t levels[] = {5, 5, 5, 5, 5};
    cache->begin({ids, levels, 5}, kRange, 1, kNone);
  }
}

void test_budget_of_nothing(const ExpertFile& file) {
  CHECK(throws<OutOfBudget>([&] { file.open(record_bytes(file) - 1); }));
}

/// Statistics and residency are read by another thread all the while; each number only grows, or stays in its bounds.
void test_statistics_from_another_thread(const ExpertFile& file) {
  for (const bool is_dry : {false, true}) {
    auto cache = std::make_unique<Cache>(file.backing(is_dry), file.shape(), file.have, 5,
                                         size_t(5.4 * double(record_bytes(file))), Policy("lfu", 1, kExperts));
    std::atomic<bool> stop{false};
    std::atomic<int> rounds{0};
    std::thread reader([&] {
      uint64_t uses = 0, bytes = 0;
      for (; !stop; ++rounds) {
        const CacheStats s = cache->stats();
        const LoaderStats l = cache->loader_stats();
        CHECK(s.committed_bytes <= s.budget_bytes && s.peak_bytes <= s.budget_bytes);
        CHECK(s.hits + s.misses >= uses && l.bytes >= bytes);
        uses = s.hits + s.misses;
        bytes = l.bytes;
        for (const int8_t level : cache->residency()) CHECK(level >= 0 && level <= 5);
      }
    });
    std::mt19937 rng(13);
    std::vector<int> group;
    for (int round = 0; round < 400 || rounds < 50; ++round) {
      std::vector<int32_t> ids, soon_ids;
      std::vector<int8_t> levels, soon_levels;
      for (int e = int(rng() % 3); e < kExperts; e += 1 + int(rng() % 4)) {
        ids.push_back(e);
        levels.push_back(int8_t(1 + rng() % 5));
      }
      cache->begin({ids.data(), levels.data(), int(ids.size())}, kRange, 1, soon(&rng, &soon_ids, &soon_levels));
      do cache->next(&group);
      while (!group.empty());
      cache->shrink(int(rng() % kExperts), int(rng() % 5));
    }
    stop = true;
    reader.join();
    cache->check_integrity();
  }
}

/// Wrong shapes are refused, as pointers are computed from them.
void test_shapes_that_do_not_fit_are_refused(const ExpertFile& file) {
  const auto open = [&](void (*change)(ExpertShape*), bool is_dry) {
    ExpertShape shape = file.shape();
    change(&shape);
    Cache(file.backing(is_dry), shape, file.have, 5, 100 * record_bytes(file), Policy("lfu", 1, kExperts));
  };
  void (*const everywhere[])(ExpertShape*) = {
      [](ExpertShape* s) { s->ends[0] = 0; },         [](ExpertShape* s) { s->ends[3] = s->ends[2] - 1; },
      [](ExpertShape* s) { s->hidden = 0; },          [](ExpertShape* s) { s->expert_hidden = -1; },
      [](ExpertShape* s) { s->rung_widths[1] = {}; }, [](ExpertShape* s) { s->rung_widths[0] = {8, 8, 8}; },
      [](ExpertShape* s) { s->num_experts = 0; },     [](ExpertShape* s) { s->ends.pop_back(); }};
  for (const auto change : everywhere) {
    CHECK(throws<std::invalid_argument>([&] { open(change, false); }));
    CHECK(throws<std::invalid_argument>([&] { open(change, true); }));
  }
  void (*const with_bytes[])(ExpertShape*) = {
      [](ExpertShape* s) { s->ends[4] += 4096; }, [](ExpertShape* s) { s->ends[0] -= 64; },
      [](ExpertShape* s) { s->hidden = 1 << 20; }, [](ExpertShape* s) { std::swap(s->hidden, s->expert_hidden); }};
  for (const auto change : with_bytes) CHECK(throws<std::invalid_argument>([&] { open(change, false); }));
  CHECK(throws<std::invalid_argument>([] { make_kv(KvType::kF16, KvType::kQ8, 1, 0, 16, false); }));
  CHECK(throws<std::invalid_argument>([] { kv_bytes(KvType::kF16, 1 << 30, 1 << 30, 1 << 30); }));
  CHECK(throws<std::invalid_argument>([] { Workspace(1, {-1, 64, 64, 1, 16, 1}); }));
  CHECK(throws<std::invalid_argument>([] { Workspace::bytes(-1, {1, 64, 64, 1, 16, 1}); }));
}

/// A matrix read from a file equals the one made from its rungs. Damage, a short file and another size are errors.
void test_resident_matrices(const ExpertFile& file) {
  const int rows = kExpertHidden, cols = kHidden;
  const size_t first = rung_bytes(Scheme::kNested, rows, cols, {kWidths[0], true, true});
  const File f(file.path);
  const uint64_t at = file.table.offsets[1];
  const Memory bytes(round_up(first, kPage));
  f.read_pages(at, bytes.size(), bytes.bytes());
  const auto arena = std::make_shared<Arena>(64 * record_bytes(file));
  // The gate's first rung starts the record.
  const auto read = [&](uint64_t offset, uint64_t length, uint32_t crc, int r, int c, bool verify) {
    return nested_from_file(arena, f, {offset, {length}, {crc}}, r, c, {kWidths[0]}, verify, "gate",
                            {Scheme::kNested, {1}});
  };
  const uint32_t crc = crc32c(bytes.bytes(), first);
  const auto stored = read(at, first, crc, rows, cols, true);
  const auto made = nested_from_rungs({{bytes.bytes(), first}}, rows, cols, {kWidths[0]}, {Scheme::kNested, {1}});
  std::vector<float> a(size_t(cols), 0.0f), b(a);
  for (int r = 0; r < rows; ++r) {
    decode_row(kernels(), stored->matrix, r, a.data());
    decode_row(kernels(), made->matrix, r, b.data());
    CHECK(a == b);
  }
  CHECK(throws<std::invalid_argument>([] { Arena(1).take(system_page() + 1); }));
  CHECK(throws<FormatError>([&] { read(at, first, crc + 1, rows, cols, true); }));
  read(at, first, crc + 1, rows, cols, false);
  CHECK(throws<ReadError>([&] { read(round_up(f.size(), kPage), first, crc, rows, cols, true); }));
  CHECK(throws<ReadError>([&] { read(UINT64_MAX - kPage + 1, first, crc, rows, cols, true); }));
  for (const uint64_t offset : {uint64_t(1), at + 64}) {
    CHECK(throws<std::invalid_argument>([&] { read(offset, first, crc, rows, cols, true); }));
  }
  for (const auto& s : {std::pair<int, int>{rows + 16, cols}, {0, cols}, {rows, -1}, {1 << 30, 1 << 30}}) {
    CHECK(throws<std::invalid_argument>([&] { read(at, first, crc, s.first, s.second, true); }));
  }
  CHECK(throws<std::invalid_argument>(
      [&] { nested_from_rungs({{bytes.bytes(), first - 1}}, rows, cols, {kWidths[0]}, {Scheme::kNested, {1}}); }));
}

/// Numbers that are not valid in an objective are errors, and nothing is cast that does not fit.
void test_objectives_that_are_none_are_refused() {
  const int rows = 20, cols = 24;
  const std::vector<uint8_t> widths = {2, 2};
  std::mt19937 rng(17);
  std::normal_distribution<float> normal;
  ThreadPool pool(num_threads);
  std::vector<float> w(size_t(rows) * cols), moments(size_t(cols) * cols, 0.5f), squares(size_t(cols), 1.0f);
  for (float& x : w) x = normal(rng);
  for (int c = 0; c < cols; ++c) moments[size_t(c) * cols + c] = 1;
  std::vector<std::vector<uint8_t>> rungs;
  std::vector<uint8_t*> outs;
  for (size_t r = 0; r < widths.size(); ++r) {
    rungs.emplace_back(rung_bytes(Scheme::kNested, rows, cols, {widths[r], r == 0, true}));
    outs.push_back(rungs.back().data());
  }
  const auto run = [&](std::vector<float> weights, std::vector<float> m, std::vector<float> s) {
    quantize_nested(pool, w.data(), rows, cols, widths, {1, 1},
                    {weights.data(), m.data(), nullptr, 0, s.data(), 2, false}, outs);
  };
  const std::vector<float> weights = {0, 1, 0, 16, 0, 0, 0, 0};
  run(weights, moments, squares);
  const float bad[] = {NAN, INFINITY, -INFINITY, -1};
  for (const float x : bad) {
    auto changed = weights;
    changed[1] = x;
    CHECK(throws<std::invalid_argument>([&] { run(changed, moments, squares); }));
    changed = squares;
    changed[5] = x;
    CHECK(throws<std::invalid_argument>([&] { run(weights, moments, changed); }));
    for (const size_t at : {size_t(1), size_t(cols + 1)}) {  // off and on the diagonal; a product may be negative
      changed = moments;
      changed[at] = x;
      if (at == 1 && x == -1) continue;
      CHECK(throws<std::invalid_argument>([&] { run(weights, changed, squares); }));
    }
  }
  CHECK(throws<std::invalid_argument>([&] { run(std::vector<float>(8), moments, squares); }));
  // Products that overflow on the way give bad codes, but no error.
  run(weights, std::vector<float>(moments.size(), 3e38f), squares);
}

/// The quick search, the full one and the descent choose the same codes by every instruction set, for any threads.
void test_instruction_sets_choose_the_same_codes() {
  const int rows = 40, cols = 70;
  const std::vector<uint8_t> widths = {2, 1, 1, 2, 2};
  const float weights[8] = {0, 20, 16, 28, 0, 512, 0, 8192};
  std::mt19937 rng(29);
  std::normal_distribution<float> normal;
  std::vector<float> w(size_t(rows) * cols), moments(size_t(cols) * cols), rest, squares(size_t(cols), 1.0f);
  for (float& x : w) x = 0.02f * normal(rng) + 0.01f;
  for (int i = 0; i < cols; ++i) {
    for (int j = 0; j < cols; ++j) moments[size_t(i) * cols + j] = 1 / float(1 << std::min(std::abs(i - j), 30));
  }
  rest = moments;
  for (float& x : rest) x = x < 1 ? -x / 4 : x;
  const Objective objectives[] = {{weights, nullptr, nullptr, 0, squares.data(), 0, false},
                                  {weights, nullptr, nullptr, 0, squares.data(), 0, true},
                                  {weights, moments.data(), nullptr, 0, squares.data(), 3, false},
                                  {weights, moments.data(), rest.data(), 7, squares.data(), 3, false}};
  for (const Objective& objective : objectives) {
    std::vector<std::vector<uint8_t>> expected;
    for (const std::string& name : instruction_sets()) {
      use_isa(name.c_str());
      for (const int threads : {1, num_threads}) {
        ThreadPool pool(threads);
        std::vector<std::vector<uint8_t>> rungs;
        std::vector<uint8_t*> outs;
        for (size_t r = 0; r < widths.size(); ++r) {
          rungs.emplace_back(rung_bytes(Scheme::kNested, rows, cols, {widths[r], r == 0, r < 2}));
          outs.push_back(rungs.back().data());
        }
        quantize_nested(pool, w.data(), rows, cols, widths, {1, 1, 0, 0, 0}, objective, outs);
        if (expected.empty()) expected = rungs;
        CHECK(rungs == expected);
      }
    }
  }
}

/// Uses keep their order and stay finite however many tokens a pass has.
void test_uses_after_long_passes() {
  for (const int tokens : {1, 64, 60000, 65536, 10000000}) {
    Policy policy("lfu", 1, 4);
    for (int pass = 0; pass < 3; ++pass) {
      policy.advance(0, tokens);
      policy.use(pass, tokens);
    }
    for (int e = 0; e < 4; ++e) CHECK(std::isfinite(policy.score(e)) && std::isfinite(policy.uses()[size_t(e)]));
    CHECK(policy.score(2) > policy.score(1) && policy.score(1) >= policy.score(0) &&
          policy.score(0) >= policy.score(3));
    if (tokens <= 60000) CHECK(policy.score(1) > policy.score(3));
    Policy next("lfu", 1, 4);
    next.set_uses(policy.uses());
  }
  Policy policy("lfu", 1, 2);
  for (const double bad : {double(NAN), double(INFINITY), -1.0}) {
    CHECK(throws<std::invalid_argument>([&] { policy.set_uses({1, bad}); }));
  }
}

/// The checksums of RFC 3720 (B.4), by table and by instruction, whole and in two parts, at any address.
void test_checksums() {
  std::vector<uint8_t> bytes(32, 0);
  CHECK(crc32c(bytes.data(), 32) == 0x8a9136aa && crc32c_by_table(bytes.data(), 32) == 0x8a9136aa);
  for (size_t i = 0; i < 32; ++i) bytes[i] = uint8_t(i);
  CHECK(crc32c(bytes.data(), 32) == 0x46dd794e && crc32c_by_table(bytes.data(), 32) == 0x46dd794e);
  CHECK(crc32c(nullptr, 0) == 0);
  std::mt19937 rng(19);
  bytes.resize(3 * 3 * kCrcPart + 100);
  for (uint8_t& b : bytes) b = uint8_t(rng());
  for (int round = 0; round < 200; ++round) {
    const size_t from = rng() % 9, length = rng() % (bytes.size() - from), cut = rng() % (length + 1);
    const uint32_t whole = crc32c_by_table(bytes.data() + from, length);
    CHECK(crc32c(bytes.data() + from, length) == whole);
    CHECK(crc32c(bytes.data() + from + cut, length - cut, crc32c(bytes.data() + from, cut)) == whole);
  }
}

/// The slow and obvious search through all that may go, in the order of slots.
int lowest_of_all(const Policy& policy, const std::vector<int>& owners) {
  int victim = -1;
  for (const int e : owners) {
    if (e >= 0 && (victim < 0 || policy.score(e) < policy.score(victim))) victim = e;
  }
  return victim;
}

/// Whatever is added, removed and scored anew, the victim is that of the slow search, also among equals.
void test_victims_are_those_of_a_search_among_all() {
  constexpr int kLayers = 5, kEach = 70, kAll = kLayers * kEach;
  std::mt19937 rng(3);
  const auto below = [&rng](int n) { return int(rng() % unsigned(n)); };
  for (const char* name : {"lfu", "lru", "given"}) {
    std::vector<double> scores(kAll, 0.0), scale(kLayers, 1.0), shift(kLayers, 0.0);
    std::vector<uint32_t> version(kLayers, 0);
    uint8_t decides = 1;
    const GivenScores given{scores.data(), scale.data(), shift.data(), version.data(), &decides, nullptr};
    const bool is_given = name == std::string("given");
    Policy policy = is_given ? Policy(given, kLayers, kEach) : Policy(name, kLayers, kEach);
    Victims victims(kLayers, kEach);
    std::vector<int> owners(200, -1), slots(kAll, -1);
    for (int step = 0; step < 40000; ++step) {
      const int layer = below(kLayers), e = layer * kEach + below(kEach), slot = below(200);
      switch (below(is_given ? 8 : 6)) {
        case 0:
          policy.advance(layer, step % 1000 ? 1 : 60000);
          for (int i = 0; i < 3; ++i) policy.use(layer * kEach + below(kEach), 1 + below(2));
          break;
        case 1:
        case 2:
          if (slots[e] < 0) break;
          victims.remove(e);
          owners[size_t(slots[e])] = -1;
          slots[e] = -1;
          break;
        case 6:  // scales and shifts with which rounding makes close values equal
          for (int l = 0; l < kLayers; ++l) {
            scale[l] = 1.0 / (1 + below(7));
            shift[l] = below(2) ? 0.0 : double(below(3));
          }
          break;
        case 7:
          for (int i = 0; i < kEach; ++i) scores[layer * kEach + i] = 1.0 + below(6) * 0x1p-52 + below(2);
          if (below(50) == 0) decides ^= 1;
          for (int l = 0; l < kLayers; ++l) version[l] += 1;
          break;
        default:
          if (slots[e] >= 0 || owners[slot] >= 0) break;
          victims.add(e, slot, policy);
          owners[slot] = e;
          slots[e] = slot;
      }
      CHECK(victims.has(e) == (slots[e] >= 0));
      CHECK(victims.lowest(policy) == lowest_of_all(policy, owners));
      CHECK(victims.is_sound(policy));
    }
  }
}

void test_thread_pool() {
  for (int threads : {1, 2, 5, num_threads}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 2000; ++round) {
      const int count = 1 + round % 97;
      std::vector<int> seen(size_t(count), 0);
      pool.run(count, 1 + round % 7, [&](int begin, int end) {
        for (int i = begin; i < end; ++i) seen[size_t(i)] += 1;
      });
      for (int n : seen) CHECK(n == 1);
    }
    // More pieces than a share can count: they become larger.
    std::vector<int> seen(200000, 0);
    pool.run(int(seen.size()), 1, [&](int begin, int end) {
      for (int i = begin; i < end; ++i) seen[size_t(i)] += 1;
    });
    for (int n : seen) CHECK(n == 1);
    // Shares follow one another from the first item to the last.
    for (const int count : {1, 7, 97, 200000}) {
      CHECK(pool.first(count, 3, 0) == 0 && pool.first(count, 3, threads) == count);
      for (int i = 0; i < threads; ++i) CHECK(pool.first(count, 3, i) <= pool.first(count, 3, i + 1));
    }
    // What is expected is only a hint: loops run whatever it is, and its addresses need not be valid.
    for (int round = 0; round < 2000; ++round) {
      Ahead ahead;
      ahead.from[0] = reinterpret_cast<const uint8_t*>(seen.data());
      ahead.from[1] = reinterpret_cast<const uint8_t*>(uintptr_t(64) * size_t(round));
      ahead.step[0] = 512;
      ahead.step[1] = uint32_t(round % 3) * 64;
      ahead.steps = round % 5 * 100;
      for (int i = 0; i < threads; ++i) pool.expect(i, ahead);
      std::atomic<int> sum{0};
      pool.run(8, 1, [&](int begin, int end) { sum += end - begin; });
      CHECK(sum == 8);
    }
  }
}

/// The FFN of a group gives each row the bits that it gets alone.
void test_rows_do_not_depend_on_their_batch(const ExpertFile& file) {
  auto cache = file.open(kExperts * record_bytes(file));
  Workspace ws(num_threads + 1, {600, kHidden, kExpertHidden, 1, 16, 1});
  const int T = 600;
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(size_t(T) * kHidden), all(x.size()), one(kHidden);
  for (float& v : x) v = normal(rng);
  const int32_t id = 4;
  const int8_t level = 3;
  std::vector<int> group;
  cache->begin({&id, &level, 1}, kRange, 1, kNone);
  cache->next(&group);
  run_ffns(ws, x.data(), T, Activation::kSwiglu, {{cache->view(id, level), nullptr, T, all.data()}});
  for (int t = 0; t < T; t += 37) {
    run_ffns(ws, x.data() + size_t(t) * kHidden, 1, Activation::kSwiglu,
             {{cache->view(id, level), nullptr, 1, one.data()}});
    CHECK(std::memcmp(one.data(), all.data() + size_t(t) * kHidden, one.size() * sizeof(float)) == 0);
  }
}

/// Every instruction set gives the bits of the scalar one.
void test_instruction_sets_agree(const ExpertFile& file) {
  const int T = 90, heads = 6, kv_heads = 2, head_dim = 18, stride = 32, capacity = 400;
  // Positions and lengths of chunks: more queries than pass over the keys together, and keys of different blocks.
  const std::pair<int, int> chunks[] = {{0, 36}, {36, 5}, {250, 9}, {259, 1}};
  auto cache = file.open(kExperts * record_bytes(file));
  std::mt19937 rng(5);
  std::normal_distribution<float> normal;
  const auto random = [&](size_t n) {
    std::vector<float> v(n);
    for (float& x : v) x = normal(rng);
    return v;
  };
  const auto x = random(size_t(T) * kHidden), q0 = random(size_t(T) * heads * head_dim);
  const auto k0 = random(size_t(T) * kv_heads * head_dim), v0 = random(size_t(T) * kv_heads * head_dim);
  const auto router = random(21 * kHidden), norm = random(kHidden), angles = random(size_t(T) * head_dim),
             sinks = random(size_t(heads));
  std::vector<std::vector<float>> expected;
  for (const std::string& name : instruction_sets()) {
    use_isa(name.c_str());
    std::vector<std::vector<float>> got;
    Workspace ws(num_threads, {T, kHidden, kExpertHidden, capacity, head_dim, heads});
    for (int8_t level = 1; level <= 5; ++level) {
      const int32_t id = 2;
      std::vector<int> group;
      cache->begin({&id, &level, 1}, kRange, 1, kNone);
      cache->next(&group);
      for (int n : {1, T}) {
        std::vector<float> out(size_t(n) * kHidden);
        run_ffns(ws, x.data(), n, Activation::kSwiglu, {{cache->view(id, level), nullptr, n, out.data()}});
        got.push_back(out);
      }
      cache->close();
    }
    std::vector<float> out(x.size()), scores(21 * T), gates(3 * T), attended(36 * heads * head_dim);
    rms_norm(ws, x.data(), norm.data(), 1e-5f, T, kHidden, out.data());
    got.push_back(out);
    std::vector<int32_t> experts(3 * T);
    for (const Scoring scoring : {Scoring::kSoftmax, Scoring::kSoftmaxTopK, Scoring::kSigmoid, Scoring::kSparseMixer}) {
      const RouteRule rule{21, 3, scoring, true, 1.5f, scoring == Scoring::kSigmoid ? 7 : 1, 1, true};
      route(ws, x.data(), {router.data(), nullptr, nullptr}, T, kHidden, rule, scores.data(), experts.data(),
            gates.data());
      got.push_back(gates);
      got.emplace_back(experts.begin(), experts.end());
    }
    AttentionParts parts{0,
                         {heads, kv_heads, head_dim, 0, 0.25f, head_dim},
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr,
                         sinks.data(),
                         false,
                         false,
                         1e-5f,
                         2.0f,
                         0,
                         0,
                         angles.data(),
                         angles.data() + T * head_dim / 2,
                         nullptr,
                         nullptr};
    const KvType types[] = {KvType::kF16, KvType::kF32, KvType::kQ8, KvType::kQ4, KvType::kQ3, KvType::kQ2};
    for (const KvType key_type : types) {
      for (const KvType value_type : types) {
        // For two different types, neither of which is f16, two chunks are enough.
        const bool is_mixed = key_type != value_type && key_type != KvType::kF16 && value_type != KvType::kF16;
        const size_t keys = kv_heads * kv_head_bytes(key_type, capacity, stride);
        std::vector<uint8_t> kv(keys + kv_heads * kv_head_bytes(value_type, capacity, stride));
        const KvLayer layer{kv.data(), kv.data() + keys, key_type, value_type, capacity, stride, stride};
        auto q = q0, k = k0, v = v0;
        for (const auto& [pos, n] : chunks) {
          if (is_mixed && pos > 36) break;
          attention(ws, q.data(), k.data(), v.data(), n, pos, parts, layer, attended.data());
          got.push_back(attended);
        }
        got.emplace_back(kv.begin(), kv.end());
      }
      std::vector<uint8_t> latents(kv_head_bytes(key_type, capacity, stride));
      const KvLayer layer{latents.data(), nullptr, key_type, key_type, capacity, stride, 16};
      AttentionParts one_key = parts;
      one_key.shape.num_kv_heads = 1;
      auto q = q0, k = k0;
      for (const auto& [pos, n] : chunks) {
        attention(ws, q.data(), k.data(), nullptr, n, pos, one_key, layer, attended.data());
        got.push_back(attended);
      }
      got.emplace_back(latents.begin(), latents.end());
    }
    if (expected.empty()) {
      expected = got;
      continue;
    }
    for (size_t i = 0; i < got.size(); ++i) {
      CHECK(std::memcmp(got[i].data(), expected[i].data(), got[i].size() * sizeof(float)) == 0);
    }
  }
}

/// What the kernels make of n floats, one result after the other.
std::vector<float> results_of(const Kernels& k, const std::vector<float>& x) {
  const int n = int(x.size()), tiles = blocks(n, kTileCols), groups = blocks(n, kKvGroup);
  const std::vector<float> other(x.rbegin(), x.rend());
  std::vector<float> all, y = x;
  const auto keep = [&](const auto& from) { all.insert(all.end(), from.begin(), from.end()); };
  const auto next = [&] {
    keep(y);
    y = x;
  };
  next();
  k.softmax(y.data(), n), next();
  k.soft_cap(y.data(), 30.0f, n), next();
  k.sigmoid(y.data(), n), next();
  k.softplus(y.data(), other.data(), n), next();
  k.softplus(y.data(), nullptr, n), next();
  k.sigmoid_mul(other.data(), x.data(), n, y.data()), next();
  k.decays(x.data(), other.data(), true, n, y.data()), next();
  k.add_scaled(other.data(), 0.7f, n, y.data()), next();
  k.rms_norm(x.data(), other.data(), 1e-5f, n, y.data()), next();
  k.matmul_f32(other.data(), x.data(), 1, 1, n, 0, 1, y.data()), next();
  const int side = std::min(n, 5);
  std::vector<float> products(size_t(side) * side);
  k.matmul_f32(other.data(), x.data(), side, side, n / side, 0, side, products.data());
  keep(products);
  const std::vector<uint8_t> rows{1, 0, 1};
  k.add_scaled_rows(other.data(), size_t(n / 2), rows.data(), x.data(), std::min(n, 3), n - n / 2, y.data()), next();
  std::vector<float> weights(3 * kTileRows), targets(3 * kTileRows);
  for (size_t i = 0; i < targets.size(); ++i) {
    weights[i] = std::fabs(other[i % x.size()]);
    targets[i] = 100 + 40 * x[(i * 7) % x.size()];
  }
  std::array<CodeLevel, 3> levels{};
  for (int i = 0; i < 3; ++i) levels[size_t(i)].bits = 2 + 2 * i;
  std::vector<int> chosen(kTileRows);
  k.best_codes(levels.data(), 3, weights.data(), targets.data(), chosen.data());
  keep(chosen);
  for (const Activation kind :
       {Activation::kSwiglu, Activation::kGeglu, Activation::kClampedSwiglu, Activation::kRelu2}) {
    k.activate(kind, other.data(), x.data(), n, y.data()), next();
  }
  std::vector<uint16_t> halves(x.size());
  k.to_f16(x.data(), n, halves.data());
  k.from_f16(halves.data(), n, y.data()), next();
  std::vector<int8_t> codes(size_t(tiles) * kTileCols);
  std::vector<float> scales(size_t(tiles) * kScales), sums(size_t(tiles) * kSums);
  k.quantize_row(x.data(), n, codes.data(), scales.data(), sums.data());
  keep(codes), keep(scales), keep(sums);
  std::vector<int32_t> whole(size_t(groups), 0);
  k.quantize_head(x.data(), n, codes.data(), scales.data(), whole.data());
  keep(codes), keep(scales), keep(whole);
  for (int bits = 2; bits <= 4; ++bits) {
    k.pack_head(x.data(), n, bits, codes.data(), scales.data());
    keep(codes), keep(scales);
  }
  std::vector<float> z(kMaxRank), into(18), part(18);
  for (size_t i = 0; i < z.size(); ++i) z[i] = x[i % x.size()];
  const std::vector<uint16_t> u(kMaxRank, 0x3800);  // 0.5
  RankRow row{};
  k.quantize_ranks(u.data(), z.data(), &row);
  all.insert(all.end(), row.codes, row.codes + kMaxRank);
  keep(std::vector<float>{row.scale, row.sum});
  for (size_t i = 0; i < into.size(); ++i) into[i] = x[i % x.size()], part[i] = other[i % x.size()];
  k.merge_parts(into.data(), part.data(), 16);
  keep(into);
  return all;
}

/// NaN, infinities and zeros of either sign at every place. One NaN is like another: its sign and payload are the
/// processor's.
void test_instruction_sets_agree_on_what_is_no_number() {
  std::mt19937 rng(23);
  std::normal_distribution<float> normal;
  const float odd[] = {NAN, INFINITY, -INFINITY, -0.0f, 0.0f, 3e38f, 1e-40f};
  std::vector<std::vector<float>> inputs;
  for (const size_t n : {size_t(1), size_t(7), size_t(16), size_t(21), size_t(40), size_t(70)}) {
    for (size_t at = 0; at < n; ++at) {
      for (const float first : odd) {
        std::vector<float> x(n);
        for (float& v : x) v = 3 * normal(rng);
        x[at] = first;
        inputs.push_back(x);
        x[rng() % n] = odd[rng() % 7];
        x[rng() % n] = odd[rng() % 7];
        inputs.push_back(x);
      }
    }
  }
  std::vector<std::vector<float>> expected;
  for (const std::string& name : instruction_sets()) {
    use_isa(name.c_str());
    for (size_t i = 0; i < inputs.size(); ++i) {
      const std::vector<float> got = results_of(kernels(), inputs[i]);
      if (name == "scalar") expected.push_back(got);
      for (size_t j = 0; j < got.size(); ++j) {
        const float a = got[j], b = expected[i][j];
        CHECK((std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0);
      }
    }
  }
}

/// Products and decoded rows of a matrix have the same bits for one token and many, by every instruction set.
void check_agreement(const NestedMatrix& w, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const int T = 70;
  std::vector<float> x(size_t(T) * w.cols);
  for (float& v : x) v = normal(rng);
  std::vector<float> expected;
  for (const std::string& name : instruction_sets()) {
    use_isa(name.c_str());
    Workspace ws(num_threads, {T, w.cols, 16, 1, 16, 1});
    std::vector<float> all(size_t(T) * w.rows), one(size_t(w.rows)), row(size_t(w.cols));
    linear(ws, x.data(), T, {&w}, {all.data()});
    for (int t = 0; t < T; t += 23) {
      linear(ws, x.data() + size_t(t) * w.cols, 1, {&w}, {one.data()});
      CHECK(std::memcmp(one.data(), all.data() + size_t(t) * w.rows, one.size() * sizeof(float)) == 0);
    }
    for (int r = 0; r < w.rows; r += 4) {
      decode_row(kernels(), w, r, row.data());
      all.insert(all.end(), row.begin(), row.end());
    }
    if (expected.empty()) expected = all;
    CHECK(std::memcmp(all.data(), expected.data(), all.size() * sizeof(float)) == 0);
  }
}

/// MWQ on random planes: every instruction set gives the scalar one's bits, and a row gives those it gives alone.
void test_mwq_agrees() {
  std::mt19937 rng(11);
  std::normal_distribution<float> normal;
  for (const std::vector<uint8_t>& widths : {std::vector<uint8_t>{2, 1, 1}, {5, 1, 1, 1}}) {
    for (const auto& shape : {std::pair<int, int>{33, 130}, {48, 64}, {5, 320}}) {
      NestedMatrix w{Scheme::kMwq, shape.first, shape.second, int(widths.size()), {}, {}};
      std::vector<std::vector<uint8_t>> rungs;
      for (size_t r = 0; r < widths.size(); ++r) {
        rungs.emplace_back(rung_bytes(Scheme::kMwq, w.rows, w.cols, {widths[r], r == 0, false}));
        std::vector<float> values(rungs[r].size() / 2);  // scales must be finite, and codes may be anything
        for (float& v : values) v = normal(rng);
        kernels().to_f16(values.data(), int(values.size()), reinterpret_cast<uint16_t*>(rungs[r].data()));
        w.widths[r] = widths[r];
        w.rungs[r] = rungs[r].data();
      }
      check_agreement(w, rng);
    }
  }
}

/// The same for corrections of every rank, of matrices whose V is their own.
void test_corrections_agree() {
  std::mt19937 rng(12);
  std::normal_distribution<float> normal;
  const auto put_scales = [&](uint8_t* to, size_t bytes) {
    std::vector<float> values(bytes / 2);
    for (float& v : values) v = normal(rng);
    kernels().to_f16(values.data(), int(values.size()), reinterpret_cast<uint16_t*>(to));
  };
  for (uint8_t rank = 8; rank <= kMaxRank; rank += kRankStep) {
    for (const auto& shape : {std::pair<int, int>{33, 130}, {48, 64}, {5, 37}}) {
      const std::vector<uint8_t> widths = {2, 1}, ranks = {uint8_t(40 - rank), rank};
      NestedMatrix w;
      std::tie(w.rows, w.cols) = shape;
      w.num_rungs = 2;
      w.basis_rank = uint8_t(highest_rank(ranks));
      std::vector<std::vector<uint8_t>> rungs;
      for (size_t r = 0; r < 2; ++r) {
        w.widths[r] = widths[r];
        w.ranks[r] = ranks[r];
        rungs.emplace_back(rung_bytes(w.scheme, w.rows, w.cols, form_of(w, int(r))));
        for (uint8_t& b : rungs[r]) b = uint8_t(rng());
        w.rungs[r] = rungs[r].data();
        w.num_rungs = int(r) + 1;
        const size_t at = size_t(correction_of(w) - w.rungs[r]);
        CHECK(at % 64 == 0 && rungs[r].size() % 64 == 0);
        put_scales(rungs[r].data() + at, 2 * kMaxRank);
      }
      put_scales(rungs[0].data(), row_scale_bytes(w.rows));
      std::vector<RungBytes> bytes;
      for (const auto& r : rungs) bytes.push_back({r.data(), r.size()});
      const auto made = nested_from_rungs(bytes, w.rows, w.cols, widths, {Scheme::kNested, {1}, ranks});
      CHECK(std::memcmp(own_basis_of(w), made->matrix.basis, w.basis_rank * basis_stride(w.cols)) == 0);
      w = made->matrix;
      check_agreement(w, rng);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) num_threads = std::atoi(argv[1]);
  const ExpertFile file;
  for (double experts : {1.0, 2.4, 5.0, 12.0}) test_random_requests_on(file, experts);
  test_failing_reads(file);
  test_destruction_during_reads(file);
  test_budget_of_nothing(file);
  test_statistics_from_another_thread(file);
  test_shapes_that_do_not_fit_are_refused(file);
  test_resident_matrices(file);
  test_objectives_that_are_none_are_refused();
  test_victims_are_those_of_a_search_among_all();
  test_uses_after_long_passes();
  test_checksums();
  test_thread_pool();
  for (const std::string& isa : instruction_sets()) {
    use_isa(isa.c_str());
    test_rows_do_not_depend_on_their_batch(file);
  }
  test_instruction_sets_agree(file);
  test_instruction_sets_agree_on_what_is_no_number();
  test_instruction_sets_choose_the_same_codes();
  test_mwq_agrees();
  test_corrections_agree();
  std::printf("core_test (%s; CRC-32C by %s): %s\n", usable_isas(), crc32c_has_instruction() ? "instruction" : "table",
              failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
