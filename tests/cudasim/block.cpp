// Runs the blocks of a kernel one after the other, their threads as fibers.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "cudasim.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers and continues on another stack.
extern "C" void cudasim_switch(void** save_stack, void* stack);
#if defined(__x86_64__)
asm(R"(
.text
.globl cudasim_switch
cudasim_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl cudasim_switch
cudasim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "cudasim: no fiber switch for this processor"
#endif

namespace cudasim {

Place* g_here;

namespace {

constexpr size_t kStack = 128 * 1024;

/// Prepares a stack that has not run yet, as `cudasim_switch` expects it. Returns its stack pointer.
void* prime(char* top, void (*entry)()) {
  char* aligned = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
#if defined(__x86_64__)
  void** p = reinterpret_cast<void**>(aligned);
  *--p = nullptr;
  *--p = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  return p;
#else
  aligned -= 160;
  std::memset(aligned, 0, 160);
  *reinterpret_cast<void**>(aligned + 88) = reinterpret_cast<void*>(entry);
  return aligned;
#endif
}

enum class Wait : uint8_t { kNone, kBarrier, kWarp, kEnd };

/// A meeting of lanes of a warp; there is one for each mask.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  uint64_t turn = 0;
  uint64_t values[2][32];
  const char* what = "";
};

struct Thread {
  Place place;
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;  ///< AddressSanitizer's
  Wait wait = Wait::kEnd;
  Meeting* meeting = nullptr;
  uint64_t turn = 0;
  const char* what = "";  ///< where it waits: a function, or a file
  int line = 0;
};

struct Block {
  std::vector<Thread> threads;
  int alive = 0, at_barrier = 0;
  std::vector<std::deque<Meeting>> warps;
  std::map<std::string, std::vector<char>> shared;
  const std::function<void()>* body = nullptr;
  bool is_broken = false;
};

Block g_block;
Thread* g_thread;
void* g_main_sp;
#if defined(__SANITIZE_ADDRESS__)
const void* g_main_bottom;
size_t g_main_size;
void* g_main_fake;
#endif

void to_main() {
  Thread* const me = g_thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(me->wait == Wait::kEnd ? nullptr : &me->fake_stack, g_main_bottom, g_main_size);
#endif
  cudasim_switch(&me->sp, g_main_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr);
#endif
}

void to_thread(Thread& t) {
  g_thread = &t;
  g_here = &t.place;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&g_main_fake, t.stack, kStack);
#endif
  cudasim_switch(&g_main_sp, t.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(g_main_fake, nullptr, nullptr);
#endif
}

void thread_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &g_main_bottom, &g_main_size);
#endif
  (*g_block.body)();
  g_thread->wait = Wait::kEnd;
  --g_block.alive;
  to_main();
  std::abort();  // nobody comes back here
}

[[noreturn]] void break_rule(const std::string& what) {
  const uint3 b = g_here->block;
  report() = what + " (block " + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) +
             ", thread " + std::to_string(g_here->linear) + ")";
  g_block.is_broken = true;
  to_main();
  std::abort();
}

