// Which instruction sets the processor has and the system lets programs use. This asks the processor itself: compilers'
// run-time libraries give different answers, and that of zig, which builds the wheels, reports nothing.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>

namespace edgemoe {

struct Processor {
  bool sse42 = false;
  bool avx2 = false;    ///< with FMA and F16C
  bool avx512 = false;  ///< F, BW, VL, DQ and VNNI

  Processor() {
    constexpr auto has = [](unsigned word, int bit) { return (word >> bit & 1) != 0; };
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    sse42 = has(c, 20);
    const bool fma = has(c, 12), avx = has(c, 28), f16c = has(c, 29);
    if (!has(c, 27)) return;  // the system saves no wide registers
    uint32_t saved, high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const bool saves_ymm = (saved & 0x06) == 0x06, saves_zmm = (saved & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = saves_ymm && avx && fma && f16c && has(b, 5);
    avx512 = avx2 && saves_zmm && has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31) && has(c, 11);
  }
};

}  // namespace edgemoe
#endif
