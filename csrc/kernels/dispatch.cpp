// Chooses the instruction set at run time. Compiled for the baseline CPU: the probe itself must not be an illegal
// instruction.
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "processor.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace edgemoe {
namespace {

struct Candidate {
  const Kernels* table;
  bool usable;
};

const Candidate* candidates(int* count) {
#if defined(__x86_64__)
  static const Processor has;
  static const Candidate all[] = {{&kAvx512, has.avx512}, {&kAvx2, has.avx2}, {&kScalar, true}};
#elif defined(__aarch64__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  static const Candidate all[] = {{&kNeon, (getauxval(AT_HWCAP) & kDotProduct) != 0}, {&kScalar, true}};
#else
  static const Candidate all[] = {{&kScalar, true}};
#endif
  *count = int(sizeof(all) / sizeof(all[0]));
  return all;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& kernels() {
  if (const Kernels* k = active.load(std::memory_order_acquire)) return *k;
  int count;
  const Candidate* all = candidates(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].usable) {
      const Kernels* none = nullptr;
      active.compare_exchange_strong(none, all[i].table);  // `use_isa` may have been first
      return *active.load(std::memory_order_acquire);
    }
  }
  return kScalar;
}

const char* usable_isas() {
  static const std::string names = [] {
    int count;
    const Candidate* all = candidates(&count);
    std::string s;
    for (int i = 0; i < count; ++i) {
      if (all[i].usable) s += (s.empty() ? "" : " ") + std::string(all[i].table->name);
    }
    return s;
  }();
  return names.c_str();
}

void use_isa(const char* name) {
  int count;
  const Candidate* all = candidates(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].usable && std::strcmp(all[i].table->name, name) == 0) {
      active.store(all[i].table, std::memory_order_release);
      return;
    }
  }
  throw std::invalid_argument(std::string("use_isa: expected one of ") + usable_isas() + ", got " + name);
}

}  // namespace edgemoe
