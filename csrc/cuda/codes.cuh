// A thread's part of a tile: 32 columns of one row. Layouts are those of kernels/kernels.h.
//
// A plane of 2 bits has a group of 16 columns of a row in one 32-bit word, a plane of 1 bit two groups. So a warp reads
// a tile in whole words, 64 consecutive bytes at a time, and needs neither shuffles nor shared memory to unpack codes.
#pragma once

#include "exact.cuh"

namespace edgemoe {
namespace cuda {

constexpr int kSteps = 8;  ///< of four columns each, in a half of a tile

__device__ __forceinline__ uint32_t load_word(const uint8_t* p) { return __ldg(reinterpret_cast<const uint32_t*>(p)); }
__device__ __forceinline__ float load_f16(const uint8_t* p, int i) {
  return half_to_float(__ldg(reinterpret_cast<const uint16_t*>(p) + i));
}

/// One token's activations in the columns of a tile's half.
struct Half {
  int x[kSteps];  ///< four codes each
  float2 sums;

  __device__ __forceinline__ Half(const int8_t* codes, const float* sums_at) {
    const int4* at = reinterpret_cast<const int4*>(codes);
    const int4 a = __ldg(at), b = __ldg(at + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    sums = __ldg(reinterpret_cast<const float2*>(sums_at));
  }
};

/// The words of one plane of W bits (1, 2, 4 or 8) that hold a row's half.
template <int W>
struct Plane {
  uint32_t words[W];

  /// Where a thread's words begin in a plane; they are 64 bytes apart.
  static __device__ __forceinline__ int offset(int half, int row) { return 64 * W * half + 4 * row; }

  __device__ __forceinline__ void load(const uint8_t* at) {
    EDGEMOE_UNROLL
    for (int i = 0; i < W; ++i) words[i] = load_word(at + 64 * i);
  }
  /// Four columns' fields, one in each byte, shifted left by `up`.
  __device__ __forceinline__ uint32_t field(int step, int up) const {
    if constexpr (W == 8) {
      return words[step];
    } else {
      constexpr int per_word = 8 / W;
      const int down = step % per_word * W;
      const uint32_t word = words[step / per_word], mask = ((1u << W) - 1) * 0x01010101u;
      return (up >= down ? word << (up - down) : word >> (down - up)) & (mask << up);
    }
  }
};

/// codes = codes << W | the fields of a plane.
template <int W>
__device__ __forceinline__ void append_plane(const uint8_t* plane, int half, int row, uint32_t* codes) {
  Plane<W> p;
  p.load(plane + Plane<W>::offset(half, row));
  EDGEMOE_UNROLL
  for (int s = 0; s < kSteps; ++s) codes[s] = (W == 8 ? 0 : codes[s] << W) | p.field(s, 0);
}

/// The same for a rung of any width: its planes, widest first.
__device__ __forceinline__ void append_rung(const uint8_t* rung, int width, int half, int row, uint32_t* codes) {
  if (width & 8) append_plane<8>(rung, half, row, codes);
  if (width & 4) append_plane<4>(rung, half, row, codes);
  rung += 128 * (width & 4);
  if (width & 2) append_plane<2>(rung, half, row, codes);
  rung += 128 * (width & 2);
  if (width & 1) append_plane<1>(rung, half, row, codes);
}

/// A prefix of the default ladder, whose rungs are one plane each: fields are shifted only once, to their final place.
template <int... Widths>
struct Rungs;

template <>
struct Rungs<> {
  static constexpr int bits = 0, count = 0;
  static __device__ __forceinline__ void place(const uint8_t**, int, int) {}
  __device__ __forceinline__ void load(const uint8_t* const*) {}
  __device__ __forceinline__ uint32_t codes(int) const { return 0; }
};

template <int W, int... More>
struct Rungs<W, More...> {
  static constexpr int bits = W + Rungs<More...>::bits, count = 1 + Rungs<More...>::count;
  Plane<W> first;
  Rungs<More...> rest;

  /// Moves pointers to a tile's rungs to a thread's words.
  static __device__ __forceinline__ void place(const uint8_t** at, int half, int row) {
    at[0] += Plane<W>::offset(half, row);
    Rungs<More...>::place(at + 1, half, row);
  }
  __device__ __forceinline__ void load(const uint8_t* const* at) {
    first.load(at[0]);
    rest.load(at + 1);
  }
  __device__ __forceinline__ uint32_t codes(int step) const { return first.field(step, bits - W) | rest.codes(step); }
};

/// A cursor over every `stride`th tile of a row block, from tile `first` on.
template <class R>
struct LadderTiles {
  static constexpr int N = R::count;
  const uint8_t* at[N];
  int strides[N];
  const uint8_t* scales;  ///< bytes of the row's two groups, 16 apart

  __device__ __forceinline__ LadderTiles(const NestedMatrix& w, int block, int tiles, int first, int stride, int half,
                                         int row) {
    EDGEMOE_UNROLL
    for (int r = 0; r < N; ++r) {
      const int bytes = int(tile_bytes(w.widths[r], r == 0));
      at[r] = tiles_of(w, r) + (size_t(block) * tiles + first) * bytes;
      strides[r] = bytes * stride;
    }
    scales = at[0] + 32 * half + row;
    at[0] += kScaleBytes;
    R::place(at, half, row);
  }
  __device__ __forceinline__ int bits() const { return R::bits; }
  __device__ __forceinline__ void codes(uint32_t* out) const {
    R r;
    r.load(at);
    EDGEMOE_UNROLL
    for (int s = 0; s < kSteps; ++s) out[s] = r.codes(s);
  }
  __device__ __forceinline__ void next() {
    EDGEMOE_UNROLL
    for (int r = 0; r < N; ++r) at[r] += strides[r];
    scales += strides[0];
  }
};

/// The same for any other ladder, known only at run time.
struct AnyTiles {
  const NestedMatrix& w;
  size_t tile;
  int stride, half, row;
  const uint8_t* scales;

  __device__ __forceinline__ AnyTiles(const NestedMatrix& w, int block, int tiles, int first, int stride, int half,
                                      int row)
      : w(w), tile(size_t(block) * tiles + first), stride(stride), half(half), row(row) {
    find_scales();
  }
  __device__ __forceinline__ int bits() const { return bits_of(w); }
  __device__ __forceinline__ void codes(uint32_t* out) const {
    EDGEMOE_UNROLL
    for (int s = 0; s < kSteps; ++s) out[s] = 0;
    append_rung(tile_of_base() + kScaleBytes, w.widths[0], half, row, out);
    for (int r = 1; r < w.num_rungs; ++r) {
      append_rung(tiles_of(w, r) + tile * tile_bytes(w.widths[r], false), w.widths[r], half, row, out);
    }
  }
  __device__ __forceinline__ void next() {
    tile += stride;
    find_scales();
  }

 private:
  __device__ __forceinline__ const uint8_t* tile_of_base() const {
    return tiles_of(w, 0) + tile * tile_bytes(w.widths[0], true);
  }
  __device__ __forceinline__ void find_scales() { scales = tile_of_base() + 32 * half + row; }
};

}  // namespace cuda
}  // namespace edgemoe
