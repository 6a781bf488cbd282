// Stands in for CUDA's header of this name: conversions only, rounding to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }

inline float __half2float(__half h) {
  const uint32_t exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    const uint32_t bits = 0x7f800000u | mantissa << 13;
    std::memcpy(&magnitude, &bits, 4);
  } else {
    magnitude = std::ldexp(float(exponent ? mantissa | 1024 : mantissa), int(exponent ? exponent : 1) - 25);
  }
  return h.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (a != a) return {uint16_t(sign | 0x7e00)};
  if (a >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = a < 0x1p-14f ? -14 : std::ilogb(a);
  const int steps = int(std::nearbyint(std::ldexp(a, 10 - exponent)));  // of the binade's last place; 2048 carries
  return {uint16_t(sign | ((exponent + 14) * 1024 + steps))};
}
