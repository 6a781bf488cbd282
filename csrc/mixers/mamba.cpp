#include "mixers/mamba.h"

#include <vector>

#include "mixers/gates.h"

namespace edgemoe {

void mamba2(Workspace& ws, const MambaParts& parts, const float* x, const float* b, const float* c, size_t stride,
            float* step, float* decay, int T, float* state, float* out) {
  const Kernels& kn = kernels();
  const MambaShape& s = parts.shape;
  std::vector<double> rates(size_t(s.num_heads));
  for (int h = 0; h < s.num_heads; ++h) rates[size_t(h)] = exact_exp(parts.log_a[h]);
  const int per_group = s.num_heads / s.groups;
  ws.pool.run(s.num_heads, 1, [&](int begin, int end) {
    for (int h = begin; h < end; ++h) {
      for (int t = 0; t < T; ++t) {
        const size_t at = size_t(t) * size_t(s.num_heads) + size_t(h);
        const double d = exact_softplus(double(step[at]) + double(parts.step_bias[h]));
        step[at] = float(d);
        decay[at] = float(exact_exp(-rates[size_t(h)] * double(step[at])));
      }
      const size_t group = size_t(h / per_group) * size_t(s.state_dim), value = size_t(h) * size_t(s.head_dim);
      const MambaHead head{state + value * size_t(s.state_dim),
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
