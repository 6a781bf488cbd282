#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace edgemoe {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

const Tables& tables() {
  static const Tables t = [] {
    Tables all{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0x82f63b78 ^ (c >> 1) : c >> 1;
      all[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; ++i) {
      for (int k = 1; k < 8; ++k) all[k][i] = all[0][all[k - 1][i] & 255] ^ (all[k - 1][i] >> 8);
    }
    return all;
  }();
  return t;
}

/// Eight bytes a step by table (Kounavis and Berry's slicing).
uint32_t update_by_table(const uint8_t* p, size_t n, uint32_t crc) {
  const Tables& t = tables();
  for (; n >= 8; n -= 8, p += 8) {
    uint32_t low, high;
    std::memcpy(&low, p, 4);
    std::memcpy(&high, p + 4, 4);
    low ^= crc;
    crc = t[7][low & 255] ^ t[6][low >> 8 & 255] ^ t[5][low >> 16 & 255] ^ t[4][low >> 24] ^ t[3][high & 255] ^
          t[2][high >> 8 & 255] ^ t[1][high >> 16 & 255] ^ t[0][high >> 24];
  }
  for (; n; --n, ++p) crc = t[0][(crc ^ *p) & 255] ^ (crc >> 8);
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t update_by_instruction(const uint8_t* p, size_t n, uint32_t crc) {
  uint64_t c = crc;
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    c = _mm_crc32_u64(c, word);
  }
  for (; n; --n, ++p) c = _mm_crc32_u8(uint32_t(c), *p);
  return uint32_t(c);
}
#elif defined(__ARM_FEATURE_CRC32)
uint32_t update_by_instruction(const uint8_t* p, size_t n, uint32_t crc) {
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    crc = __crc32cd(crc, word);
  }
  for (; n; --n, ++p) crc = __crc32cb(crc, *p);
  return crc;
}
#endif

}  // namespace

uint32_t crc32c(const uint8_t* bytes, size_t length, uint32_t crc) {
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2");
  if (has_instruction) return ~update_by_instruction(bytes, length, ~crc);
#elif defined(__ARM_FEATURE_CRC32)
  return ~update_by_instruction(bytes, length, ~crc);
#endif
  return ~update_by_table(bytes, length, ~crc);
}

}  // namespace edgemoe
