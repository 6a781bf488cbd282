// CRC-32C by the CPU's instruction. Compiled with its own flags, like the kernels, and chosen at run time; so it
// includes nothing of the standard library.
#include "crc32c.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#else
#include <arm_acle.h>
#endif

namespace edgemoe {
namespace {

#if defined(__x86_64__)
inline uint32_t update_word(uint32_t crc, uint64_t word) { return uint32_t(_mm_crc32_u64(crc, word)); }
inline uint32_t update_byte(uint32_t crc, uint8_t byte) { return _mm_crc32_u8(crc, byte); }
#else
inline uint32_t update_word(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
inline uint32_t update_byte(uint32_t crc, uint8_t byte) { return __crc32cb(crc, byte); }
#endif

inline uint64_t word_at(const uint8_t* p) {
  uint64_t word;
  __builtin_memcpy(&word, p, 8);
  return word;
}

/// Moves a CRC past one part, as if kCrcPart zero bytes followed.
inline uint32_t shifted(uint32_t crc, const uint32_t* zeros) {
  return zeros[crc & 255] ^ zeros[256 + (crc >> 8 & 255)] ^ zeros[512 + (crc >> 16 & 255)] ^ zeros[768 + (crc >> 24)];
}

}  // namespace

// Three parts at a time: the instruction has a latency of three cycles, and one can begin in each cycle.
uint32_t update_by_instruction(const uint8_t* p, size_t n, uint32_t crc, const uint32_t* zeros) {
  for (; n >= 3 * kCrcPart; n -= 3 * kCrcPart, p += 3 * kCrcPart) {
    uint32_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kCrcPart; i += 8) {
      a = update_word(a, word_at(p + i));
      b = update_word(b, word_at(p + kCrcPart + i));
      c = update_word(c, word_at(p + 2 * kCrcPart + i));
    }
    crc = shifted(shifted(a, zeros) ^ b, zeros) ^ c;
  }
  for (; n >= 8; n -= 8, p += 8) crc = update_word(crc, word_at(p));
  for (; n; --n, ++p) crc = update_byte(crc, *p);
  return crc;
}

}  // namespace edgemoe
