// NEON with the 8-bit dot product (Armv8.2): four vectors of four rows each.
#include <arm_neon.h>

#include "kernels-inl.h"

namespace edgemoe {
namespace {

struct Neon {
  struct F {
    float32x4_t v[4];
  };
  struct I {
    int32x4_t v[4];
  };
  struct B {
    uint8x16_t v[4];
  };
  static constexpr int kTokensAtOnce = 4;
  static constexpr int kFloatTokens = 1;
  static constexpr int kKeyVectors = 1;
  static constexpr int kHeadVectors = 1;

  template <class Op>
  static inline F map(Op op) {
    return F{{op(0), op(1), op(2), op(3)}};
  }
  template <class Op>
  static inline B map_bytes(Op op) {
    return B{{op(0), op(1), op(2), op(3)}};
  }

  static B zero_bytes() { return set_bytes(0); }
  static B set_bytes(int x) {
    return map_bytes([=](int) { return vdupq_n_u8(uint8_t(x)); });
  }
  static B load_bytes(const uint8_t* p) {
    return map_bytes([=](int i) { return vld1q_u8(p + 16 * i); });
  }
  static void store_bytes(uint8_t* p, const B& b) {
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, b.v[i]);
  }
  static B and_bytes(const B& a, const B& b) {
    return map_bytes([&](int i) { return vandq_u8(a.v[i], b.v[i]); });
  }
  static B or_bytes(const B& a, const B& b) {
    return map_bytes([&](int i) { return vorrq_u8(a.v[i], b.v[i]); });
  }
  static B select(const B& mask, const B& a, const B& b) {
    return map_bytes([&](int i) { return vbslq_u8(mask.v[i], a.v[i], b.v[i]); });
  }
  static B lookup(const uint8_t* table, const B& index) {
    const uint8x16_t all = vld1q_u8(table);
    return map_bytes([&](int i) { return vqtbl1q_u8(all, index.v[i]); });
  }
  static B shift_right_by(const B& a, int n) {
    return map_bytes([&](int i) { return vshlq_u8(a.v[i], vdupq_n_s8(int8_t(-n))); });
  }
  static B shift_left_by(const B& a, int n) {
    return map_bytes([&](int i) { return vshlq_u8(a.v[i], vdupq_n_s8(int8_t(n))); });
  }
  template <int N>
  static B shift_right(const B& a) {
    if constexpr (N == 0) {
      return a;
    } else {
      return map_bytes([&](int i) { return vshrq_n_u8(a.v[i], N); });
    }
  }
  template <int N>
  static B shift_left(const B& a) {
    return map_bytes([&](int i) { return vshlq_n_u8(a.v[i], N); });
  }

  static I zero_ints() { return I{{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static I set_ints(int32_t x) { return I{{vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}}; }
  static I add_ints(const I& a, const I& b) {
    I r;
    for (int i = 0; i < 4; ++i) r.v[i] = vaddq_s32(a.v[i], b.v[i]);
    return r;
  }
  static int32_t reduce_ints(const I& a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
  }
  /// The instruction takes signed bytes: the lowest bit of 8-bit codes is split off.
  template <bool kWide>
  static I dot(I acc, const B& codes, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
    for (int i = 0; i < 4; ++i) {
      if constexpr (kWide) {
        const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(codes.v[i], 1));
        const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(codes.v[i], vdupq_n_u8(1)));
        acc.v[i] = vdotq_s32(vdotq_s32(vdotq_s32(acc.v[i], high, all), high, all), low, all);
      } else {
        acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(codes.v[i]), all);
      }
    }
    return acc;
  }
  static F load_i8(const int8_t* p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return F{{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
              vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
  }
  template <int J>
  static F byte_of(const B& codes) {
    return map([&](int i) {
      const int32x4_t ints = vreinterpretq_s32_u8(veorq_u8(codes.v[i], vdupq_n_u8(0x80)));
      return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(ints, 24 - 8 * J), 24));
    });
  }
  static void store_i8(int8_t* p, const I& a) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(a.v[0]), vqmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(a.v[2]), vqmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  }

