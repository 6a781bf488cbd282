// Keys and values of one layer of one sequence, as a core type.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "kernels/kernels.h"
#include "memory.h"

namespace edgemoe {

/// Keys and values of one layer, and the memory that holds them.
struct Kv {
  KvLayer layer{};
  int num_heads = 0, head_dim = 0;
  size_t bytes = 0;
  Memory memory;
};

/// "f16" or "q8_0". Throws std::invalid_argument for another name.
KvType kv_type(const std::string& name);

/// Bytes of one layer's keys or values, rounded so that both start on a cache line.
size_t kv_bytes(KvType type, int num_heads, int capacity, int head_dim);

/// Throws std::invalid_argument unless every size is above 0.
std::unique_ptr<Kv> make_kv(KvType key_type, KvType value_type, int num_heads, int capacity, int head_dim);

}  // namespace edgemoe
