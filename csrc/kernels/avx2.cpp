// AVX2 with FMA and F16C: rows 0-7 and 8-15 of a step in two vectors.
#include <immintrin.h>

#include "kernels-inl.h"

namespace edgemoe {
namespace {

struct Avx2 {
  struct F {
    __m256 lo, hi;
  };
  struct I {
    __m256i lo, hi;
  };
  using B = I;
  static constexpr int kTokensAtOnce = 3;
  static constexpr int kFloatTokens = 1;
  static constexpr int kKeyVectors = 1;
  static constexpr int kHeadVectors = 1;

  static B zero_bytes() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static B set_bytes(int x) { return {_mm256_set1_epi8(char(x)), _mm256_set1_epi8(char(x))}; }
  static B load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static void store_bytes(uint8_t* p, B b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), b.hi);
  }
  static B and_bytes(B a, B b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
  static B or_bytes(B a, B b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
  static B select(B mask, B a, B b) {
    return {_mm256_or_si256(_mm256_and_si256(mask.lo, a.lo), _mm256_andnot_si256(mask.lo, b.lo)),
            _mm256_or_si256(_mm256_and_si256(mask.hi, a.hi), _mm256_andnot_si256(mask.hi, b.hi))};
  }
  static B lookup(const uint8_t* table, B index) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(both, index.lo), _mm256_shuffle_epi8(both, index.hi)};
  }
  // 16-bit shifts: bits that cross a byte are masked by the caller (right) or cannot be set (left).
  static B shift_right_by(B a, int n) {
    const __m128i count = _mm_cvtsi32_si128(n);
    return {_mm256_srl_epi16(a.lo, count), _mm256_srl_epi16(a.hi, count)};
  }
  static B shift_left_by(B a, int n) {
    const __m128i count = _mm_cvtsi32_si128(n);
    return {_mm256_sll_epi16(a.lo, count), _mm256_sll_epi16(a.hi, count)};
  }
  template <int N>
  static B shift_right(B a) {
    if constexpr (N == 0) return a;
    return {_mm256_srli_epi16(a.lo, N), _mm256_srli_epi16(a.hi, N)};
  }
  template <int N>
  static B shift_left(B a) {
    return {_mm256_slli_epi16(a.lo, N), _mm256_slli_epi16(a.hi, N)};
  }

  static I zero_ints() { return zero_bytes(); }
  static I set_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I add_ints(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
  static int32_t reduce_ints(I a) {
    __m256i s = _mm256_add_epi32(a.lo, a.hi);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
  }
  /// 2 * 255 * 127 does not fit the 16 bits of maddubs: the lowest bit of codes above 7 bits is split off.
  template <bool kWide>
  static __m256i dot_half(__m256i codes, __m256i x) {
    const __m256i one = _mm256_set1_epi16(1);
    if constexpr (!kWide) return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), one);
    const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(1));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 1), _mm256_set1_epi8(0x7f));
    return _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(2)),
                            _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), one));
  }
  template <bool kWide>
  static I dot(I acc, B codes, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    const __m256i all = _mm256_set1_epi32(four);
    return {_mm256_add_epi32(acc.lo, dot_half<kWide>(codes.lo, all)),
            _mm256_add_epi32(acc.hi, dot_half<kWide>(codes.hi, all))};
  }
  static F load_i8(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
  }
  template <int J>
  static __m256 byte_of_half(__m256i codes) {
    const __m256i high = _mm256_slli_epi32(_mm256_xor_si256(codes, _mm256_set1_epi8(char(0x80))), 24 - 8 * J);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(high, 24));
  }
  template <int J>
  static F byte_of(B codes) {
    return {byte_of_half<J>(codes.lo), byte_of_half<J>(codes.hi)};
  }
  static void store_i8(int8_t* p, I a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
  }
  static F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
  static F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static F abs(F a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
  }
  static F round(F a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
  }
  static I round_to_int(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
  static F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  static __m256 power_of_two_half(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static F power_of_two(F n) { return {power_of_two_half(n.lo), power_of_two_half(n.hi)}; }
  static float sqrt(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
  static float reduce_add(F a) {
    const __m256 eight = _mm256_add_ps(a.lo, a.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  template <int D>
  static __m256 fold_half(__m256 a, __m256 b) {
    constexpr int upper = D == 4 ? 0xf0 : D == 2 ? 0xcc : 0xaa;
    const __m256 own = _mm256_blend_ps(a, b, upper), other = _mm256_blend_ps(b, a, upper);
    if constexpr (D == 4) return _mm256_add_ps(own, _mm256_permute2f128_ps(other, other, 1));
    return _mm256_add_ps(own, _mm256_permute_ps(other, D == 2 ? 0x4e : 0xb1));
  }
  template <int D>
  static F fold(F a, F b) {
    if constexpr (D == 8) {
      return {_mm256_add_ps(a.lo, a.hi), _mm256_add_ps(b.lo, b.hi)};
    } else {
      return {fold_half<D>(a.lo, b.lo), fold_half<D>(a.hi, b.hi)};
    }
  }
  static float reduce_max(F a) {
    const __m256 eight = _mm256_max_ps(a.lo, a.hi);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static F bytes_to_float(__m128i b) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
  }
  static void load_scales(const uint8_t* p, float step, float first, F* scale, F* middle) {
    const __m128i values = _mm_setr_epi8(4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), half = _mm_set1_epi8(15);
    *scale = bytes_to_float(_mm_shuffle_epi8(values, _mm_and_si128(bytes, half)));
    *middle = fma(bytes_to_float(_mm_and_si128(_mm_srli_epi16(bytes, 4), half)), set(step), set(first));
  }
  static F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static void store_f16(uint16_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

const Kernels kAvx2 = make_kernels<Avx2>("avx2");

}  // namespace edgemoe
