// The runtime's functions over simulated memory and queues.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "cudasim.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cudasim {
namespace {

std::recursive_mutex g_mutex;
Config g_config;
Stats g_stats;
std::string g_report;
uint64_t g_random = 1;
cudaError_t g_sticky = cudaSuccess;
thread_local cudaError_t t_last = cudaSuccess;

cudaError_t fail(cudaError_t error, const std::string& why) {
  g_report = why;
  return t_last = error;
}

// ---------------------------------------------------------------- memory

constexpr size_t kCanary = 256;
constexpr size_t kArena = size_t(4) << 30;  ///< bytes of address space

struct Range {
  size_t size;
  bool is_device;
};
std::map<char*, Range> g_ranges;

/// All device memory: one range of addresses, so that it can be closed and opened as a whole.
struct Arena {
  char* base = nullptr;
  std::map<size_t, size_t> holes;  ///< by offset
  int open = 0;

  Arena() {
    base = static_cast<char*>(mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED) std::abort();
    holes[0] = kArena;
  }
  void protect() const { mprotect(base, kArena, open ? PROT_READ | PROT_WRITE : PROT_NONE); }

  char* take(size_t bytes) {
    const size_t whole = (bytes + 2 * kCanary - 1) / kCanary * kCanary;
    for (auto it = holes.begin(); it != holes.end(); ++it) {
      const auto [at, size] = *it;
      if (size < whole) continue;
      holes.erase(it);
      if (size > whole) holes[at + whole] = size - whole;
      return base + at;
    }
    return nullptr;
  }
  void give_back(char* p, size_t bytes) {
    size_t at = size_t(p - base), whole = (bytes + 2 * kCanary - 1) / kCanary * kCanary;
    auto next = holes.lower_bound(at);
    if (next != holes.end() && next->first == at + whole) {
      whole += next->second;
      next = holes.erase(next);
    }
    if (next != holes.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == at) {
        before->second += whole;
        return;
      }
    }
    holes[at] = whole;
  }
};

Arena& arena() {
  static Arena a;
  return a;
}

const std::pair<char* const, Range>* find(const void* p) {
  auto it = g_ranges.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (it == g_ranges.begin()) return nullptr;
  --it;
  return static_cast<const char*>(p) < it->first + it->second.size ? &*it : nullptr;
}

bool is_inside(const void* p, size_t n) {
  const auto* range = find(p);
  return range && static_cast<const char*>(p) + n <= range->first + range->second.size;
}

void check_canary(const char* p, size_t size) {
  for (const char* c = p + size; c < p + (size + 2 * kCanary - 1) / kCanary * kCanary; ++c) {
    if (uint8_t(*c) == 0xff) continue;
    std::fprintf(stderr, "cudasim: %zu bytes of device memory were overrun by %td\n", size, c - p - ptrdiff_t(size));
    std::abort();
  }
}

// ---------------------------------------------------------------- streams

struct Operation {
  uint64_t number;
  std::function<bool()> is_ready;
  std::function<void()> run;
};
/// What was captured from a stream: operations with their arguments, which a launch queues again.
struct Graph {
  std::vector<Operation> operations;
};
struct Stream {
  std::deque<Operation> queue;
  Graph* capture = nullptr;
};
struct Event {
  uint64_t recorded = 0, reached = 0;
};
std::vector<Stream*> g_streams;
std::deque<Event> g_events;  ///< kept for ever: queued work may name them
uint64_t g_number = 0;

Stream* stream_of(cudaStream_t s) { return reinterpret_cast<Stream*>(s); }
Event* event_of(cudaEvent_t e) { return reinterpret_cast<Event*>(e); }

void push(cudaStream_t s, std::function<void()> run, std::function<bool()> is_ready = {}) {
  Stream* const to = stream_of(s);
  Operation op{++g_number, std::move(is_ready), std::move(run)};
  to->capture ? to->capture->operations.push_back(std::move(op)) : to->queue.push_back(std::move(op));
}

/// Whether a stream is being captured, while some calls are not allowed.
bool is_capturing() {
  return std::any_of(g_streams.begin(), g_streams.end(), [](const Stream* s) { return s->capture != nullptr; });
}

/// Runs the head of one of the streams that can go on.
bool step() {
  std::vector<Stream*> able;
  for (Stream* s : g_streams) {
    if (!s->queue.empty() && (!s->queue.front().is_ready || s->queue.front().is_ready())) able.push_back(s);
  }
  if (able.empty()) return false;
  if (able.size() > 1 && g_config.starved >= 0 && size_t(g_config.starved) < g_streams.size()) {
    able.erase(std::remove(able.begin(), able.end(), g_streams[size_t(g_config.starved)]), able.end());
  }
  Stream* next = able[0];
  if (g_config.seed) {
    next = able[draw() % able.size()];
  } else {
    for (Stream* s : able) {
      if (s->queue.front().number < next->queue.front().number) next = s;
    }
  }
  const Operation op = std::move(next->queue.front());
  next->queue.pop_front();
  op.run();
  return true;
}

