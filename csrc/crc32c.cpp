#include "crc32c.h"

#include <array>
#include <cstring>

#include "processor.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
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

/// Eight bytes per step by table: slicing-by-8 (Kounavis and Berry).
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

/// For each byte of a CRC, what it becomes after kCrcPart zero bytes. A CRC is linear, so that these tables move the
/// CRC of one part past the next.
const uint32_t* zeros() {
  static const auto t = [] {
    std::array<uint32_t, 4 * 256> shift{};
    const std::array<uint8_t, kCrcPart> nothing{};
    for (size_t k = 0; k < 4; ++k) {
      for (size_t bit = 0; bit < 8; ++bit) {
        const uint32_t one = update_by_table(nothing.data(), kCrcPart, uint32_t(1) << (8 * k + bit));
        for (size_t i = 0; i < 256; ++i) shift[256 * k + i] ^= i >> bit & 1 ? one : 0;
      }
    }
    return shift;
  }();
  return t.data();
}

/// Compiled for the baseline CPU, as kernels/dispatch.cpp is.
bool has_instruction() {
#if defined(__x86_64__)
  return Processor().sse42;
#elif defined(__aarch64__)
  constexpr unsigned long kCrc32 = 1ul << 7;  // HWCAP_CRC32
  return (getauxval(AT_HWCAP) & kCrc32) != 0;
#else
  return false;
#endif
}

}  // namespace

uint32_t crc32c_by_table(const uint8_t* bytes, size_t length, uint32_t crc) {
  return ~update_by_table(bytes, length, ~crc);
}

uint32_t crc32c(const uint8_t* bytes, size_t length, uint32_t crc) {
#if defined(__x86_64__) || defined(__aarch64__)
  static const bool by_instruction = has_instruction();
  if (by_instruction) return ~update_by_instruction(bytes, length, ~crc, zeros());
#endif
  return crc32c_by_table(bytes, length, crc);
}

bool crc32c_has_instruction() { return has_instruction(); }

}  // namespace edgemoe
