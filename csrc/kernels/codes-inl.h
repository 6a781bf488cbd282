// Unpacks planes of bits into codes, four steps at a time. Part of kernels-inl.h.
//
// A plane of 2 bits holds four steps in the same 64 bytes, one of 1 bit eight. Shifting each field to its place by
// itself takes a shift and a mask for every plane and step, and processors have few units for shifts. So planes are
// joined first, while several steps lie side by side, and the steps are taken apart last.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace edgemoe {
namespace {

/// a where the bits of `mask` are set, b elsewhere.
template <class V, int Mask>
inline typename V::B blend(typename V::B a, typename V::B b) {
  return V::select(V::set_bytes(Mask), a, b);
}

/// The field of W bits at bit At of every byte.
template <class V, int W, int At>
inline typename V::B field(typename V::B bytes) {
  const auto shifted = V::template shift_right<At>(bytes);
  if constexpr (W == 8) return shifted;
  return V::and_bytes(shifted, V::set_bytes((1 << W) - 1));
}

/// One step, of 16, of a plane of W bits (1, 2, 4 or 8).
template <class V, int W, int Step>
inline typename V::B plane_field(const uint8_t* plane) {
  constexpr int per_vector = 8 / W;
  return field<V, W, Step % per_vector * W>(V::load_bytes(plane + 64 * (Step / per_vector)));
}

/// Codes of four steps: those of steps 0 and 2 side by side in one vector, those of 1 and 3 in the other.
template <class V>
struct Four {
  typename V::B even, odd;
};

/// Spreads four bits, one of each of four steps, to fields of two bits: bit i of a nibble goes to bit 2 * i + `At`.
template <class V, int At>
inline typename V::B spread(typename V::B nibbles) {
  alignas(16) static constexpr uint8_t kSpread[16] = {
      0x00 << At, 0x01 << At, 0x04 << At, 0x05 << At, 0x10 << At, 0x11 << At, 0x14 << At, 0x15 << At,
      0x40 << At, 0x41 << At, 0x44 << At, 0x45 << At, 0x50 << At, 0x51 << At, 0x54 << At, 0x55 << At,
  };
  return V::lookup(kSpread, nibbles);
}

/// Codes of four bits from their upper and lower halves, each four fields of two bits.
template <class V>
inline Four<V> join(typename V::B high, typename V::B low) {
  return {blend<V, 0xcc>(V::template shift_left<2>(high), low), blend<V, 0xcc>(high, V::template shift_right<2>(low))};
}

/// The four steps of quarter Q of a tile whose rung is one plane of W bits, or several, widest first.
template <int W>
struct Plain {
  template <class V, int Q>
  static inline void codes(const uint8_t* const* rungs, typename V::B* out) {
    steps<V, 4 * Q>(*rungs, out);
  }

 private:
  template <class V, int Step>
  static inline void steps(const uint8_t* rung, typename V::B* out) {
    out[0] = step<V, W, Step>(rung);
    if constexpr (Step % 4 < 3) steps<V, Step + 1>(rung, out + 1);
  }

  template <class V, int Width, int Step>
  static inline typename V::B step(const uint8_t* rung) {
    constexpr int first = Width >= 8 ? 8 : Width >= 4 ? 4 : Width >= 2 ? 2 : 1;
    const auto high = plane_field<V, first, Step>(rung);
    if constexpr (first == Width) {
      return high;
    } else {
      const auto low = step<V, Width - first, Step>(rung + 128 * first);
      return V::or_bytes(V::template shift_left<Width - first>(high), low);
    }
  }
};

/// The same for the first `Bits` bits of the default ladder: rungs of 2, 1, 1, 2 and 2 bits.
template <int Bits>
struct Ladder {
  static_assert(Bits == 2 || Bits == 3 || Bits == 4 || Bits == 6 || Bits == 8);

