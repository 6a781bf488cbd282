// The baseline: plain loops over 16 lanes. Correct everywhere, and what the other files must match bit for bit.
#include <cmath>
#include <cstring>

#include "kernels-inl.h"

namespace edgemoe {
namespace {

struct Scalar {
  struct F {
    float v[16];
  };
  struct I {
    int32_t v[16];
  };
  struct B {
    uint8_t v[64];
  };
  static constexpr int kTokensAtOnce = 1;
  static constexpr int kFloatTokens = 1;
  static constexpr int kKeyVectors = 1;
  static constexpr int kHeadVectors = 1;

  template <class Op>
  static F map(Op op) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = op(i);
    return r;
  }
  template <class Op>
  static B map_bytes(Op op) {
    B r;
    for (int i = 0; i < 64; ++i) r.v[i] = uint8_t(op(i));
    return r;
  }

  static B zero_bytes() { return B{}; }
  static B set_bytes(int x) {
    return map_bytes([=](int) { return x; });
  }
  static B load_bytes(const uint8_t* p) {
    B r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static void store_bytes(uint8_t* p, const B& b) { std::memcpy(p, b.v, 64); }
  static B and_bytes(const B& a, const B& b) {
    return map_bytes([&](int i) { return a.v[i] & b.v[i]; });
  }
  static B or_bytes(const B& a, const B& b) {
    return map_bytes([&](int i) { return a.v[i] | b.v[i]; });
  }
  /// a where a bit of the mask is set, b elsewhere.
  static B select(const B& mask, const B& a, const B& b) {
    return map_bytes([&](int i) { return (mask.v[i] & a.v[i]) | (~mask.v[i] & b.v[i]); });
  }
  /// table[i] for each byte i of `index`, which is below 16.
  static B lookup(const uint8_t* table, const B& index) {
    return map_bytes([&](int i) { return table[index.v[i]]; });
  }
  static B shift_right_by(const B& a, int n) {
    return map_bytes([&](int i) { return a.v[i] >> n; });
  }
  static B shift_left_by(const B& a, int n) {
    return map_bytes([&](int i) { return a.v[i] << n; });
  }
  template <int N>
  static B shift_right(const B& a) {
    return shift_right_by(a, N);
  }
  template <int N>
  static B shift_left(const B& a) {
    return shift_left_by(a, N);
  }

  static I zero_ints() { return I{}; }
  static I set_ints(int32_t x) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = x;
    return r;
  }
  static I add_ints(const I& a, const I& b) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] + b.v[i];
    return r;
  }
  static int32_t reduce_ints(const I& a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += a.v[i];
    return sum;
  }
  template <bool kWide>
  static I dot(I acc, const B& codes, const int8_t* x) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 4; ++j) acc.v[i] += int32_t(codes.v[4 * i + j]) * x[j];
    }
    return acc;
  }
  static F load_i8(const int8_t* p) {
    return map([=](int i) { return float(p[i]); });
  }
  /// Byte J of each lane's four, minus 128.
  template <int J>
  static F byte_of(const B& codes) {
    return map([&](int i) { return float(int32_t(codes.v[4 * i + J]) - 128); });
  }
  static void store_i8(int8_t* p, const I& a) {
    for (int i = 0; i < 16; ++i) p[i] = int8_t(a.v[i]);
  }

  static F zero() { return F{}; }
  static F set(float x) {
    return map([=](int) { return x; });
  }
  static F load(const float* p) {
    F r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static void store(float* p, const F& a) { std::memcpy(p, a.v, 64); }
  static F add(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F fma(const F& a, const F& b, const F& c) {
    return map([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  /// Where either is NaN, this and `min` return b.
  static F max(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F min(const F& a, const F& b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F abs(const F& a) {
    return map([&](int i) { return std::fabs(a.v[i]); });
  }
  static F round(const F& a) {
    return map([&](int i) { return std::nearbyint(a.v[i]); });
  }
  static I round_to_int(const F& a) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = int32_t(std::nearbyint(a.v[i]));
    return r;
  }
  static F to_float(const I& a) {
    return map([&](int i) { return float(a.v[i]); });
  }
  static F power_of_two(const F& n) {
    return map([&](int i) {
      const float whole = n.v[i] == n.v[i] ? n.v[i] : 0.0f;  // no integer is NaN
      const uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    });
  }
  static float sqrt(float x) { return std::sqrt(x); }
  static float reduce_add(const F& a) {
    float t[16];
    std::memcpy(t, a.v, 64);
    for (int width = 8; width >= 1; width /= 2) {
      for (int i = 0; i < width; ++i) t[i] = t[i] + t[i + width];
    }
    return t[0];
  }
  /// One step of `reduce_add` for two vectors at once: lane i is the sum of lanes i and i ^ D, of a where i has no bit
  /// D, else of b.
  template <int D>
  static F fold(const F& a, const F& b) {
    return map([&](int i) { return i & D ? b.v[i] + b.v[i ^ D] : a.v[i] + a.v[i ^ D]; });
  }
  /// By the tree of `reduce_add`, as the order matters where a lane is NaN.
  static float reduce_max(const F& a) {
    float t[16];
    std::memcpy(t, a.v, 64);
    for (int width = 8; width >= 1; width /= 2) {
      for (int i = 0; i < width; ++i) t[i] = t[i] > t[i + width] ? t[i] : t[i + width];
    }
    return t[0];
  }

  static float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    float f;
    uint32_t bits;
    if (exponent == 0) {
      f = std::ldexp(float(mantissa), -24);
      return sign ? -f : f;
    }
    bits = exponent == 31 ? sign | 0x7f800000 | mantissa << 13 : sign | (exponent + 112) << 23 | mantissa << 13;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static uint16_t float_to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    const float a = std::fabs(f);
    if (!(a < 65520.0f)) return uint16_t(sign | (a == a ? 0x7c00 : 0x7e00));
    if (a < 6.103515625e-05f) return uint16_t(sign | uint32_t(std::nearbyint(std::ldexp(a, 24))));
    bits &= 0x7fffffff;
    bits += 0xfff + (bits >> 13 & 1);  // to nearest, ties to even
    return uint16_t(sign | ((bits >> 13) - (112 << 10)));
  }
  /// For 16 bytes, the relative scales in their lower halves, and first + step * their upper halves (exact).
  static void load_scales(const uint8_t* p, float step, float first, F* scale, F* middle) {
    for (int i = 0; i < 16; ++i) {
      scale->v[i] = float((4 + p[i] % 4) << (p[i] % 16 / 4));
      middle->v[i] = first + step * float(p[i] >> 4);
    }
  }
  static F load_f16(const uint16_t* p) {
    return map([=](int i) { return half_to_float(p[i]); });
  }
  static void store_f16(uint16_t* p, const F& a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]);
  }
};

}  // namespace

const Kernels kScalar = make_kernels<Scalar>("scalar");

}  // namespace edgemoe