void start(int n, dim3 grid, dim3 size, uint3 at, const std::function<void()>& body) {
  Block& b = g_block;
  if (int(b.threads.size()) < n) b.threads.resize(size_t(n));
  b.alive = n;
  b.at_barrier = 0;
  b.is_broken = false;
  b.body = &body;
  b.warps.assign(size_t(n + 31) / 32, {});
  b.shared.clear();
  for (int i = 0; i < n; ++i) {
    Thread& t = b.threads[size_t(i)];
    t.wait = Wait::kNone;
    t.fake_stack = nullptr;
    if (!t.stack) {
      t.stack = static_cast<char*>(
          mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (t.stack == MAP_FAILED) std::abort();
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(t.stack, kStack);
#endif
    t.sp = prime(t.stack + kStack, thread_entry);
    const unsigned u = unsigned(i);
    t.place = {{u % size.x, u / size.x % size.y, u / (size.x * size.y)}, at, size, grid, i};
  }
}

/// Lets threads go on once all that have not ended are at a barrier. Returns false unless it is the same one.
bool pass_barrier(int n) {
  const Thread* first = nullptr;
  for (int i = 0; i < n; ++i) {
    Thread& t = g_block.threads[size_t(i)];
    if (t.wait != Wait::kBarrier) continue;
    if (first && (first->line != t.line || std::strcmp(first->what, t.what) != 0)) {
      report() = std::string("threads of a block wait in __syncthreads at ") + first->what + ":" +
                 std::to_string(first->line) + " and at " + t.what + ":" + std::to_string(t.line);
      return false;
    }
    first = &t;
    t.wait = Wait::kNone;
  }
  g_block.at_barrier = 0;
  return true;
}

void report_deadlock(int n) {
  report() = "deadlock:";
  int shown = 0;
  for (int i = 0; i < n && shown < 4; ++i) {
    const Thread& t = g_block.threads[size_t(i)];
    if (t.wait == Wait::kEnd) continue;
    report() += " thread " + std::to_string(i) + " waits in " +
                (t.wait == Wait::kBarrier ? "__syncthreads, line " + std::to_string(t.line) : std::string(t.what)) +
                ";";
    ++shown;
  }
}

bool run_block(int n) {
  std::vector<int> order(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) order[size_t(i)] = i;
  Block& b = g_block;
  while (b.alive) {
    for (int i = n - 1; config().seed && i > 0; --i) std::swap(order[size_t(i)], order[draw() % unsigned(i + 1)]);
    bool moved = false;
    for (int i : order) {
      Thread& t = b.threads[size_t(i)];
      if (t.wait == Wait::kWarp && t.meeting->turn > t.turn) t.wait = Wait::kNone;
      if (t.wait != Wait::kNone) continue;
      moved = true;
      to_thread(t);
      if (b.is_broken) return false;
    }
    if (b.alive && b.at_barrier == b.alive) {
      if (!pass_barrier(n)) return false;
      moved = true;
    }
    if (!moved) {
      report_deadlock(n);
      return false;
    }
  }
  return true;
}

}  // namespace

void sync_threads(const char* file, int line) {
  g_thread->wait = Wait::kBarrier;
  g_thread->what = file;
  g_thread->line = line;
  ++g_block.at_barrier;
  to_main();
}

const uint64_t* exchange(unsigned mask, uint64_t value, const char* what) {
  const int lane = g_here->linear & 31;
  if (!(mask >> lane & 1)) break_rule(std::string(what) + ": the lane is not in its own mask");
  std::deque<Meeting>& warp = g_block.warps[size_t(g_here->linear / 32)];
  Meeting* m = nullptr;
  for (Meeting& each : warp) {
    if (each.mask == mask) m = &each;
  }
  if (!m) {
    m = &warp.emplace_back();
    m->mask = mask;
  }
  if (m->arrived && std::strcmp(m->what, what) != 0) break_rule(std::string(what) + " meets " + m->what);
  const uint64_t turn = m->turn;
  m->what = what;
  m->values[turn & 1][lane] = value;
  m->arrived |= 1u << lane;
  if (m->arrived == mask) {
    m->arrived = 0;
    ++m->turn;
  }
  g_thread->wait = Wait::kWarp;
  g_thread->meeting = m;
  g_thread->turn = turn;
  g_thread->what = what;
  to_main();
  return m->values[turn & 1];
}

void* shared_memory(const char* key, size_t bytes) {
  std::vector<char>& memory = g_block.shared[key];
  if (memory.empty()) memory.assign(bytes, char(0xff));
  return memory.data();
}

bool run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  const uint64_t count = uint64_t(grid.x) * grid.y * grid.z, first = config().seed ? draw() % count : 0;
  const int n = int(block.x * block.y * block.z);
  ++stats().kernels;
  stats().blocks += count;
  stats().threads += count * unsigned(n);
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t at = (i + first) % count;
    start(n, grid, block, {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)},
          body);
    if (!run_block(n)) return false;
  }
  return true;
}

}  // namespace cudasim