  static F zero() { return set(0.0f); }
  static F set(float x) {
    return map([=](int) { return vdupq_n_f32(x); });
  }
  static F load(const float* p) {
    return map([=](int i) { return vld1q_f32(p + 4 * i); });
  }
  static void store(float* p, const F& a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
  }
  static F add(const F& a, const F& b) {
    return map([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  static F sub(const F& a, const F& b) {
    return map([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
  }
  static F mul(const F& a, const F& b) {
    return map([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static F div(const F& a, const F& b) {
    return map([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
  }
  static F fma(const F& a, const F& b, const F& c) {
    return map([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  // Not vmaxq and vminq: where either operand is NaN, every instruction set takes the second.
  static float32x4_t higher(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static F max(const F& a, const F& b) {
    return map([&](int i) { return higher(a.v[i], b.v[i]); });
  }
  static F min(const F& a, const F& b) {
    return map([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
  }
  static F abs(const F& a) {
    return map([&](int i) { return vabsq_f32(a.v[i]); });
  }
  static F round(const F& a) {
    return map([&](int i) { return vrndnq_f32(a.v[i]); });
  }
  static I round_to_int(const F& a) {
    I r;
    for (int i = 0; i < 4; ++i) r.v[i] = vcvtnq_s32_f32(a.v[i]);
    return r;
  }
  static F to_float(const I& a) {
    return map([&](int i) { return vcvtq_f32_s32(a.v[i]); });
  }
  static F power_of_two(const F& n) {
    return map([&](int i) {
      return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23));
    });
  }
  static float sqrt(float x) { return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0); }
  static float reduce_add(const F& a) {
    const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  template <int D>
  static F fold(const F& a, const F& b) {
    const auto sum = [](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); };
    if constexpr (D == 8) {
      return F{{sum(a.v[0], a.v[2]), sum(a.v[1], a.v[3]), sum(b.v[0], b.v[2]), sum(b.v[1], b.v[3])}};
    } else if constexpr (D == 4) {
      return F{{sum(a.v[0], a.v[1]), sum(b.v[0], b.v[1]), sum(a.v[2], a.v[3]), sum(b.v[2], b.v[3])}};
    } else if constexpr (D == 2) {
      return map([&](int i) {
        return vcombine_f32(vadd_f32(vget_low_f32(a.v[i]), vget_high_f32(a.v[i])),
                            vadd_f32(vget_low_f32(b.v[i]), vget_high_f32(b.v[i])));
      });
    } else {
      return map([&](int i) { return sum(vtrn1q_f32(a.v[i], b.v[i]), vtrn2q_f32(a.v[i], b.v[i])); });
    }
  }
  static float reduce_max(const F& a) {
    const float32x4_t four = higher(higher(a.v[0], a.v[2]), higher(a.v[1], a.v[3]));
    const float32x4_t two = higher(four, vextq_f32(four, four, 2));
    return vgetq_lane_f32(higher(two, vextq_f32(two, two, 1)), 0);
  }
  static F bytes_to_float(uint8x16_t b) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(b)), high = vmovl_u8(vget_high_u8(b));
    return F{{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
              vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
  }
  static void load_scales(const uint8_t* p, float step, float first, F* scale, F* middle) {
    static const uint8_t values[16] = {4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56};
    const uint8x16_t bytes = vld1q_u8(p);
    *scale = bytes_to_float(vqtbl1q_u8(vld1q_u8(values), vandq_u8(bytes, vdupq_n_u8(15))));
    *middle = fma(bytes_to_float(vshrq_n_u8(bytes, 4)), set(step), set(first));
  }
  static F load_f16(const uint16_t* p) {
    return map([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
  }
  static void store_f16(uint16_t* p, const F& a) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
  }
};

}  // namespace

const Kernels kNeon = make_kernels<Neon>("neon");

}  // namespace edgemoe
