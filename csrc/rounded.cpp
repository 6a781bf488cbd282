#include "rounded.h"

#include <algorithm>
#include <cmath>

#include "kernels/kernels.h"

namespace edgemoe {

RoundedRows::RoundedRows(const float* matrix, const float* bias, int rows, int cols)
    : rows_(rows),
      cols_(cols),
      codes_(round_up(size_t(blocks(rows, kMaxRank)) * kMaxRank * basis_stride(cols), kPage)),
      scales_(size_t(rows)),
      bias_(bias, bias + rows) {
  codes_.prefer_huge_pages();
  auto* code = reinterpret_cast<int8_t*>(codes_.bytes());
  for (int r = 0; r < rows; ++r, code += basis_stride(cols)) {
    const float* w = matrix + size_t(r) * cols;
    float highest = 0;
    for (int c = 0; c < cols; ++c) highest = std::max(highest, std::fabs(w[c]));
    scales_[size_t(r)] = highest / 127.0f;
    const double inverse = highest > 0 ? 127.0 / double(highest) : 0;
    for (int c = 0; c < cols; ++c) code[c] = int8_t(std::lrint(double(w[c]) * inverse));
  }
}

void RoundedRows::dot(const float* x, float* out) const {
  const Kernels& k = kernels();
  const size_t block = kMaxRank * basis_stride(cols_);
  const auto* codes = reinterpret_cast<const int8_t*>(codes_.bytes());
  for (int first = 0; first < rows_; first += kMaxRank, codes += block) {
    float z[kMaxRank];
    k.project(codes, kMaxRank, x, cols_, z);
    const int n = std::min(kMaxRank, rows_ - first);
    for (int i = 0; i < n; ++i) out[first + i] = scales_[size_t(first + i)] * z[i] + bias_[size_t(first + i)];
  }
}

}  // namespace edgemoe
