#include "mixers/kv_store.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "kv.h"

namespace edgemoe {
namespace {

/// Whether all numbers are finite: adding one to an exponent of all ones carries into the sign bit.
bool all_finite(const uint16_t* halves, int n) {
  unsigned seen = 0;
  for (int i = 0; i < n; ++i) seen |= (halves[i] & 0x7c00u) + 0x0400u;
  return !(seen & 0x8000u);
}

bool all_finite(const float* x, int n) {
  uint32_t seen = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    seen |= (bits & 0x7f800000u) + 0x00800000u;
  }
  return !(seen & 0x80000000u);
}

/// Puts four codes, one per byte of `four`, into the planes of a group, at byte `byte` of step `step`.
void put_codes(uint8_t* group, int bits, int step, int byte, uint32_t four) {
  if (bits == 3) {
    put_codes(group, 2, step, byte, four >> 1 & 0x03030303u);
    return put_codes(group + kKvPlane<2>, 1, step, byte, four & 0x01010101u);
  }
  const int per_vector = 8 / bits, shift = step % per_vector * bits;
  const uint32_t mask = (0x01010101u * ((1u << bits) - 1)) << shift;
  uint8_t* at = group + 64 * (step / per_vector) + byte;
  uint32_t before;
  std::memcpy(&before, at, 4);
  before = (before & ~mask) | four << shift;
  std::memcpy(at, &before, 4);
}

/// Puts the codes [groups, 32] of a position into its tile, where it is number `lane`.
void put_packed(uint8_t* tile, bool is_key, int bits, int lane, int groups, const int8_t* codes) {
  for (int g = 0; g < groups; ++g, tile += 64 * bits) {
    for (int c = 0; c < kKvGroup; c += 4, codes += 4) {
      uint32_t four;
      std::memcpy(&four, codes, 4);
      if (is_key) {
        put_codes(tile, bits, c / 4, 4 * lane, four);
      } else {
        put_codes(tile, bits, c / 16 * 4 + lane / 4, 16 * (lane % 4) + c % 16, four);
      }
    }
  }
}

}  // namespace

QuantizedHead::QuantizedHead(float* scratch, int head_stride) {
  const int groups = blocks(head_stride, kKvGroup);
  padded = scratch;
  scales = padded + head_stride;
  sums = reinterpret_cast<int32_t*>(scales + groups);
  codes = reinterpret_cast<int8_t*>(sums + groups);
}

void QuantizedHead::pad(const float* x, int head_dim, int head_stride) const {
  std::copy_n(x, head_dim, padded);
  std::fill(padded + head_dim, padded + head_stride, 0.0f);
}

bool store_head(const Kernels& kn, const KvLayer& kv, bool is_key, int kv_head, int pos, const float* x, int head_dim,
                const QuantizedHead& scratch) {
  const KvType type = is_key ? kv.key_type : kv.value_type;
  const int rows = kv_tile_rows(type), place = pos % kv.capacity, lane = place % rows, stride = kv.head_stride;
  uint8_t* tile = (is_key ? kv.keys : kv.values) + kv_head * kv_head_bytes(type, kv.capacity, stride) +
                  place / rows * kv_tile_bytes(type, stride);
  if (type == KvType::kF16) {
    auto* values = reinterpret_cast<uint16_t*>(tile);
    auto* halves = is_key ? reinterpret_cast<uint16_t*>(scratch.padded) : values + lane * stride;
    kn.to_f16(x, head_dim, halves);
    for (int c = 0; is_key && c < head_dim; ++c) values[c * rows + lane] = halves[c];
    return all_finite(halves, head_dim);
  }
  if (type == KvType::kF32) {
    auto* values = reinterpret_cast<float*>(tile);
    for (int c = 0; c < head_dim; ++c) values[is_key ? c * rows + lane : lane * stride + c] = x[c];
    return all_finite(x, head_dim);
  }
  const int groups = blocks(stride, kKvGroup), bits = kv_packed_bits(type);
  scratch.pad(x, head_dim, stride);
  if (bits) {
    scratch.pack(kn, head_dim, bits);
    put_packed(tile, is_key, bits, lane, groups, scratch.codes);
  } else {
    scratch.quantize(kn, stride);
  }
  for (int c = 0; !bits && is_key && c < stride; c += 4) {
    uint32_t four;
    std::memcpy(&four, scratch.codes + c, 4);
    four ^= 0x80808080u;
    std::memcpy(tile + 16 * c + 4 * lane, &four, 4);
  }
  if (!bits && !is_key) std::memcpy(tile + lane * stride, scratch.codes, size_t(stride));
  auto* halves = reinterpret_cast<uint16_t*>(tile + kv_codes_bytes(type, stride));
  bool fits = true;
  for (int g = 0; g < groups; ++g) {
    kn.to_f16(scratch.scales + g, 1, halves + g * rows + lane);
    fits = fits && all_finite(halves + g * rows + lane, 1);
  }
  return fits;
}

std::string misfit(const float* x, int n, KvType type, bool is_key) {
  const char *name = is_key ? "key" : "value", *flag = is_key ? "-ctk" : "-ctv";
  const int bits = kv_packed_bits(type);
  const float most = 65504.0f * float(type == KvType::kF16 ? 1 : bits == 2 ? 3 : bits ? 1 << (bits - 1) : 127);
  float top = 0;
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return std::string("a ") + name + " is not a finite number: the computation broke down";
    top = std::max(top, std::fabs(x[i]));
  }
  if (type == KvType::kF32 || top <= most) return "";
  char text[200];
  std::snprintf(text, sizeof text,
                "a %s of %g does not fit the KV cache in %s, which ends at %g; f32 holds it (%s f32)", name,
                double(top), kv_name(type), double(most), flag);
  return text;
}

}  // namespace edgemoe
