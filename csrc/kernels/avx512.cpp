// AVX-512 with VNNI: one vector holds the codes of a whole step.
#include <immintrin.h>

#include "kernels-inl.h"

namespace edgemoe {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using B = __m512i;
  static constexpr int kTokensAtOnce = 4;
  static constexpr int kFloatTokens = 4;
  static constexpr int kKeyVectors = 2;
  static constexpr int kHeadVectors = 4;

  static B zero_bytes() { return _mm512_setzero_si512(); }
  static B set_bytes(int x) { return _mm512_set1_epi8(char(x)); }
  static B load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(uint8_t* p, B b) { _mm512_storeu_si512(p, b); }
  static B and_bytes(B a, B b) { return _mm512_and_si512(a, b); }
  static B or_bytes(B a, B b) { return _mm512_or_si512(a, b); }
  static B select(B mask, B a, B b) { return _mm512_ternarylogic_epi64(mask, a, b, 0xca); }
  static B lookup(const uint8_t* table, B index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), index);
  }
  // 16-bit shifts: bits that cross a byte are masked by the caller (right) or cannot be set (left).
  static B shift_right_by(B a, int n) { return _mm512_srl_epi16(a, _mm_cvtsi32_si128(n)); }
  static B shift_left_by(B a, int n) { return _mm512_sll_epi16(a, _mm_cvtsi32_si128(n)); }
  template <int N>
  static B shift_right(B a) {
    if constexpr (N == 0) return a;
    return _mm512_srli_epi16(a, N);
  }
  template <int N>
  static B shift_left(B a) {
    return _mm512_slli_epi16(a, N);
  }

  static I zero_ints() { return _mm512_setzero_si512(); }
  static I set_ints(int32_t x) { return _mm512_set1_epi32(x); }
  static I add_ints(I a, I b) { return _mm512_add_epi32(a, b); }
  static int32_t reduce_ints(I a) { return _mm512_reduce_add_epi32(a); }
  template <bool kWide>
  static I dot(I acc, B codes, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(four));
  }
  static F load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  template <int J>
  static F byte_of(B codes) {
    const I high = _mm512_slli_epi32(_mm512_xor_si512(codes, _mm512_set1_epi8(char(0x80))), 24 - 8 * J);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24));
  }
  static void store_i8(int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a)); }

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static I round_to_int(F a) { return _mm512_cvtps_epi32(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F power_of_two(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  static float sqrt(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
  static float reduce_add(F a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  template <int D>
  static F fold(F a, F b) {
    constexpr __mmask16 upper = D == 8 ? 0xff00 : D == 4 ? 0xf0f0 : D == 2 ? 0xcccc : 0xaaaa;
    const F own = _mm512_mask_blend_ps(upper, a, b), other = _mm512_mask_blend_ps(upper, b, a);
    if constexpr (D == 8) return _mm512_add_ps(own, _mm512_shuffle_f32x4(other, other, 0x4e));
    if constexpr (D == 4) return _mm512_add_ps(own, _mm512_shuffle_f32x4(other, other, 0xb1));
    return _mm512_add_ps(own, _mm512_permute_ps(other, D == 2 ? 0x4e : 0xb1));
  }
  /// Not _mm512_reduce_max_ps: it is another tree, which matters where a lane is NaN.
  static float reduce_max(F a) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static void load_scales(const uint8_t* p, float step, float first, F* scale, F* middle) {
    const F values = _mm512_setr_ps(4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56);
    const I bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    *scale = _mm512_permutexvar_ps(bytes, values);  // uses the lowest four bits only
    const F index = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    *middle = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), fma(index, set(step), set(first)));
  }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_f16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

const Kernels kAvx512 = make_kernels<Avx512>("avx512");

}  // namespace edgemoe
