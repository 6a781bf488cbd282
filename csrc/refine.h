// The choice of codes for rows, given their scales, and the fit of the scales to the codes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "kernels/kernels.h"
#include "quantize.h"

namespace edgemoe {

/// Allocates at cache lines, where loads of whole vectors touch one line instead of two.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};

using Floats = std::vector<float, LineAllocator<float>>;

/// A level that counts in the objective.
struct Level {
  int bits;
  float weight;
  int scale;             ///< which of a row's scales it uses
  const float* moments;  ///< by which its error is measured: `moments` or `rest` of the objective, or null
};

/// Sixteen rows that are being quantised: the state that all steps below share.
struct RowBlock {
  const float* w;  ///< [16, cols], rows beyond the matrix are zero
  int cols;
  int num_scales;                         ///< of a row
  uint16_t halves[kMaxRungs][kTileRows];  ///< row scales as they are stored
  float units[kMaxRungs][kTileRows];      ///< step of a code with relative scale 1
  std::vector<float> steps;               ///< [groups, 16] relative scales: a code's step is unit * this
  std::vector<float> middles;             ///< [groups, 16] in steps, such that w = step * (code + 0.5 + middle)
  std::vector<uint8_t> codes;             ///< [16, cols]

  int groups() const { return blocks(cols, kGroup); }
};

/// Chooses the code of each weight by itself.
void round_rows(RowBlock* b, const std::vector<Level>& levels);

/// Refines codes for the error of the output; where a row has several scales, then scales and codes in turn. All blocks
/// have the same columns and scales.
void refine_rows(RowBlock* blocks, int count, const std::vector<Level>& levels, const Objective& o);

}  // namespace edgemoe