template <class Done>
cudaError_t run_until(const Done& done) {
  DeviceWork work;
  while (!done()) {
    if (g_sticky) return g_sticky;
    if (!step()) return fail(g_sticky = cudaErrorLaunchTimeout, "the streams wait for each other");
  }
  return g_sticky;
}

cudaError_t run_all() {
  return run_until(
      [] { return std::all_of(g_streams.begin(), g_streams.end(), [](auto* s) { return s->queue.empty(); }); });
}

/// Returns what every call returns from now on. A device that comes back has forgotten its work.
cudaError_t lose(bool yes) {
  if (yes) {
    g_report = "the device is gone, as the test wants";
    return cudaErrorLaunchFailure;
  }
  for (Stream* s : g_streams) s->queue.clear();
  for (Event& e : g_events) e.reached = e.recorded;
  return cudaSuccess;
}

}  // namespace

Config& config() { return g_config; }
Stats& stats() { return g_stats; }
std::string& report() { return g_report; }

uint32_t draw() {
  g_random ^= g_random << 13;
  g_random ^= g_random >> 7;
  g_random ^= g_random << 17;
  return uint32_t(g_random >> 16);
}

DeviceWork::DeviceWork() {
  if (arena().open++) return;
  arena().protect();
#if defined(__SANITIZE_ADDRESS__)
  for (const auto& [p, range] : g_ranges) {
    if (range.is_device) __asan_unpoison_memory_region(p, range.size);
  }
#endif
}

DeviceWork::~DeviceWork() {
  if (--arena().open) return;
  arena().protect();
#if defined(__SANITIZE_ADDRESS__)
  for (const auto& [p, range] : g_ranges) {
    if (range.is_device) __asan_poison_memory_region(p, range.size);
  }
#endif
}

cudaError_t check_pointer(const void* p, const char* kernel, int arg) {
  if (!p || find(p)) return cudaSuccess;
  return fail(cudaErrorIllegalAddress, std::string(kernel) + ": argument " + std::to_string(arg) +
                                           " points neither to device memory nor to pinned memory");
}

cudaError_t enqueue_kernel(dim3 grid, dim3 block, cudaStream_t stream, const char* name, std::function<void()> body) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  if (g_sticky) return t_last = g_sticky;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.y > 65535 ||
      grid.z > 65535) {
    return fail(cudaErrorInvalidConfiguration, std::string(name) + ": no such grid or block");
  }
  push(stream, [=] {
    if (run_grid(grid, block, body)) return;
    g_report = std::string(name) + ": " + g_report;
    g_sticky = cudaErrorLaunchFailure;
  });
  return cudaSuccess;
}

}  // namespace cudasim

using namespace cudasim;

/// Sets one value and returns the one before, for tests that have only the plug-in: "seed", the stream that is
/// "starved" (-1 for none), "devices", the "driver" as CUDA numbers it, "integrated", the bytes that "others" hold,
/// whether the device is "lost", whether copies "may_copy", whether the host "may_lend" memory, and how many streams,
/// events and pinned buffers one "may_make". Read-only are "peak", in device bytes, "pinned", in KiB of host memory,
/// "streams", "pageable", the copies not from pinned memory, and "graphs", how often recorded work was repeated.
extern "C" int cudasim_configure(const char* name, int value) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  const std::string what = name;
  Config& c = config();
  if (what == "seed") {
    const int before = int(c.seed);
    c.seed = uint64_t(value);
    g_random = uint64_t(value) * 0x9E3779B97F4A7C15ull | 1;
    return before;
  }
  if (what == "starved") return std::exchange(c.starved, value);
  if (what == "devices") return std::exchange(c.num_devices, value);
  if (what == "driver") return std::exchange(c.driver, value);
  if (what == "integrated") return std::exchange(c.integrated, value);
  if (what == "others") return int(std::exchange(c.others_bytes, size_t(value)));
  if (what == "lost") return std::exchange(g_sticky, lose(value != 0)) != cudaSuccess;
  if (what == "may_lend") return std::exchange(c.may_lend, value != 0);
  if (what == "may_copy") return std::exchange(c.may_copy, value != 0);
  if (what == "may_make") return std::exchange(c.may_make, value);
  if (what == "pinned") return int(stats().pinned_bytes >> 10);
  if (what == "streams") return int(g_streams.size());
  if (what == "peak") return int(stats().peak_device_bytes);
  if (what == "pageable") return int(stats().pageable_copies);
  if (what == "graphs") return int(stats().graphs);
  std::fprintf(stderr, "cudasim_configure: there is no %s\n", name);
  std::abort();
}

