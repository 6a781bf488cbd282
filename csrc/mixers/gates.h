// Exponentials and logarithms of gates, in double precision from plain additions and multiplications: the same bits
// on every machine, which a C library does not promise. Accurate to a few units of the last place.
#pragma once

#include <cstdint>
#include <cstring>

namespace edgemoe {

inline double exact_exp(double x) {
  if (!(x > -700)) return x != x ? x : 0;
  if (x > 700) x = 700;
  const double n = double(int64_t(x * 1.4426950408889634 + (x < 0 ? -0.5 : 0.5)));
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0;
  for (int i = 13; i >= 1; --i) p = 1.0 + p * r / i;
  const uint64_t bits = uint64_t(int64_t(n) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

/// log of a positive, normal x.
inline double exact_log(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  int e = int(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffull) | uint64_t(1023) << 52;
  double m;
  std::memcpy(&m, &bits, sizeof m);
  if (m > 1.4142135623730951) {
    m /= 2;
    ++e;
  }
  const double s = (m - 1) / (m + 1), z = s * s;
  double p = 0;
  for (int i = 21; i >= 1; i -= 2) p = p * z + 1.0 / i;
  return e * 0.6931471805599453 + 2 * s * p;
}

/// log(1 + e^x)
inline double exact_softplus(double x) {
  if (!(x < 40)) return x;
  if (x < -40) return exact_exp(x);
  return exact_log(1 + exact_exp(x));
}

inline double exact_sigmoid(double x) { return 1 / (1 + exact_exp(-x)); }

}  // namespace edgemoe
