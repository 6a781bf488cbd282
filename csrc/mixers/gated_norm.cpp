#include "mixers/gated_norm.h"

#include <vector>

namespace edgemoe {

void gated_norm(Workspace& ws, float* x, const float* gate, size_t gate_stride, const float* weight,
                bool weight_per_group, float eps, Gate kind, int T, int groups, int width) {
  const Kernels& kn = kernels();
  ws.pool.run(T * groups, grain_for(T * groups, ws.pool.size()), [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int g = i % groups;
      float* v = x + size_t(i) * size_t(width);
      const float* z = gate + size_t(i / groups) * gate_stride + size_t(g) * size_t(width);
      const float* w = weight + (weight_per_group ? size_t(g) * size_t(width) : 0);
      if (kind == Gate::kSiluFirst) kn.activate(Activation::kSwiglu, z, v, width, v);
      kn.rms_norm(v, w, eps, width, v);
      if (kind == Gate::kSilu) kn.activate(Activation::kSwiglu, z, v, width, v);
      if (kind == Gate::kSigmoid) kn.sigmoid_mul(z, v, width, v);
    }
  });
}

void sigmoid_gate(Workspace& ws, float* x, const float* gate, int T, int cols) {
  const Kernels& kn = kernels();
  ws.pool.run(T, grain_for(T, ws.pool.size()), [&](int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const size_t at = size_t(t) * size_t(cols);
      kn.sigmoid_mul(gate + at, x + at, cols, x + at);
    }
  });
}

void head_gate(Workspace& ws, float* x, const float* gate, bool softplus, int T, int heads, int width) {
  const Kernels& kn = kernels();
  ws.pool.run(T, grain_for(T, ws.pool.size()), [&](int begin, int end) {
    std::vector<float> g(size_t(heads), 0.0f);
    for (int t = begin; t < end; ++t) {
      g.assign(gate + size_t(t) * heads, gate + size_t(t + 1) * heads);
      softplus ? kn.softplus(g.data(), nullptr, heads) : kn.sigmoid(g.data(), heads);
      float* row = x + size_t(t) * heads * width;
      for (int i = 0; i < heads * width; ++i) row[i] *= g[size_t(i / width)];
    }
  });
}

}  // namespace edgemoe