#define CUDASIM_ENTER                                        \
  const std::lock_guard<std::recursive_mutex> lock(g_mutex); \
  if (g_sticky) return t_last = g_sticky
#define CUDASIM_NOT_CAPTURED \
  if (is_capturing()) return fail(cudaErrorStreamCaptureUnsupported, std::string(__func__) + " while work is noted")

#define CUDASIM_MADE                                                                                  \
  if (g_config.may_make == 0) return fail(cudaErrorInvalidValue, "no more of it, as the test wants"); \
  if (g_config.may_make > 0) g_config.may_make -= 1

extern "C" {

cudaError_t cudaDriverGetVersion(int* version) {
  *version = g_config.driver;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = g_config.num_devices;
  if (g_config.driver < 13000) return fail(cudaErrorInsufficientDriver, "the driver is older than the runtime");
  return *count ? cudaSuccess : fail(cudaErrorNoDevice, "no device");
}
cudaError_t cudaSetDevice(int device) {
  return device >= 0 && device < g_config.num_devices ? cudaSuccess : fail(cudaErrorInvalidDevice, "no such device");
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int) {
  *to = {};
  std::snprintf(to->name, sizeof to->name, "simulated device");
  to->major = 8;
  to->minor = 7;
  to->multiProcessorCount = 8;
  to->integrated = g_config.integrated;
  to->totalGlobalMem = g_config.total_bytes;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = g_config.total_bytes;
  *free = *total - g_stats.device_bytes - g_config.others_bytes;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** to, size_t bytes) {
  CUDASIM_ENTER;
  CUDASIM_NOT_CAPTURED;
  char* p = g_stats.device_bytes + g_config.others_bytes + bytes > g_config.total_bytes ? nullptr : arena().take(bytes);
  if (!p) return fail(cudaErrorMemoryAllocation, "device memory is full");
  g_ranges[p] = {bytes, true};
  g_stats.device_bytes += bytes;
  g_stats.peak_device_bytes = std::max(g_stats.peak_device_bytes, g_stats.device_bytes);
  {
    DeviceWork work;
    std::memset(p, 0xff, (bytes + 2 * kCanary - 1) / kCanary * kCanary);
  }
  *to = p;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  CUDASIM_NOT_CAPTURED;
  if (!p) return cudaSuccess;
  const auto it = g_ranges.find(static_cast<char*>(p));
  if (it == g_ranges.end() || !it->second.is_device)
    return fail(cudaErrorInvalidValue, "cudaFree of a foreign pointer");
  run_all();
  const size_t size = it->second.size;
  {
    DeviceWork work;
    check_canary(it->first, size);
  }
  g_stats.device_bytes -= size;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, size);
#endif
  arena().give_back(it->first, size);
  g_ranges.erase(it);
  return g_sticky;
}
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
  CUDASIM_ENTER;
  CUDASIM_MADE;
  char* p = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
  if (!p) return fail(cudaErrorMemoryAllocation, "no memory");
  std::memset(p, 0xff, bytes);
  g_ranges[p] = {bytes, false};
  g_stats.pinned_bytes += bytes;
  *to = p;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  if (!p) return cudaSuccess;
  const auto it = g_ranges.find(static_cast<char*>(p));
  if (it == g_ranges.end() || it->second.is_device) return fail(cudaErrorInvalidValue, "cudaFreeHost: foreign pointer");
  run_all();
  g_stats.pinned_bytes -= it->second.size;
  g_ranges.erase(it);
  std::free(p);
  return g_sticky;
}

cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  CUDASIM_ENTER;
  if (!g_config.may_lend) return fail(cudaErrorInvalidValue, "no memory can be pinned, as the test wants");
  if (find(p)) return fail(cudaErrorInvalidValue, "cudaHostRegister: it is pinned already");
  g_ranges[static_cast<char*>(p)] = {bytes, false};
  g_stats.pinned_bytes += bytes;
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** to, void* p, unsigned) {
  CUDASIM_ENTER;
  if (!find(p)) return fail(cudaErrorInvalidValue, "cudaHostGetDevicePointer: not pinned");
  *to = p;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  const auto it = g_ranges.find(static_cast<char*>(p));
  if (it == g_ranges.end()) return fail(cudaErrorInvalidValue, "cudaHostUnregister: not pinned");
  run_all();
  g_stats.pinned_bytes -= it->second.size;
  g_ranges.erase(it);
  return g_sticky;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  CUDASIM_ENTER;
  CUDASIM_NOT_CAPTURED;  // a captured copy would keep its addresses
  const bool in = kind == cudaMemcpyHostToDevice;
  const void *device = in ? to : from, *host = in ? from : to;
  if (!g_config.may_copy) return fail(cudaErrorInvalidValue, "copies fail, as the test wants");
  if (kind == cudaMemcpyDeviceToDevice) {
    const auto is_there = [&](const void* p) { return is_inside(p, bytes) && find(p)->second.is_device; };
    if (!is_there(to) || !is_there(from)) return fail(cudaErrorInvalidValue, "a copy leaves its device memory");
    push(stream, [=] { std::memmove(to, from, bytes); });
    return cudaSuccess;
  }
  if (!is_inside(device, bytes) || !find(device)->second.is_device) {
    return fail(cudaErrorInvalidValue, "a copy leaves its device memory, or its direction is wrong");
  }
  const bool is_pageable = !find(host);
  if (!is_pageable && (find(host)->second.is_device || !is_inside(host, bytes))) {
    return fail(cudaErrorInvalidValue, "a copy leaves its pinned memory, or its direction is wrong");
  }
  ++g_stats.copies;
  g_stats.copied_bytes += bytes;
  g_stats.pageable_copies += is_pageable;
  push(stream, [=] { std::memmove(to, from, bytes); });
  return is_pageable ? cudaStreamSynchronize(stream) : cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  CUDASIM_ENTER;
  if (!is_inside(to, bytes)) return fail(cudaErrorInvalidValue, "memset leaves its memory");
  push(stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* to, unsigned) {
  CUDASIM_ENTER;
  CUDASIM_MADE;
  g_streams.push_back(new Stream);
  *to = reinterpret_cast<cudaStream_t>(g_streams.back());
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  run_until([=] { return stream_of(stream)->queue.empty(); });
  g_streams.erase(std::find(g_streams.begin(), g_streams.end(), stream_of(stream)));
  delete stream_of(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  CUDASIM_ENTER;
  CUDASIM_NOT_CAPTURED;
  return t_last = run_until([=] { return stream_of(stream)->queue.empty(); });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  CUDASIM_ENTER;
  CUDASIM_NOT_CAPTURED;
  Event* e = event_of(event);
  const uint64_t count = e->recorded;
  push(stream, [] {}, [=] { return e->reached >= count; });
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* to, unsigned) {
  CUDASIM_ENTER;
  CUDASIM_MADE;
  *to = reinterpret_cast<cudaEvent_t>(&g_events.emplace_back());
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  CUDASIM_ENTER;
  CUDASIM_NOT_CAPTURED;
  Event* e = event_of(event);
  const uint64_t count = ++e->recorded;
  push(stream, [=] { e->reached = std::max(e->reached, count); });
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  CUDASIM_ENTER;
  CUDASIM_NOT_CAPTURED;
  stream_of(stream)->capture = new Graph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* to) {
  const std::lock_guard<std::recursive_mutex> lock(g_mutex);
  Stream* const s = stream_of(stream);
  if (!s->capture) return fail(cudaErrorIllegalState, "nothing is noted");
  *to = reinterpret_cast<cudaGraph_t>(std::exchange(s->capture, nullptr));
  return g_sticky;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* to, cudaGraph_t graph, unsigned long long) {
  CUDASIM_ENTER;
  *to = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  CUDASIM_ENTER;
  CUDASIM_NOT_CAPTURED;
  for (const Operation& op : reinterpret_cast<const Graph*>(graph)->operations) push(stream, op.run, op.is_ready);
  ++g_stats.graphs;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  CUDASIM_ENTER;
  CUDASIM_NOT_CAPTURED;
  const Stream* s = stream_of(stream);
  if (!s->queue.empty()) {
    DeviceWork work;
    step();
  }
  return s->queue.empty() ? g_sticky : cudaErrorNotReady;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  CUDASIM_ENTER;
  const Event* e = event_of(event);
  if (e->reached < e->recorded && (!g_config.seed || draw() % 2)) {
    DeviceWork work;
    step();
  }
  return e->reached >= e->recorded ? g_sticky : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  CUDASIM_ENTER;
  const Event* e = event_of(event);
  const uint64_t count = e->recorded;
  return t_last = run_until([=] { return e->reached >= count; });
}
cudaError_t cudaDeviceSynchronize() {
  CUDASIM_ENTER;
  return t_last = run_all();
}
cudaError_t cudaGetLastError() { return std::exchange(t_last, g_sticky); }
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = "simulated error " + std::to_string(int(error)) + ", " + g_report;
  return text.c_str();
}

}  // extern "C"
