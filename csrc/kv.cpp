#include "kv.h"

#include <stdexcept>

#include "error.h"

namespace edgemoe {
namespace {

void take(Kv* kv) {
  kv->memory = Memory(kv->bytes);
  if (kv->bytes < kHugeKvBytes) return;
  kv->memory.prefer_huge_pages();
  kv->memory.touch();
}

}  // namespace

KvType kv_type(const std::string& name) {
  if (name == "f16") return KvType::kF16;
  if (name == "f32") return KvType::kF32;
  if (name == "q8_0") return KvType::kQ8;
  throw std::invalid_argument("KV cache: expected f16, f32 or q8_0, got " + name);
}

size_t kv_bytes(KvType type, int num_heads, int capacity, int head_dim) {
  expect_within("KV cache num_heads", num_heads, 1, kMaxHeads);
  expect_within("KV cache capacity", capacity, 1, kMaxContext);
  expect_within("KV cache head_dim", head_dim, 1, kMaxHeadDim);
  return round_up(num_heads * kv_head_bytes(type, capacity, blocks(head_dim, 16) * 16), 64);
}

std::unique_ptr<Kv> make_kv(KvType key_type, KvType value_type, int num_heads, int capacity, int head_dim) {
  auto kv = std::make_unique<Kv>();
  const size_t keys = kv_bytes(key_type, num_heads, capacity, head_dim);
  kv->num_heads = num_heads;
  kv->head_dim = head_dim;
  kv->bytes = keys + kv_bytes(value_type, num_heads, capacity, head_dim);
  take(kv.get());
  const int stride = blocks(head_dim, 16) * 16;
  kv->layer = {kv->memory.bytes(), kv->memory.bytes() + keys, key_type, value_type, capacity, stride, stride};
  return kv;
}

std::unique_ptr<Kv> make_latents(KvType type, int capacity, int head_dim, int value_dim) {
  if (value_dim < 16 || value_dim % 16 || value_dim > head_dim) {
    throw std::invalid_argument("KV cache value_dim: expected a multiple of 16 to " + std::to_string(head_dim) +
                                ", got " + std::to_string(value_dim));
  }
  auto kv = std::make_unique<Kv>();
  kv->num_heads = 1;
  kv->head_dim = head_dim;
  kv->bytes = kv_bytes(type, 1, capacity, head_dim);
  take(kv.get());
  kv->layer = {kv->memory.bytes(), nullptr, type, type, capacity, blocks(head_dim, 16) * 16, value_dim};
  return kv;
}

}  // namespace edgemoe
