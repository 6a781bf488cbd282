// Keys and values of one layer of one sequence, as a core type.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "kernels/kernels.h"
#include "memory.h"

namespace edgemoe {

constexpr int kMaxHeads = 1 << 12, kMaxHeadDim = 1 << 12;  ///< together they stay below 2^24, as all that is a row
constexpr int kMaxContext = 1 << 30;
constexpr size_t kHugeKvBytes = size_t(4) << 20;  ///< a layer of this size has huge pages, all resident from the start

/// Keys and values of one layer, and the memory that holds them.
struct Kv {
  KvLayer layer{};
  int num_heads = 0, head_dim = 0;
  size_t bytes = 0;
  Memory memory;
};

/// "f16", "f32" or "q8_0". Throws std::invalid_argument for another name.
KvType kv_type(const std::string& name);

/// Bytes of one layer's keys or values, rounded so that both start on a cache line. Throws std::invalid_argument unless
/// every size is one that a model may have.
size_t kv_bytes(KvType type, int num_heads, int capacity, int head_dim);

/// Throws std::invalid_argument like `kv_bytes`, and OutOfBudget.
std::unique_ptr<Kv> make_kv(KvType key_type, KvType value_type, int num_heads, int capacity, int head_dim);

/// Keys of one head, whose leading `value_dim` columns are the values too. Throws likewise, and unless these are a
/// multiple of 16.
std::unique_ptr<Kv> make_latents(KvType type, int capacity, int head_dim, int value_dim);

}  // namespace edgemoe