  template <class V, int Q>
  static inline void codes(const uint8_t* const* rungs, typename V::B* out) {
    const auto top = V::load_bytes(rungs[0] + 64 * Q);
    if constexpr (Bits == 2) {
      out[0] = field<V, 2, 0>(top);
      out[1] = field<V, 2, 2>(top);
      out[2] = field<V, 2, 4>(top);
      out[3] = field<V, 2, 6>(top);
    } else if constexpr (Bits == 3) {
      // `low` has the third bits in fields of two bits: each becomes the lowest bit of a code, below two bits of `top`.
      const auto low = spread<V, 0>(nibbles<V, Q>(rungs[1]));
      apart<V, 3>({blend<V, 0x66>(V::template shift_left<1>(top), low),
                   blend<V, 0x66>(V::template shift_right<1>(top), V::template shift_right<2>(low))},
                  out);
    } else {
      const Four<V> high =
          join<V>(top, V::or_bytes(spread<V, 1>(nibbles<V, Q>(rungs[1])), spread<V, 0>(nibbles<V, Q>(rungs[2]))));
      if constexpr (Bits == 4) {
        apart<V, 4>(high, out);
      } else if constexpr (Bits == 6) {
        const auto low = V::load_bytes(rungs[3] + 64 * Q);
        const auto six = V::set_bytes(0x3f);
        out[0] = V::and_bytes(blend<V, 0x03>(low, V::template shift_left<2>(high.even)), six);
        out[1] =
            V::and_bytes(blend<V, 0x03>(V::template shift_right<2>(low), V::template shift_left<2>(high.odd)), six);
        out[2] =
            V::and_bytes(blend<V, 0x03>(V::template shift_right<4>(low), V::template shift_right<2>(high.even)), six);
        out[3] =
            V::and_bytes(blend<V, 0x03>(V::template shift_right<6>(low), V::template shift_right<2>(high.odd)), six);
      } else {
        const Four<V> low = join<V>(V::load_bytes(rungs[3] + 64 * Q), V::load_bytes(rungs[4] + 64 * Q));
        out[0] = blend<V, 0xf0>(V::template shift_left<4>(high.even), low.even);
        out[1] = blend<V, 0xf0>(V::template shift_left<4>(high.odd), low.odd);
        out[2] = blend<V, 0xf0>(high.even, V::template shift_right<4>(low.even));
        out[3] = blend<V, 0xf0>(high.odd, V::template shift_right<4>(low.odd));
      }
    }
  }

 private:
  /// The bits of four steps in a plane of one bit.
  template <class V, int Q>
  static inline typename V::B nibbles(const uint8_t* plane) {
    return field<V, 4, Q % 2 * 4>(V::load_bytes(plane + 64 * (Q / 2)));
  }

  template <class V, int W>
  static inline void apart(const Four<V>& four, typename V::B* out) {
    out[0] = field<V, W, 0>(four.even);
    out[1] = field<V, W, 0>(four.odd);
    out[2] = field<V, W, 4>(four.even);
    out[3] = field<V, W, 4>(four.odd);
  }
};

template <class V, class Codes, int Q = 0>
inline void unpack(const uint8_t* const* rungs, uint8_t* tile) {
  if constexpr (Q < 4) {
    typename V::B codes[4];
    Codes::template codes<V, Q>(rungs, codes);
    for (int i = 0; i < 4; ++i) V::store_bytes(tile + 64 * (4 * Q + i), codes[i]);
    unpack<V, Codes, Q + 1>(rungs, tile);
  }
}

/// dots[q] = the dot product of the four steps of quarter q.
template <class V, class Codes, bool kWide, int Q = 0>
inline void dot_quarters(typename V::I* dots, const uint8_t* const* rungs, const int8_t* x) {
  if constexpr (Q < 4) {
    typename V::B codes[4];
    Codes::template codes<V, Q>(rungs, codes);
    dots[Q] = V::zero_ints();
    for (int i = 0; i < 4; ++i) dots[Q] = V::template dot<kWide>(dots[Q], codes[i], x + 4 * (4 * Q + i));
    dot_quarters<V, Codes, kWide, Q + 1>(dots, rungs, x);
  }
}

/// Unpacks a tile of any ladder, known only at run time.
template <class V>
void unpack_any(const NestedMatrix& w, const uint8_t* const* rungs, uint8_t* tile) {
  for (int step = 0; step < 16; ++step) V::store_bytes(tile + 64 * step, V::zero_bytes());
  for (int r = 0; r < w.num_rungs; ++r) {
    const uint8_t* plane = rungs[r];
    for (int width = 8; width >= 1; width /= 2) {
      if (!(w.widths[r] & width)) continue;
      const int per_vector = 8 / width;
      const auto mask = V::set_bytes((1 << width) - 1);
      for (int step = 0; step < 16; ++step) {
        const auto field = V::and_bytes(
            V::shift_right_by(V::load_bytes(plane + 64 * (step / per_vector)), step % per_vector * width), mask);
        auto code = V::load_bytes(tile + 64 * step);
        code = width == 8 ? field : V::or_bytes(V::shift_left_by(code, width), field);
        V::store_bytes(tile + 64 * step, code);
      }
      plane += 128 * width;
    }
  }
}

}  // namespace
}  // namespace edgemoe
