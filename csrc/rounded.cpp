#include "rounded.h"

#include <algorithm>
#include <cmath>

#include "kernels/kernels.h"

namespace edgemoe {
namespace {

constexpr int kStep = 8;  // columns in 64 bytes of a block of rows

float highest_of(const float* x, int n) {
  float highest = 0;
  for (int i = 0; i < n; ++i) highest = std::max(highest, std::fabs(x[i]));
  return highest;
}

}  // namespace

RoundedRows::RoundedRows(const float* matrix, const float* bias, int rows, int cols)
    : rows_(rows),
      cols_(cols),
      blocks_(blocks(rows, kTileRows)),
      steps_(blocks(cols, kStep)),
      codes_(round_up(size_t(blocks_) * size_t(steps_) * 64, kPage)),
      scales_(size_t(blocks_) * kTileRows),
      bias_(bias, bias + rows) {
  bias_.resize(scales_.size());
  codes_.prefer_huge_pages();
  for (int r = 0; r < rows; ++r) {
    const float* w = matrix + size_t(r) * size_t(cols);
    const float highest = highest_of(w, cols);
    scales_[size_t(r)] = highest / 7.5f;
    const double inverse = highest > 0 ? 7.5 / double(highest) : 0;
    uint8_t* codes = codes_.bytes() + size_t(r / kTileRows) * size_t(steps_) * 64 + size_t(r % kTileRows) * kStep / 2;
    for (int c = 0; c < cols; ++c) {
      const int code = std::clamp(int(std::floor(double(w[c]) * inverse)) + 8, 0, 15);
      uint8_t& both = codes[c / kStep * 64 + c % (kStep / 2)];
      both = uint8_t(both | (c % kStep < kStep / 2 ? code : code << 4));
    }
  }
}

void RoundedRows::dot(const float* x, float* out) const {
  const float highest = highest_of(x, cols_), inverse = highest > 0 ? 127.0f / highest : 0.0f;
  std::vector<int8_t> codes(size_t(steps_) * kStep);
  int sum = 0;
  for (int c = 0; c < cols_; ++c) sum += codes[size_t(c)] = int8_t(std::lrint(x[c] * inverse));
  const RoundedTiles w{codes_.bytes(), scales_.data(), bias_.data(), blocks_, steps_};
  if (rows_ % kTileRows == 0) return kernels().matmul_rounded(w, codes.data(), highest / 127.0f, float(sum), out);
  std::vector<float> padded(scales_.size());
  kernels().matmul_rounded(w, codes.data(), highest / 127.0f, float(sum), padded.data());
  std::copy_n(padded.data(), rows_, out);
}

}  // namespace edgemoe
