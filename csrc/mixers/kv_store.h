// How keys and values are stored in a layer's cache: rounded, put into tiles, and checked as they are rounded.
#pragma once

#include <cstddef>
#include <string>

#include "kernels/kernels.h"
#include "memory.h"

namespace edgemoe {

/// A head's padded values and their 8-bit codes, in scratch memory that the caller owns.
struct QuantizedHead {
  float* padded;  ///< [head_stride]
  float* scales;
  int32_t* sums;
  int8_t* codes;

  static size_t floats(int head_stride) {
    return round_up(head_stride + (2 + kKvGroup / sizeof(float)) * blocks(head_stride, kKvGroup), 16);
  }

  /// `scratch` has `floats(head_stride)` floats.
  QuantizedHead(float* scratch, int head_stride);

  /// Copies a head, padded with zeros.
  void pad(const float* x, int head_dim, int head_stride) const;

  void quantize(const Kernels& kn, int head_stride) const {
    kn.quantize_head(padded, head_stride, codes, scales, sums);
  }

  /// Rounds to 2, 3 or 4 bits.
  void pack(const Kernels& kn, int head_dim, int bits) const { kn.pack_head(padded, head_dim, bits, codes, scales); }
};

/// Positions, from a multiple of this on, that one thread alone may store: packed ones share bytes with neighbours.
constexpr int kStoredTogether = 16;

/// Stores one head's key or value at a position. Returns whether the cache's type can hold it.
bool store_head(const Kernels& kn, const KvLayer& kv, bool is_key, int kv_head, int pos, const float* x, int head_dim,
                const QuantizedHead& scratch);

/// Returns a message about a number of a position's keys or values [n] that does not fit `type`, and a type that would
/// hold it; empty if all fit.
std::string misfit(const float* x, int n, KvType type, bool is_key);

}  // namespace edgemoe
