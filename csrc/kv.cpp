#include "kv.h"

#include <iterator>
#include <stdexcept>

#include "error.h"

namespace edgemoe {
namespace {

constexpr const char* kNames[] = {"f16", "f32", "q8_0", "q4_0", "q3_0", "q2_0"};  // in the order of KvType

void take(Kv* kv, bool resident) {
  kv->memory = Memory(kv->bytes);
  if (kv->bytes >= kHugeKvBytes) kv->memory.prefer_huge_pages();
  if (kv->bytes >= kHugeKvBytes || resident) kv->memory.touch();
}

std::string range_text(int begin, int64_t end) {
  return "[" + std::to_string(begin) + ", " + std::to_string(end) + ")";
}

}  // namespace

KvType kv_type(const std::string& name) {
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (name == kNames[i]) return KvType(i);
  }
  throw std::invalid_argument("KV cache: expected f16, f32, q8_0, q4_0, q3_0 or q2_0, got " + name);
}

const char* kv_name(KvType type) { return kNames[int(type)]; }

size_t kv_bytes(KvType type, int num_heads, int capacity, int head_dim) {
  expect_within("KV cache num_heads", num_heads, 1, kMaxHeads);
  expect_within("KV cache capacity", capacity, 1, kMaxContext);
  expect_within("KV cache head_dim", head_dim, 1, kMaxHeadDim);
  return round_up(num_heads * kv_head_bytes(type, capacity, blocks(head_dim, 16) * 16), 64);
}

int ring_capacity(int window, int tokens) {
  expect_within("KV cache window", window, 1, kMaxContext);
  expect_within("KV cache tokens", tokens, 1, kMaxContext);
  return int(round_up(size_t(window) + size_t(tokens) - 1, kKeyBlock));
}

void check_positions(const KvLayer& kv, int window, int pos, int T, int max_context) {
  const int64_t end = int64_t(pos) + T;
  const bool is_ring = window > 0 && kv.capacity % kKeyBlock == 0;
  const bool fits = end <= kv.capacity || (is_ring && int64_t(window) + T - 1 <= kv.capacity);
  if (pos >= 0 && T >= 1 && fits && end <= max_context && kv.capacity <= max_context) return;
  throw std::invalid_argument("attention: positions " + range_text(pos, end) + " are outside the context of " +
                              std::to_string(kv.capacity));
}

void check_copy(const KvLayer& from, const KvLayer& to, int begin, int end) {
  const auto fits = [&](const KvLayer& kv) {
    return end <= kv.capacity || (kv.capacity % 32 == 0 && blocks(end, 32) - begin / 32 <= kv.capacity / 32);
  };
  if (!from.values || !to.values || from.key_type != to.key_type || from.value_type != to.value_type ||
      from.head_stride != to.head_stride) {
    throw std::invalid_argument("KV cache: expected keys and values of the same types and heads");
  }
  if (begin < 0 || end < begin || end > kMaxContext || !fits(from) || !fits(to)) {
    throw std::invalid_argument("KV cache: positions " + range_text(begin, end) + " do not fit both of " +
                                std::to_string(from.capacity) + " and " + std::to_string(to.capacity));
  }
}

std::unique_ptr<Kv> make_kv(KvType key_type, KvType value_type, int num_heads, int capacity, int head_dim,
                            bool resident) {
  auto kv = std::make_unique<Kv>();
  const size_t keys = kv_bytes(key_type, num_heads, capacity, head_dim);
  kv->num_heads = num_heads;
  kv->head_dim = head_dim;
  kv->bytes = keys + kv_bytes(value_type, num_heads, capacity, head_dim);
  take(kv.get(), resident);
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
  take(kv.get(), false);
  kv->layer = {kv->memory.bytes(), nullptr, type, type, capacity, blocks(head_dim, 16) * 16, value_dim};
  return kv;
}

}  // namespace edgemoe
