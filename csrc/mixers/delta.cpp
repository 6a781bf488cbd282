#include "mixers/delta.h"

#include <cmath>
#include <vector>

#include "mixers/gates.h"

namespace edgemoe {
namespace {

constexpr float kLengthEps = 1e-6f;
constexpr int kColumns = 64;  ///< of a head's values that are one piece of work

float decay_of(Decay kind, double rate, float x, float bias) {
  const double at = double(x) + double(bias);
  return float(exact_exp(kind == Decay::kSoftplus ? -rate * exact_softplus(at) : -5 * exact_sigmoid(rate * at)));
}

}  // namespace

void delta_rule(Workspace& ws, const DeltaParts& parts, float* q, float* k, const float* v, size_t qkv_stride,
                float* decay, float* beta, int T, float* state, float* out) {
  const Kernels& kn = kernels();
  const DeltaShape& s = parts.shape;
  const int per_head = s.decay_per_channel ? s.key_dim : 1, decays = s.value_heads * per_head;
  // An RMS norm with a constant weight: x / sqrt(sum + eps) = x / sqrt(mean + eps / n) * n^-0.5.
  const float root = std::sqrt(float(s.key_dim));
  const std::vector<float> k_weight(size_t(s.key_dim), 1 / root), q_weight(size_t(s.key_dim), 1 / root / root);
  std::vector<double> rates(size_t(s.value_heads));
  for (int h = 0; h < s.value_heads; ++h) rates[size_t(h)] = exact_exp(parts.log_a[h]);
  ws.pool.run(T * s.key_heads, grain_for(T * s.key_heads, ws.pool.size()), [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const size_t at = size_t(i / s.key_heads) * qkv_stride + size_t(i % s.key_heads) * size_t(s.key_dim);
      kn.rms_norm(q + at, q_weight.data(), kLengthEps / float(s.key_dim), s.key_dim, q + at);
      kn.rms_norm(k + at, k_weight.data(), kLengthEps / float(s.key_dim), s.key_dim, k + at);
    }
  });
  ws.pool.run(T * s.value_heads, grain_for(T * s.value_heads, ws.pool.size()), [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int h = i % s.value_heads;
      for (int c = 0; c < per_head; ++c) {
        float& x = decay[size_t(i) * size_t(per_head) + size_t(c)];
        x = decay_of(s.decay, rates[size_t(h)], x, parts.bias[h * per_head + c]);
      }
      beta[i] = float(exact_sigmoid(beta[i]));
    }
  });
  const int columns = blocks(s.value_dim, kColumns), repeat = s.value_heads / s.key_heads;
  ws.pool.run(s.value_heads * columns, 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int h = i / columns, first = i % columns * kColumns;
      const size_t key = size_t(h / repeat) * size_t(s.key_dim), value = size_t(h) * size_t(s.value_dim);
      const DeltaHead head{state + size_t(h) * size_t(s.key_dim) * size_t(s.value_dim),
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
      kn.delta_rule(head, T, first, first + kColumns < s.value_dim ? first + kColumns : s.value_dim);
    }
  });
}

}  // namespace edgemoe
