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

#if defined(__x86_64__) || defined(__ARM_FEATURE_CRC32)
#if defined(__x86_64__)
#define EDGEMOE_CRC_TARGET __attribute__((target("sse4.2")))
EDGEMOE_CRC_TARGET inline uint32_t update_word(uint32_t crc, uint64_t word) {
  return uint32_t(_mm_crc32_u64(crc, word));
}
EDGEMOE_CRC_TARGET inline uint32_t update_byte(uint32_t crc, uint8_t byte) { return _mm_crc32_u8(crc, byte); }
#else
#define EDGEMOE_CRC_TARGET
inline uint32_t update_word(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
inline uint32_t update_byte(uint32_t crc, uint8_t byte) { return __crc32cb(crc, byte); }
#endif

constexpr size_t kStride = 4096;

/// What kStride zero bytes make of a sum, by its bytes: the sum is linear, so that this shifts one over the next part.
const std::array<std::array<uint32_t, 256>, 4>& zeros() {
  static const auto t = [] {
    std::array<std::array<uint32_t, 256>, 4> shift{};
    const std::array<uint8_t, kStride> nothing{};
    for (int k = 0; k < 4; ++k) {
      for (int bit = 0; bit < 8; ++bit) {
        const uint32_t one = update_by_table(nothing.data(), kStride, uint32_t(1) << (8 * k + bit));
        for (int i = 0; i < 256; ++i) shift[k][i] ^= i >> bit & 1 ? one : 0;
      }
    }
    return shift;
  }();
  return t;
}

uint32_t shifted(uint32_t crc) {
  const auto& t = zeros();
  return t[0][crc & 255] ^ t[1][crc >> 8 & 255] ^ t[2][crc >> 16 & 255] ^ t[3][crc >> 24];
}

/// Three parts at a time: the instruction takes three cycles and one can begin in each.
EDGEMOE_CRC_TARGET uint32_t update_by_instruction(const uint8_t* p, size_t n, uint32_t crc) {
  for (; n >= 3 * kStride; n -= 3 * kStride, p += 3 * kStride) {
    uint32_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kStride; i += 8) {
      uint64_t words[3];
      for (int k = 0; k < 3; ++k) std::memcpy(&words[k], p + k * kStride + i, 8);
      a = update_word(a, words[0]);
      b = update_word(b, words[1]);
      c = update_word(c, words[2]);
    }
    crc = shifted(shifted(a) ^ b) ^ c;
  }
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    crc = update_word(crc, word);
  }
  for (; n; --n, ++p) crc = update_byte(crc, *p);
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
