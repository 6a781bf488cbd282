#include "mixers/mamba.h"

#include <algorithm>

namespace edgemoe {

void mamba2(Workspace& ws, const MambaParts& parts, const float* x, const float* b, const float* c, size_t stride,
            float* step, float* decay, int T, const float* before, float* state, float* out) {
  const Kernels& kn = kernels();
  const MambaShape& s = parts.shape;
  const int per_group = s.num_heads / s.groups;
  ws.pool.run(T, grain_for(T, ws.pool.size()), [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const size_t at = size_t(t) * size_t(s.num_heads);
      kn.softplus(step + at, parts.step_bias, s.num_heads);
      kn.decays(step + at, parts.rate, true, s.num_heads, decay + at);
    }
  });
  ws.pool.run(s.num_heads, 1, [&](int begin, int end) {
    for (int h = begin; h < end; ++h) {
      const size_t group = size_t(h / per_group) * size_t(s.state_dim), value = size_t(h) * size_t(s.head_dim);
      const size_t matrix = value * size_t(s.state_dim);
      if (!before) std::fill(state + matrix, state + matrix + size_t(s.state_dim) * size_t(s.head_dim), 0.0f);
      const MambaHead head{(before ? before : state) + matrix,
                           state + matrix,
                           x + value,
                           b + group,
                           c + group,
                           decay + h,
                           step + h,
                           out + value,
                           parts.skip[h],
                           s.state_dim,
                           s.head_dim,
                           stride,
                           stride,
                           size_t(s.num_heads),
                           size_t(s.num_heads) * size_t(s.head_dim)};
      kn.mamba2(head, T, 0, s.head_dim);
    }
  });
}

}  // namespace edgemoe
