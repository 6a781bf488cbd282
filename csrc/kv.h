// The KV cache: keys and values of one layer of one sequence.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>

#include "kernels/kernels.h"
#include "memory.h"

namespace edgemoe {

constexpr int kMaxHeads = 1 << 12, kMaxHeadDim = 1 << 12;  ///< their product stays within 2^24, like every row
constexpr int kMaxContext = 1 << 30;
constexpr size_t kHugeKvBytes = size_t(4) << 20;  ///< from here on a layer has huge pages, resident from the start

/// Returns the capacity of a ring for a window and passes of at most `tokens` tokens.
///
/// A layer keeps position p at p % capacity. So a layer whose window is smaller than the context may be a ring, with a
/// capacity of whole blocks: positions that the window has left behind are overwritten.
int ring_capacity(int window, int tokens);

/// Throws std::invalid_argument unless T positions from `pos` fit a layer: they lie below its capacity or, in a ring,
/// the T positions and all that the first of them sees fit at once.
void check_positions(const KvLayer& kv, int window, int pos, int T, int max_context);

/// Throws std::invalid_argument unless positions [begin, end) can be copied between two layers, which must have the
/// same number of heads.
void check_copy(const KvLayer& from, const KvLayer& to, int begin, int end);

/// Copies positions [begin, end), in whole tiles, by calls of `copy(to, from, bytes)`.
template <class Copy>
void copy_positions(const KvLayer& from, const KvLayer& to, int num_heads, int begin, int end, Copy copy) {
  for (const bool is_key : {true, false}) {
    const KvType type = is_key ? from.key_type : from.value_type;
    const int rows = kv_tile_rows(type), stride = from.head_stride, last = blocks(end, rows);
    const size_t tile = kv_tile_bytes(type, stride);
    const int from_tiles = blocks(from.capacity, rows), to_tiles = blocks(to.capacity, rows);
    for (int h = 0; h < num_heads; ++h) {
      const uint8_t* source = (is_key ? from.keys : from.values) + h * kv_head_bytes(type, from.capacity, stride);
      uint8_t* target = (is_key ? to.keys : to.values) + h * kv_head_bytes(type, to.capacity, stride);
      for (int t = begin / rows, n; t < last; t += n) {
        const int at = t % from_tiles, there = t % to_tiles;
        n = std::min({last - t, from_tiles - at, to_tiles - there});
        copy(target + there * tile, source + at * tile, n * tile);
      }
    }
  }
}

/// Keys and values of one layer, and the memory that holds them.
struct Kv {
  KvLayer layer{};
  int num_heads = 0, head_dim = 0;
  size_t bytes = 0;
  Memory memory;
};

/// "f16", "f32", "q8_0", "q4_0", "q3_0" or "q2_0". Throws std::invalid_argument for another name.
KvType kv_type(const std::string& name);
const char* kv_name(KvType type);

/// Bytes of one layer's keys or values, rounded so that both start on a cache line. Throws std::invalid_argument unless
/// every size is one that a model may have.
size_t kv_bytes(KvType type, int num_heads, int capacity, int head_dim);

/// Makes an empty layer. With `resident`, all of it is resident from the start, even where it is small. Throws
/// std::invalid_argument like `kv_bytes`, and OutOfBudget.
std::unique_ptr<Kv> make_kv(KvType key_type, KvType value_type, int num_heads, int capacity, int head_dim,
                            bool resident);

/// Makes a layer of latents: keys of one head whose leading `value_dim` columns are the values too. Throws likewise,
/// and unless `value_dim` is a multiple of 16 and at most `head_dim`.
std::unique_ptr<Kv> make_latents(KvType type, int capacity, int head_dim, int value_dim);

}  // namespace edgemoe
