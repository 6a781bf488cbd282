#include "mixers/delta.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace edgemoe {
namespace {

constexpr int kColumns = 128;  ///< columns of a head's values in one piece of work

/// Replaces x [n] by its decays; `rate` is one number or, if `each`, one per x.
void decay_of(const Kernels& kn, Decay kind, const float* rate, bool each, const float* bias, int n, float* x) {
  if (kind == Decay::kSoftplus) {
    kn.softplus(x, bias, n);
    return kn.decays(x, rate, each, n, x);
  }
  for (int i = 0; i < n; ++i) x[i] = rate[each ? i : 0] * (x[i] + bias[i]);
  kn.sigmoid(x, n);
  const float bound = kDecayBound;
  kn.decays(x, &bound, false, n, x);
}

/// Zeroes columns [first, last) of a state [rows, cols].
void clear(float* state, int rows, int cols, int first, int last) {
  for (int i = 0; i < rows; ++i) std::fill(state + size_t(i) * cols + first, state + size_t(i) * cols + last, 0.0f);
}

}  // namespace

void delta_rule(Workspace& ws, const DeltaParts& parts, float* q, float* k, const float* v, size_t qkv_stride,
                float* decay, float* beta, int T, const float* before, float* state, float* out) {
  const Kernels& kn = kernels();
  const DeltaShape& s = parts.shape;
  const int per_head = s.decay_per_channel ? s.key_dim : 1, decays = s.value_heads * per_head;
  // An RMS norm with a constant weight: x / sqrt(sum + eps) = x / sqrt(mean + eps / n) * n^-0.5.
  const float root = std::sqrt(float(s.key_dim));
  const std::vector<float> k_weight(size_t(s.key_dim), 1 / root), q_weight(size_t(s.key_dim), 1 / root / root);
  const int pieces = s.decay_per_channel ? s.value_heads : 1, n = decays / pieces;
  // Unit lengths of queries and keys, then decays: in one loop, as each is short.
  const int items = s.key_heads + pieces;
  ws.pool.run(T * items, grain_for(T * items, ws.pool.size()), [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int t = i / items, h = i % items, p = h - s.key_heads;
      if (p < 0) {
        const size_t at = size_t(t) * qkv_stride + size_t(h) * size_t(s.key_dim);
        kn.rms_norm(q + at, q_weight.data(), kLengthEps / float(s.key_dim), s.key_dim, q + at);
        kn.rms_norm(k + at, k_weight.data(), kLengthEps / float(s.key_dim), s.key_dim, k + at);
        continue;
      }
      float* x = decay + size_t(t) * size_t(decays) + size_t(p) * size_t(n);
      decay_of(kn, s.decay, parts.rate + p, !s.decay_per_channel, parts.bias + p * n, n, x);
      if (p == 0) kn.sigmoid(beta + size_t(t) * s.value_heads, s.value_heads);
    }
  });
  const int columns = blocks(s.value_dim, kColumns), repeat = s.value_heads / s.key_heads;
  ws.pool.run(s.value_heads * columns, 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int h = i / columns, first = i % columns * kColumns, last = std::min(first + kColumns, s.value_dim);
      const size_t key = size_t(h / repeat) * size_t(s.key_dim), value = size_t(h) * size_t(s.value_dim);
      const size_t matrix = size_t(h) * size_t(s.key_dim) * size_t(s.value_dim);
      if (!before) clear(state + matrix, s.key_dim, s.value_dim, first, last);
      const DeltaHead head{(before ? before : state) + matrix,
                           state + matrix,
                           q + key,
                           k + key,
                           v + value,
                           decay + h * per_head,
                           beta + h,
                           out + value,
                           s.key_dim,
                           s.value_dim,
                           qkv_stride,
                           qkv_stride,
                           size_t(s.value_heads) * size_t(s.value_dim),
                           size_t(decays),
                           size_t(s.value_heads),
                           s.decay_per_channel};
      kn.delta_rule(head, T, first, last);
    }
  });
}

}  // namespace edgemoe
