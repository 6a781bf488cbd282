#include "mixers/key_constants.h"

namespace edgemoe {
namespace {

constexpr double kSpreads = 2;  ///< a bias of more is taken out; a smaller one costs its group of 32 little precision

/// Mean of the variances of a head's columns.
double variance_of(const NestedMatrix& k, const float* norm, int first_row, int rows) {
  std::vector<float> row(size_t(blocks(k.cols, kTileCols)) * kTileCols);
  double sum = 0;
  for (int r = first_row; r < first_row + rows; ++r) {
    decode_row(kernels(), k, r, row.data());
    for (int c = 0; c < k.cols; ++c) {
      const double w = double(row[c]) * norm[c];
      sum += w * w;
    }
  }
  return sum / rows;
}

}  // namespace

KeyConstants split_bias(const NestedMatrix& k, const float* norm, const float* bias, int kv_heads, int head_dim,
                        int rope_dim) {
  KeyConstants out{{bias, bias + size_t(kv_heads) * head_dim}, {0}, {}, {}};
  const int half = rope_dim / 2;
  for (int h = 0; h < kv_heads; ++h) {
    const double most = kSpreads * kSpreads * variance_of(k, norm, h * head_dim, head_dim);
    float* rest = out.rest.data() + size_t(h) * head_dim;
    for (int i = 0; i < half; ++i) {
      const double a = rest[i], b = rest[i + half];
      if (a * a + b * b <= most) continue;
      out.pairs.push_back(i);
      out.values.insert(out.values.end(), {rest[i], rest[i + half]});
      rest[i] = rest[i + half] = 0;
    }
    out.begins.push_back(int(out.pairs.size()));
  }
  return out;
}

void lacking_of(const KeyConstants& constants, int kv_head, const float* q, int rope_dim, float* lacking) {
  const int half = rope_dim / 2;
  for (int j = constants.begins[kv_head]; j < constants.begins[kv_head + 1]; ++j, lacking += 2) {
    const float a = q[constants.pairs[j]], b = q[constants.pairs[j] + half];
    const float c = constants.values[2 * j], d = constants.values[2 * j + 1];
    lacking[0] = a * c + b * d;
    lacking[1] = b * c - a * d;
  }
}

}  // namespace edgemoe
