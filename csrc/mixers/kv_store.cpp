#include "mixers/kv_store.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace edgemoe {
namespace {

/// Whether no number is infinite or none at all. An exponent of ones carries into the sign.
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
  scratch.pad(x, head_dim, stride);
  scratch.quantize(kn, stride);
  for (int c = 0; is_key && c < stride; c += 4) {
    uint32_t four;
    std::memcpy(&four, scratch.codes + c, 4);
    four ^= 0x80808080u;
    std::memcpy(tile + 16 * c + 4 * lane, &four, 4);
  }
  if (!is_key) std::memcpy(tile + lane * stride, scratch.codes, size_t(stride));
  auto* halves = reinterpret_cast<uint16_t*>(tile + rows * stride);
  bool fits = true;
  for (int g = 0; g < blocks(stride, kKvGroup); ++g) {
    kn.to_f16(scratch.scales + g, 1, halves + g * rows + lane);
    fits = fits && all_finite(halves + g * rows + lane, 1);
  }
  return fits;
}

std::string misfit(const float* x, int n, KvType type, bool is_key) {
  const char *name = is_key ? "key" : "value", *flag = is_key ? "-ctk" : "-ctv";
  const float most = type == KvType::kF16 ? 65504.0f : 127 * 65504.0f;
  float top = 0;
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return std::string("a ") + name + " is not a finite number: the computation broke down";
    top = std::max(top, std::fabs(x[i]));
  }
  if (type == KvType::kF32 || top <= most) return "";
  char text[200];
  std::snprintf(text, sizeof text,
                "a %s of %g does not fit the KV cache in %s, which ends at %g; f32 holds it (%s f32)", name,
                double(top), type == KvType::kF16 ? "f16" : "q8_0", double(most), flag);
  return text;
}

}  // namespace edgemoe
